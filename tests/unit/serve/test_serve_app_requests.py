"""How requests are read: forms with brackets, fingerprints, retries, and whatever else a client may send."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import Rig, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tubelet.serve import intake, schemas
from tubelet.serve.errors import ApiError
from tubelet.serve.requests import Upload, fingerprint, nest


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path, working=False, cap=10_000) as rig:
        yield rig


@pytest.mark.parametrize(
    ("pairs", "fields"),
    [
        ([("prompt", "p")], {"prompt": "p"}),
        ([("a[b]", "1"), ("a[c]", "2")], {"a": {"b": "1", "c": "2"}}),
        ([("a[]", "1"), ("a[]", "2")], {"a": ["1", "2"]}),
        ([("a[0]", "1"), ("a[1]", "2")], {"a": ["1", "2"]}),
        ([("a[][id]", "1"), ("a[][id]", "2")], {"a": [{"id": "1"}, {"id": "2"}]}),
        ([("a[][id]", "1"), ("a[][n]", "x"), ("a[][id]", "2")], {"a": [{"id": "1", "n": "x"}, {"id": "2"}]}),
        ([("a[0][id]", "1"), ("a[1][id]", "2")], {"a": [{"id": "1"}, {"id": "2"}]}),
        ([("nested[a][]", "1"), ("nested[a][]", "2")], {"nested": {"a": ["1", "2"]}}),
    ],
)
def test_brackets(pairs: list[tuple[str, Any]], fields: dict[str, Any]) -> None:
    assert nest(pairs) == fields


@pytest.mark.parametrize(
    "pairs",
    [
        [("a", "1"), ("a", "2")],
        [("a", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a", "2")],
        [("a[b", "1")],
        [("a]b", "1")],
        [("", "1")],
        [("a[b][c][d][e]", "1")],
        [("a\x00", "1")],
        [("a b", "1")],
    ],
)
def test_names_that_cannot_be_read(pairs: list[tuple[str, Any]]) -> None:
    with pytest.raises(ApiError) as caught:
        nest(pairs)
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")


def test_a_fingerprint_is_of_what_was_said() -> None:
    def upload(sha256: str, name: str = "a.png") -> Upload:
        return Upload(name, None, 3, sha256)  # type: ignore[arg-type]

    first = fingerprint("create", {"prompt": "p", "input_reference": upload("1"), "seed": "5"})
    assert first == fingerprint("create", {"seed": "5", "input_reference": upload("1", "b.png"), "prompt": "p"})
    assert first != fingerprint("create", {"prompt": "p", "input_reference": upload("2"), "seed": "5"})
    assert first != fingerprint("edit", {"prompt": "p", "input_reference": upload("1"), "seed": "5"})
    assert first != fingerprint("create", {"prompt": "q", "input_reference": upload("1"), "seed": "5"})
    assert fingerprint("c", {"a": ["1", "2"]}) != fingerprint("c", {"a": ["2", "1"]})
    fingerprint("c", {"a": "\ud800"})


def form(boundary: str, prompt: str = "p", picture: bytes = b"picture") -> dict[str, Any]:
    """A request as the official client writes it; the boundary differs at each of its tries."""
    body = (
        (
            f'--{boundary}\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n{prompt}\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
        ).encode()
        + picture
        + f"\r\n--{boundary}--\r\n".encode()
    )
    return {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def retry(sent: dict[str, Any], count: int, **more: str) -> dict[str, Any]:
    return {**sent, "headers": {**sent["headers"], "x-stainless-retry-count": str(count), **more}}


def test_a_clients_retry_makes_no_second_job(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = intake.Admitted(b"clean", "image/png", "image", (16, 24), 1, 0.0, None)
    monkeypatch.setattr(intake, "admit", lambda data, want="any": taken)
    first = rig.client.post("/v1/videos", **retry(form("one"), 0)).json()["id"]
    assert rig.client.post("/v1/videos", **retry(form("two"), 1)).json()["id"] == first
    assert rig.client.post("/v1/videos", **retry(form("three"), 2)).json()["id"] == first
    assert "tubelet_retries_deduped_total 2" in rig.client.get("/metrics").text
    for other in (form("four", prompt="q"), form("five", picture=b"another")):
        assert rig.client.post("/v1/videos", **retry(other, 1)).json()["id"] != first
    again = rig.client.post("/v1/videos", **retry(form("six"), 0)).json()["id"]
    assert again != first, "the same wish, asked for anew, is a new film"
    assert rig.client.post("/v1/videos", **retry(form("seven"), 1)).json()["id"] == again
    assert rig.jobs.counts()["queued"] == 4


def test_a_retry_after_the_window_is_a_new_wish(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"]
    now = rig.jobs._clock()
    monkeypatch.setattr(rig.jobs, "_clock", lambda: now + 130)
    later = {"json": {"prompt": "p"}, "headers": {"x-stainless-retry-count": "1"}}
    assert rig.client.post("/v1/videos", **later).json()["id"] != first


def test_a_retry_while_the_first_try_is_underway(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gave up waiting and asks again while its first request is still being decoded."""
    gate, inside = threading.Event(), threading.Semaphore(0)

    def slow(data: bytes, want: str = "any") -> intake.Admitted:
        inside.release()
        gate.wait(20)
        return intake.Admitted(b"clean", "image/png", "image", (16, 24), 1, 0.0, None)

    monkeypatch.setattr(intake, "admit", slow)
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: ids.append(rig.client.post("/v1/videos", **retry(form(f"b{n}"), n)).json()["id"]))
        for n in range(3)
    ]
    threads[0].start()
    inside.acquire(timeout=10)
    for thread in threads[1:]:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(20)
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert rig.app.state.service.underway == {}


def test_an_idempotency_key(rig: Rig) -> None:
    key = {"idempotency-key": "one"}
    first = rig.client.post("/v1/videos", json={"prompt": "p"}, headers=key)
    again = rig.client.post("/v1/videos", json={"prompt": "p"}, headers=key)
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["seed"] == again.json()["seed"]
    other = rig.client.post("/v1/videos", json={"prompt": "q"}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "key_conflict")
    assert other.headers["x-should-retry"] == "false"
    assert (
        rig.client.post("/v1/videos", json={"prompt": "p"}, headers={"idempotency-key": "two"}).json()["id"]
        != first.json()["id"]
    )
    for wrong in ("", " ", "x" * 256):
        answer = rig.client.post("/v1/videos", json={"prompt": "p"}, headers={"idempotency-key": wrong})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


def test_an_upload_that_stops_coming(tmp_path: Path) -> None:
    """The body is announced and never sent."""
    with serving(tmp_path, working=False, live=True, body_patience=0.3) as rig:
        place = (rig.client.base_url.host, rig.client.base_url.port)
        with socket.create_connection(place, timeout=60) as line:
            head = (
                "POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
            )
            begin = time.monotonic()
            line.sendall(head.encode())
            answer = line.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert time.monotonic() - begin > 0.2


BODIES = [kind for kind in vars(schemas).values() if isinstance(kind, type) and issubclass(kind, schemas.Asked)]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["4", "1280x720", "{", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(sorted({name for body in BODIES for name in body.model_fields})) | st.text(max_size=8)
PATHS = st.sampled_from(
    [
        "/v1/videos",
        "/v1/videos/edits",
        "/v1/videos/extensions",
        "/v1/videos/characters",
        f"/v1/videos/video_{'0' * 26}/remix",
        f"/v1/videos/video_{'0' * 26}/move",
        "/v1/files",
        "/v1/queue",
        "/v1/expansions",
        "/v1/webhook_endpoints",
        "/v1/content_provenance_checks",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS, fields=st.dictionaries(NAMES, VALUES, max_size=5), flat=st.booleans())
def test_no_body_breaks_the_server(rig: Rig, path: str, fields: dict[str, Any], flat: bool) -> None:
    if flat:
        parts = {name: (None, str(value).encode(errors="replace")) for name, value in fields.items() if name.isascii() and name}
        answer = rig.client.post(path, files=parts) if parts else rig.client.post(path)
    else:
        answer = rig.client.post(path, content=json.dumps(fields).encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        said = answer.json()["error"]
        assert said["message"]
        assert said["code"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b", "a/b", ""]))
def test_no_bytes_break_the_server(rig: Rig, body: bytes, kind: str) -> None:
    sent = b"--b\r\n" + body if "boundary" in kind else body
    answer = rig.client.post("/v1/videos", content=sent, headers={"content-type": kind})
    assert answer.status_code in (400, 415), answer.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.dictionaries(st.sampled_from(["after", "limit", "order", "variant"]), st.text(max_size=20), max_size=3))
def test_no_query_breaks_the_server(rig: Rig, query: dict[str, str]) -> None:
    for path in ("/v1/videos", "/v1/files", "/v1/webhook_endpoints", f"/v1/videos/video_{'0' * 26}/content"):
        assert rig.client.get(path, params={n: v.encode(errors="replace") for n, v in query.items()}).status_code in (
            200,
            400,
            404,
        )
