"""How requests are read: forms with brackets, fingerprints, retries, and whatever else a client may send."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import LOCAL, Rig, png, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError
from starlette.testclient import TestClient

from tubelet.serve import intake, requests, schemas, submit
from tubelet.serve.app import create_app
from tubelet.serve.errors import ApiError
from tubelet.serve.requests import PLAIN_LIMIT, Upload, fingerprint, nest
from tubelet.serve.retries import Refusals
from tubelet.serve.schemas import LONGEST_PROMPT, MOST_MARKS, clean_text


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


def test_a_key_is_replayed_when_the_source_has_gone(tmp_path: Path) -> None:
    """The first answer was lost, and the film was deleted before the client asked again."""
    key = {"idempotency-key": "one"}
    with serving(tmp_path) as rig:
        film = rig.film()["id"]
        body = {"prompt": "snow", "video": {"id": film}}
        first = rig.client.post("/v1/videos/edits", json=body, headers=key)
        assert first.status_code == 200, first.text
        rig.client.delete(f"/v1/videos/{film}")
        again = rig.client.post("/v1/videos/edits", json=body, headers=key)
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        other = rig.client.post("/v1/videos/edits", json={**body, "prompt": "rain"}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "key_conflict")


def sent(rig: Rig, count: int, prompt: str = "p") -> Any:
    return rig.client.post("/v1/videos", json={"prompt": prompt}, headers={"x-stainless-retry-count": str(count)})


def test_the_retry_of_a_refused_request_makes_a_film_of_its_own(tmp_path: Path) -> None:
    """Two clients ask for the same; there is room for one at a time."""
    with serving(tmp_path, working=False, cap=1) as rig:
        one = sent(rig, 0).json()["id"]
        assert [sent(rig, count).status_code for count in (0, 1)] == [429, 429]
        rig.jobs.cancel(one, None)
        two = sent(rig, 2).json()["id"]
        assert two != one
        assert sent(rig, 3).json()["id"] == two, "this answer was lost"
        assert sent(rig, 1).json()["id"] == two, "nobody who waits for a second try was refused"
        assert rig.client.get("/v1/videos").json()["data"][1]["id"] == one


def test_a_retry_that_gave_up_is_nobody_elses(tmp_path: Path) -> None:
    """A client that was refused to the end and asks anew gets one film, though that answer is lost."""
    with serving(tmp_path, working=False, cap=1) as rig:
        other = sent(rig, 0, "other").json()["id"]
        assert [sent(rig, count).status_code for count in (0, 1, 2)] == [429, 429, 429]
        rig.jobs.cancel(other, None)
        film = sent(rig, 0).json()["id"]
        assert sent(rig, 1).json()["id"] == film


def test_refusals_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    refused = Refusals(120.0, clock=lambda: now)
    for _ in range(2):
        refused.note("a", 0)
    assert [refused.take("a", count) for count in (2, 1, 1, 1)] == [False, True, True, False]
    refused.note("a", 0)
    now = 121.0
    assert not refused.take("a", 1)
    monkeypatch.setattr("tubelet.serve.retries.MOST", 3)
    for number in range(5):
        refused.note(f"b{number}", 0)
    assert list(refused.noted) == [("b2", 1), ("b3", 1), ("b4", 1)]
    now = 300.0
    refused.note("c", 0)
    assert list(refused.noted) == [("c", 1)]


@pytest.mark.parametrize("count", ["\u00b2", "-1", "1e3", "9" * 5000, ""])
def test_odd_counts_of_retries(rig: Rig, count: str) -> None:
    headers = {"x-stainless-retry-count": count.encode("latin-1")}
    assert rig.client.post("/v1/videos", json={"prompt": "p"}, headers=headers).status_code == 200


@pytest.mark.parametrize("first", [0, 1], ids=["the first try is first", "the retry is first"])
def test_a_retry_that_reaches_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Both tries are under way at once, in two processes on one store, and neither has looked when the other is done."""
    gates, inside = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def slow(data: bytes, want: str = "any") -> intake.Admitted:
        number = 0 if not inside[0].is_set() else 1
        inside[number].set()
        gates[number].wait(20)
        return intake.Admitted(b"clean", "image/png", "image", (16, 24), 1, 0.0, None)

    monkeypatch.setattr(intake, "admit", slow)
    with (
        serving(tmp_path, working=False) as rig,
        TestClient(create_app(rig.jobs, rig.store, rig.config), base_url=LOCAL) as other,
    ):
        ids: dict[int, str] = {}

        def ask(client: Any, number: int) -> None:
            ids[number] = client.post("/v1/videos", **retry(form(f"b{number}"), number)).json()["id"]

        threads = [threading.Thread(target=ask, args=(client, n)) for n, client in enumerate((rig.client, other))]
        for number, thread in enumerate(threads):
            thread.start()
            assert inside[number].wait(20)
        for number in (first, 1 - first):
            gates[number].set()
            threads[number].join(20)
        assert ids[0] == ids[1]
        assert rig.jobs.counts()["queued"] == 1
        anew = rig.client.post("/v1/videos", **retry(form("b2"), 0)).json()["id"]
        assert anew != ids[0], "the same wish, asked for anew, is a new film"


def test_long_texts_are_refused_before_they_are_looked_at(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    normalize = unicodedata.normalize

    def watched(form: Any, text: str) -> str:
        assert len(text) <= LONGEST_PROMPT, "every character of a long text was looked at"
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", watched)
    for path, name, longest in (("/v1/videos", "prompt", LONGEST_PROMPT), ("/v1/webhook_endpoints", "name", 200)):
        body = {"url": "https://example.org/", "event_types": ["video.failed"]} if name == "name" else {}
        answer = rig.client.post(path, json={**body, name: "\u00e9" * 200_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "string_above_max_length")
        assert answer.json()["error"]["param"] == name
        answer = rig.client.post(path, json={**body, name: f"  {'x' * longest}\n"})
        assert answer.status_code == 200 or name == "name", "blanks around it do not count"
    assert clean_text(" e\u0301\n\tb ", 6) == "\u00e9\n\tb"
    for wrong in ("a\x00", "a\x7f", "a\x9f", "a\ud800"):
        with pytest.raises(PydanticCustomError):
            clean_text(wrong, 10)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\u0344\u0316"])
def test_heaps_of_marks_are_refused(marks: str) -> None:
    """To put n marks on one letter in order takes n * n steps, here three seconds, in which nothing else is answered."""
    begin = time.monotonic()
    with pytest.raises(PydanticCustomError, match="marks"):
        clean_text("a" + marks * (LONGEST_PROMPT // len(marks) - 1), LONGEST_PROMPT)
    assert time.monotonic() - begin < 0.5
    assert clean_text("a" + "\u0301" * MOST_MARKS, LONGEST_PROMPT)
    assert clean_text("\U0001f600" * 1000 + "\u4e00" * 1000, LONGEST_PROMPT)


def url_of(size: int) -> str:
    """A picture as a data URL of about `size` bytes: a small one, and what no decoder reads behind it."""
    return f"data:image/png;base64,{base64.b64encode(png() + bytes(size * 3 // 4)).decode()}"


def bodies(hidden: str) -> dict[str, bytes]:
    """JSON in which very many small things are hidden behind what looks like the beginning of a data URL."""
    many = ",".join([hidden] * (2 * PLAIN_LIMIT // (len(hidden) + 1)))
    return {
        "plain": f'{{"prompt": "p", "a": [{many}]}}'.encode(),
        "behind a short one": f'{{"prompt": "data:", "a": [{many}]}}'.encode(),
        "behind a long one": f'{{"prompt": "{url_of(5000)}", "a": [{many}]}}'.encode(),
        "behind a quote": f'{{"prompt": "\\"data:", "a": [{many}]}}'.encode(),
        "utf-16": f'{{"prompt": "p", "a": [{many}]}}'.encode("utf-16"),
    }


@pytest.mark.parametrize("hidden", ["{}", "1", '"data:"', '"data:image/png;base64,AAAA"'])
@pytest.mark.parametrize("way", ["plain", "behind a short one", "behind a long one", "behind a quote", "utf-16"])
def test_json_of_very_many_things_is_not_taken_apart(rig: Rig, monkeypatch: pytest.MonkeyPatch, hidden: str, way: str) -> None:
    monkeypatch.setattr(requests.json, "loads", pytest.fail)
    answer = rig.client.post("/v1/videos", content=bodies(hidden)[way], headers={"content-type": "application/json"})
    monkeypatch.undo()
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_text_in_text_is_not_taken_apart_either(rig: Rig) -> None:
    """A string of JSON whose quotes are written otherwise, so that from outside it looks like one data URL."""
    many = ",".join(["{}"] * PLAIN_LIMIT)
    body = f'{{"prompt": "p", "shots": "[\\"data:\\u0022,{many}]"}}'.encode()
    answer = rig.client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "longer" in answer.json()["error"]["message"]


def test_pictures_as_text_may_be_long_and_nothing_else(rig: Rig) -> None:
    url = url_of(2 * PLAIN_LIMIT)
    fields = {"prompt": "p", "input_reference": {"image_url": url}, "last_reference": {"image_url": url}}
    assert rig.client.post("/v1/videos", json=fields).status_code == 200
    escaped = json.dumps(fields).replace("/", "\\/").encode()
    kind = {"content-type": "application/json"}
    assert rig.client.post("/v1/videos", content=escaped, headers=kind).status_code == 200, "as PHP writes it"
    for name, value in (("input_reference[image_url]", url), ("input_reference", json.dumps({"image_url": url}))):
        made = rig.client.post("/v1/videos", files={"prompt": (None, "p"), name: (None, value)})
        assert made.status_code == 200, made.text
    for name in ("prompt", "shots", "user", "odd"):
        answer = rig.client.post("/v1/videos", files={"prompt": (None, "p")} | {name: (None, "[" * (PLAIN_LIMIT + 1))})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large"), name


@pytest.mark.parametrize("name", ["shots", "characters", "input_reference", "video"])
@pytest.mark.parametrize("text", ["[" * 9 + "]" * 9, '[{"a":' * 5 + "1" + "}]" * 5, "[NaN]", "[" * 100_000, '{"a": '])
def test_json_in_a_form_is_held_to_the_same(rig: Rig, name: str, text: str) -> None:
    answer = rig.client.post("/v1/videos", files={"prompt": (None, "p"), name: (None, text)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert answer.json()["error"]["param"] == name


def test_what_is_long_is_read_and_hashed_beside_the_loop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def noted(work: Any) -> Any:
        def call(*args: Any) -> Any:
            threads.add(threading.current_thread().name)
            return work(*args)

        return call

    for module, name in ((requests, "_json"), (requests, "_urlencoded"), (submit, "fingerprint")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    assert rig.client.post("/v1/videos", json={"prompt": "p"}).status_code == 200
    assert rig.client.post("/v1/videos", data={"prompt": "p"}).status_code == 200
    assert len(threads) > 0
    assert all(name.startswith("AnyIO worker thread") for name in threads)
    long = "x" * (2 * PLAIN_LIMIT)
    assert fingerprint("c", {"a": long}) == fingerprint("c", {"a": long}) != fingerprint("c", {"a": long + "y"})
    with monkeypatch.context() as patched:
        patched.setattr(requests.json, "dumps", lambda value, **_: pytest.fail("a") if long in str(value) else "")
        fingerprint("c", {"a": long})


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
