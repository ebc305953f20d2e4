"""Whatever is sent, to whichever address: an answer or the error object, never a broken server, nothing written elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from api_rig import Rig, serving
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from tubelet.serve import intake
from tubelet.serve.outbound import Outbound

BOUNDED = settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
POSTS = [
    "/v1/videos", "/v1/videos/edits", "/v1/videos/extensions", "/v1/videos/characters", "/v1/videos/FILM/remix",
    "/v1/videos/FILM/cancel", "/v1/videos/FILM/move", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations",
    "/v1/files", "/v1/expansions", "/v1/content_provenance_checks", "/v1/webhook_endpoints",
]  # fmt: skip
FIELDS = [
    "prompt", "model", "seconds", "size", "seed", "steps", "guidance", "expand", "loop", "frames", "input_reference", "video",
    "second_video", "mode", "strength", "characters", "shots", "name", "file", "purpose", "image", "mask", "n", "output_format",
    "stream", "partial_images", "url", "event_types", "place", "output_path", "__proto__", "",
]  # fmt: skip
HOSTILE = [
    "../../../../etc/passwd", "/etc/passwd", "..\\..\\x", "file:///etc/passwd", "%2e%2e%2f", "\x00", "~", ".", "a/../b",
    "video_" + "0" * 26, "file_" + "0" * 26, "char_" + "0" * 26, "https://127.0.0.1/x", "data:image/png;base64,AAAA", "{}",
    '{"id": "../../x"}', '[{"prompt": "p", "seconds": 1}]', "1e999", "-1", "NaN", "4", "1280x720", "true", "connect", "sora-2",
]  # fmt: skip
BYTES = st.one_of(st.binary(max_size=200), st.sampled_from([b"clip one", b"picture", b"bad", b"\x89PNG\r\n\x1a\n", b"GIF89a"]))
WORDS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40))
BRACKETS = ["[]", "[0]", "[1]", "[id]", "[image_url]", "[file_id]", "[][id]", "[][prompt]", "[a][b][c][d]", "[", "]", "[..]"]
KEYS = st.one_of(
    st.sampled_from(FIELDS),
    st.text(max_size=10),
    st.builds(str.__add__, st.sampled_from(FIELDS), st.sampled_from(BRACKETS)),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)


@st.composite
def json_bodies(draw: st.DrawFn) -> tuple[bytes, str]:
    """Objects with the fields that there are, and any other value; sometimes torn."""
    body = json.dumps(draw(st.one_of(OBJECTS, OBJECTS.map(lambda o: {"prompt": "a ball", **o}), VALUES))).encode()
    return body[: draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))], "application/json"


@st.composite
def forms(draw: st.DrawFn) -> tuple[bytes, str]:
    pairs = draw(st.lists(st.tuples(KEYS, WORDS), max_size=8))
    body = urlencode([(k.encode(errors="replace"), v.encode(errors="replace")) for k, v in pairs]).encode()
    return body, "application/x-www-form-urlencoded"


@st.composite
def multiparts(draw: st.DrawFn) -> tuple[bytes, str]:
    """Written by hand, since a library would mend the names, and the boundaries that are missing or wrong."""
    boundary = draw(st.sampled_from(["b", "b" * 70, "-", "b;x", "'"]))
    body = b""
    for _ in range(draw(st.integers(0, 5))):
        name = draw(KEYS).encode(errors="replace")
        filename = draw(st.one_of(st.none(), WORDS))
        head = b'content-disposition: form-data; name="' + name + b'"'
        if filename is not None:
            head += b'; filename="' + filename.encode(errors="replace") + b'"'
        extra = draw(st.sampled_from([b"", b"\r\ncontent-type: image/png", b"\r\ncontent-type: multipart/mixed", b"\r\nx"]))
        value = draw(st.one_of(BYTES, WORDS.map(lambda text: text.encode(errors="replace"))))
        body += b"--" + boundary.encode() + b"\r\n" + head + extra + b"\r\n\r\n" + value + b"\r\n"
    body += draw(st.sampled_from([b"--" + boundary.encode() + b"--\r\n", b"--" + boundary.encode(), b"", b"--wrong--\r\n"]))
    said = draw(st.sampled_from([f"; boundary={boundary}", f'; boundary="{boundary}"', "", "; boundary="]))
    return body, f"multipart/form-data{said}"


BODIES = st.one_of(
    json_bodies(), forms(), multiparts(), st.tuples(BYTES, st.sampled_from(["application/json", "text/plain", "", "a/b;;="]))
)


def admit(data: bytes, *, want: str = "any") -> intake.Admitted:
    """Stands in for the decoder, which has tests of its own."""
    kind = "video" if data.startswith(b"clip") else "image"
    if not data.startswith((b"clip", b"picture")) or want not in ("any", "mask", kind):
        raise intake.Refused("unsupported_media")
    if kind == "video":
        return intake.Admitted(data, "video/mp4", "video", (48, 64), 16, 8.0, None)
    return intake.Admitted(data, "image/png", "image", (16, 24), 1, 0.0, None)


class Watch:
    """Notes what this process opens for writing, makes, moves and removes outside of a folder while a request is answered."""

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")

    def __init__(self) -> None:
        self.inside = Path("/")
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, facts: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(facts[2], int) and facts[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing or event in self.CHANGES:
            for path in facts[:2] if event in ("os.rename", "os.link", "os.symlink") else facts[:1]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    place = os.path.abspath(os.fsdecode(path))
                    if not Path(place).is_relative_to(self.inside):
                        self.seen.append((event, place))

    @contextlib.contextmanager
    def keeping(self, folder: Path) -> Iterator[None]:
        """Raises AssertionError when something outside of `folder` changed."""
        self.inside, self.seen = folder, []
        try:
            yield
        finally:
            self.inside = Path("/")
        assert self.seen == []


WATCH = Watch()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patched, serving(folder, cap=100_000) as rig:
        patched.setattr(intake, "admit", admit)
        patched.setattr(tempfile, "tempdir", str(folder))
        patched.setattr(sys, "dont_write_bytecode", True)
        rig.app.state.service.outbound = Outbound(resolver=lambda _host, _port: [])
        rig.film()
        yield rig


@pytest.fixture(scope="module")
def film(rig: Rig) -> str:
    return str(rig.client.get("/v1/videos").json()["data"][-1]["id"])


def ask(rig: Rig, method: str, path: str, **sent: Any) -> httpx.Response:
    """An answer, which is 2xx, or the error object and not the server's fault."""
    with WATCH.keeping(rig.config.data):
        answer = rig.client.request(method, path, **sent)
    if answer.status_code >= 300:
        _check_error(answer)
    return answer


def _check_error(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.request.url, answer.text)
    assert answer.headers["x-request-id"].startswith("req_")
    if answer.request.method == "HEAD":
        return
    said = answer.json()
    assert set(said) == {"error"}
    assert set(said["error"]) == {"message", "type", "param", "code"}
    assert all(isinstance(said["error"][name], str) and said["error"][name] for name in ("message", "type", "code"))
    assert len(answer.content) < 1000, "what was sent is not repeated"


def test_the_watch_sees(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with pytest.raises(AssertionError), WATCH.keeping(tmp_path / "inside"):
        (tmp_path / "outside").write_text("")
    with WATCH.keeping(tmp_path / "inside"):
        (tmp_path / "inside" / "file").write_text("")


def test_any_body_is_answered(rig: Rig, film: str) -> None:
    statuses = set()

    @settings(BOUNDED, max_examples=250)
    @given(path=st.sampled_from(POSTS), body=BODIES)
    @example(path="/v1/videos", body=(b'{"prompt": "p", "seed": 1' + b"0" * 5000 + b"}", "application/json"))
    @example(path="/v1/videos", body=(b"[" * 100_000, "application/json"))
    @example(path="/v1/videos", body=(b'{"prompt": "p", "shots": "' + b"[" * 100_000 + b'"}', "application/json"))
    def answered(path: str, body: tuple[bytes, str]) -> None:
        answer = ask(rig, "POST", path.replace("FILM", film), content=body[0], headers={"content-type": body[1]})
        statuses.add(answer.status_code)

    answered()
    assert {200, 400, 415} <= statuses


def paths(rig: Rig) -> list[tuple[str, str]]:
    """(method, path) of every route that takes something in its path."""
    routes = [route for route in rig.app.routes if isinstance(route, Route) or hasattr(route, "methods")]
    found = {(method, str(route.path)) for route in routes for method in route.methods or ()}  # type: ignore[attr-defined]
    return sorted(pair for pair in found if "{" in pair[1])


ODD = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60), st.binary(max_size=40))


def test_any_id_is_answered(rig: Rig) -> None:
    @BOUNDED
    @given(route=st.sampled_from(paths(rig)), id=ODD, whole=st.booleans())
    def answered(route: tuple[str, str], id: str | bytes, whole: bool) -> None:
        method, path = route
        text = quote(id if isinstance(id, bytes) else id.encode(errors="surrogatepass"), safe="/" if whole else "")
        answer = ask(rig, method, re.sub(r"{\w+}", lambda _: text, path), content=b"")
        if method != "OPTIONS" and not whole:
            assert answer.status_code in (400, 404, 405) or text == "", "there is nothing under a made-up id"

    answered()


def test_any_query_and_header_is_answered(rig: Rig, film: str) -> None:
    paths = ["/v1/videos", "/v1/files", "/v1/webhook_endpoints", f"/v1/videos/{film}/content", f"/v1/videos/{film}"]
    names = ["after", "limit", "order", "variant", "purpose", "x"]
    headers = ["range", "if-range", "last-event-id", "idempotency-key", "x-stainless-retry-count", "accept", "if-none-match"]
    plain = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)

    @BOUNDED
    @given(
        path=st.sampled_from(paths),
        query=st.lists(st.tuples(st.sampled_from(names), WORDS), max_size=3),
        sent=st.dictionaries(st.sampled_from(headers), plain, max_size=3),
    )
    def answered(path: str, query: list[tuple[str, str]], sent: dict[str, str]) -> None:
        written = urlencode([(name, value.encode(errors="replace")) for name, value in query])
        ask(rig, "GET", f"{path}?{written}", headers={name: value.strip() for name, value in sent.items()})

    answered()


def test_any_range_is_a_part_of_the_film(rig: Rig, film: str) -> None:
    whole = rig.client.get(f"/v1/videos/{film}/content").content
    number = st.one_of(st.just(""), st.integers(0, 60).map(str), st.sampled_from(["-1", "1" * 40, "x", " 1", "1e3"]))
    ranges = st.lists(st.builds("{}-{}".format, number, number), min_size=1, max_size=3).map(",".join)

    @BOUNDED
    @given(unit=st.sampled_from(["bytes=", "bytes = ", "lines=", ""]), asked=ranges)
    def answered(unit: str, asked: str) -> None:
        answer = rig.client.get(f"/v1/videos/{film}/content", headers={"range": unit + asked})
        assert answer.status_code in (200, 206, 400, 416), answer.text
        if answer.status_code == 200:
            assert answer.content == whole
        elif answer.status_code == 206 and "content-range" in answer.headers:
            begin, end, total = map(int, re.findall(r"\d+", answer.headers["content-range"]))
            assert (answer.content, total) == (whole[begin : end + 1], len(whole))

    answered()
