"""Words are shown to the operator's moderation endpoint before they become a job; without one nobody sees them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from api_rig import png, serving

from tubelet.cli.serve import _moderation
from tubelet.core.errors import UserError
from tubelet.serve.config import Moderation
from tubelet.serve.moderation import Unanswered, flagged, seen, words_of


class Endpoint(BaseHTTPRequestHandler):
    """Flags what holds the word "gore"; `answers` may be set to something else than an answer."""

    asked: list[dict[str, Any]]
    keys: list[str | None]
    answers: tuple[int, bytes] | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        self.keys.append(self.headers["authorization"])
        results = [{"flagged": "gore" in str(one) or "Z29yZQ" in str(one), "categories": {}} for one in body["input"]]
        status, text = self.answers or (200, json.dumps({"id": "m", "model": "m", "results": results}).encode())
        self.send_response(status if self.path == "/base/moderations" else 404)
        if status == 302:
            self.send_header("location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    handler = type("Handler", (Endpoint,), {"asked": [], "keys": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/base/", handler
    server.shutdown()
    server.server_close()
    thread.join(10)


@contextlib.contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(openai.APIStatusError) as caught:
        yield
    assert caught.value.code == code
    assert "gore" not in str(caught.value)


def test_flagged_words_make_no_job_and_the_official_client_knows_why(
    tmp_path: Path, endpoint: tuple[str, type[Endpoint]]
) -> None:
    url, handler = endpoint
    with serving(tmp_path, live=True, moderation=Moderation(url, key="sk-mod", model="omni")) as rig:
        with openai.OpenAI(api_key="sk-x", base_url=str(rig.client.base_url.join("/v1"))) as client:
            film = client.videos.create_and_poll(prompt="a red ball")
            assert film.status == "completed"
            assert handler.asked == [{"input": ["a red ball"], "model": "omni"}]
            assert handler.keys == ["Bearer sk-mod"]
            files = set((rig.config.data / "assets").iterdir())
            with refused("moderation_blocked"):
                client.videos.create(prompt="gore", input_reference=("a.png", png(), "image/png"))
            assert set((rig.config.data / "assets").iterdir()) == files, "its picture is gone"
            with refused("moderation_blocked"):
                client.videos.remix(film.id, prompt="more gore")
            with refused("moderation_blocked"):
                client.images.generate(prompt="gore", model="sora-2", stream=True)
            shots = [{"prompt": "a ball", "seconds": 1}, {"prompt": "gore", "seconds": 1}]
            with refused("moderation_blocked"):
                client.videos.create(prompt="p", extra_body={"shots": json.dumps(shots)})
            assert len(handler.asked) == 5, "what was refused is not asked again"
        assert sum(rig.jobs.counts()[state] for state in ("queued", "in_progress", "completed", "failed")) == 1


def test_an_endpoint_that_does_not_answer(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9/v1"
    with serving(tmp_path / "strict", working=False, moderation=Moderation(nobody)) as rig:
        answer = rig.client.post("/v1/videos", json={"prompt": "a ball"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert rig.jobs.counts()["queued"] == 0
        assert rig.client.post("/v1/videos", json={"prompt": " "}).status_code == 400, "nobody is asked about what is wrong"
    with serving(tmp_path / "lenient", working=False, moderation=Moderation(nobody, lenient=True)) as rig:
        assert rig.client.post("/v1/videos", json={"prompt": "a ball"}).status_code == 200


@pytest.mark.parametrize(
    "answers",
    [
        (500, b""),
        (429, b""),
        (400, b""),
        (404, b""),
        (302, b""),
        (200, b"no"),
        (200, b"[]"),
        (200, b'{"results": []}'),
        (200, b'{"results": [{}]}'),
        (200, b'{"results": [{"flagged": 0}]}'),
        (200, b'{"results": 1}'),
        (200, b"[" * 100_000),
    ],
)
def test_an_odd_answer_is_none(endpoint: tuple[str, type[Endpoint]], answers: tuple[int, bytes]) -> None:
    url, handler = endpoint
    handler.answers = answers
    with pytest.raises(Unanswered) as caught:
        flagged(Moderation(url), ["a ball"])
    assert caught.value.final == (answers[0] in (400, 404))


def test_a_picture_is_shown_as_one_is(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    assert not flagged(Moderation(url), [seen(b"a ball", "image/jpeg")])
    assert flagged(Moderation(url), [seen(b"gore", "image/png")])
    assert handler.asked == [
        {"input": [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,YSBiYWxs"}}]},
        {"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,Z29yZQ=="}}]},
    ]


def test_what_a_person_wrote() -> None:
    assert words_of({"prompt": "a", "shots": [{"prompt": "b"}, {"prompt": "c"}]}) == ["a", "b", "c"]
    assert words_of({"prompt": "", "shots": None}) == []
    assert words_of({"prompt": "a", "text": "a, and more", "shots": None}) == ["a", "a, and more"]


def test_it_is_configured_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _moderation() is None
    for name, value in {"URL": "https://m.example/v1", "KEY": "secret", "LENIENT": "1", "FRAMES": "3"}.items():
        monkeypatch.setenv(f"TUBELET_MODERATION_{name}", value)
    assert _moderation() == Moderation("https://m.example/v1", "secret", lenient=True, frames=3)
    assert "secret" not in repr(_moderation())
    monkeypatch.setenv("TUBELET_MODERATION_FRAMES", "-1")
    with pytest.raises(UserError, match="TUBELET_MODERATION_FRAMES is a number of frames"):
        _moderation()
    monkeypatch.setenv("TUBELET_MODERATION_FRAMES", "3")
    monkeypatch.delenv("TUBELET_MODERATION_URL")
    with pytest.raises(UserError, match="needs TUBELET_MODERATION_URL"):
        _moderation()


@pytest.mark.parametrize(
    "wrong", [{"url": "m.example"}, {"url": "ftp://m.example"}, {"url": "http://m.example", "key": "a\nb"}]
)
def test_endpoints_that_cannot_be(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match="moderation endpoint"):
        Moderation(**wrong)
