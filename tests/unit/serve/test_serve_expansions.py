"""What is shown as the expansion of a prompt is what a worker reads, whoever wrote it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from api_rig import TINY, Rig, serving

from tubelet.cli import serve as cli
from tubelet.generate.folder import SystemConfig
from tubelet.generate.system import expander_of
from tubelet.serve import supervisor
from tubelet.serve.config import Moderation, ServeConfig
from tubelet.text.expand import ChatExpander

WORDS = "a red ball bounces"
PLAIN = dataclasses.replace(TINY, name="plain", expander=None)


class Chat(BaseHTTPRequestHandler):
    """A chat model that never says the same twice, unless it is told what to say. It flags no words."""

    asked: list[str]
    said: str | None = None
    status = 200
    numbers: Iterator[int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/moderations"):
            answer: Any = {"results": [{"flagged": any("gun" in text for text in body["input"])}]}
        else:
            words = body["messages"][-1]["content"]
            self.asked.append(words)
            text = type(self).said or f"{words}, take {next(self.numbers)}"
            answer = {"choices": [{"message": {"content": text}}]}
        out = json.dumps(answer).encode()
        self.send_response(type(self).status)
        self.send_header("content-length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def chat() -> Iterator[tuple[str, type[Chat]]]:
    handler = type("Handler", (Chat,), {"asked": [], "numbers": itertools.count(1)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler
        server.shutdown()
        thread.join(10)


def expansion(rig: Rig, **fields: Any) -> dict[str, Any]:
    answer = rig.client.post("/v1/expansions", json={"prompt": WORDS, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_rules_of_a_model_are_those_of_its_worker(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, systems={"tiny": TINY, "plain": PLAIN}) as rig:
        shown = expansion(rig)
        rules = expander_of(_config("worlds"))
        assert rules is not None
        assert shown == {"prompt": WORDS, "text": rules.expand(WORDS).text, "source": "rules"}
        assert len(shown["text"]) > 60
        assert expansion(rig, prompt="tax law") == {"prompt": "tax law", "text": "tax law", "source": "none"}
        assert expansion(rig, model="plain") == {"prompt": WORDS, "text": WORDS, "source": "none"}, "it has no rules"
        assert expander_of(_config(None)) is None
        assert expansion(rig, model="sora-2") == shown
        gone = rig.client.post("/v1/expansions", json={"prompt": WORDS, "model": "gpt-4"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (400, "model_not_found")


def _config(expander: str | None) -> Any:
    config = object.__new__(SystemConfig)
    object.__setattr__(config, "expander", expander)
    return config


def test_what_a_chat_model_said_is_what_the_worker_reads(tmp_path: Path, chat: tuple[str, type[Chat]]) -> None:
    """It says something else each time, so the words come back with the request."""
    url, handler = chat
    with serving(tmp_path, expander=ChatExpander(url, "bard")) as rig:
        shown = expansion(rig)
        assert shown == {"prompt": WORDS, "text": f"{WORDS}, take 1", "source": "bard"}
        assert expansion(rig)["text"] == f"{WORDS}, take 2"
        rig.worker.held.set()
        film = rig.client.post("/v1/videos", json={"prompt": WORDS, "text": shown["text"]}).json()
        assert (film["prompt"], film["text"]) == (WORDS, shown["text"]), "told before it is made"
        job = rig.jobs.get(film["id"], None)
        assert job is not None
        assert (job.request["prompt"], job.request["text"]) == (WORDS, shown["text"])
        rig.worker.held.clear()
        rig.until(film["id"])
        other = rig.client.post(f"/v1/videos/{film['id']}/remix", json={"prompt": WORDS, "text": "Another."}).json()
        assert other["text"] == "Another."
        assert handler.asked == [WORDS, WORDS]


def test_words_that_are_shown_are_words_that_may_be_sent(tmp_path: Path, chat: tuple[str, type[Chat]]) -> None:
    url, handler = chat
    with serving(tmp_path, working=False, expander=ChatExpander(url, "bard")) as rig:
        handler.said = "a ball\u0065\u0301"
        shown = expansion(rig)["text"]
        assert shown == "a ball\u00e9"
        assert rig.client.post("/v1/videos", json={"prompt": WORDS, "text": shown}).json()["text"] == shown
        for said, status in (("a\x07ball", 200), ("x" * 40_000, 200), ("fine", 500)):
            handler.said, handler.status = said, status
            answer = rig.client.post("/v1/expansions", json={"prompt": WORDS})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "expansion_unavailable")
            assert int(answer.headers["retry-after"]) <= 60
            assert "127.0.0.1" not in answer.text
    shots = [{"prompt": "one", "seconds": "1"}]
    with serving(tmp_path, working=False) as rig:
        answer = rig.client.post("/v1/videos", json={"prompt": WORDS, "text": "One.", "shots": shots})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")


def test_flagged_words_reach_no_chat_model_and_no_film(tmp_path: Path, chat: tuple[str, type[Chat]]) -> None:
    url, handler = chat
    with serving(tmp_path, working=False, expander=ChatExpander(url, "bard"), moderation=Moderation(url)) as rig:
        for path, fields in [
            ("/v1/expansions", {"prompt": "a gun"}),
            ("/v1/videos", {"prompt": "a gun"}),
            ("/v1/videos", {"prompt": WORDS, "text": "A gun, and a gun again."}),
        ]:
            answer = rig.client.post(path, json=fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked")
        assert handler.asked == []
        assert expansion(rig)["source"] == "bard"


def test_a_server_without_a_chat_model_loads_no_network(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tubelet.cli.serve import Serve; from tubelet.serve import supervisor; "
        "supervisor.serve = lambda *_, **__: 0; Serve(data=Path(sys.argv[1]))(); sys.exit('torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUBELET_CHAT")}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == 0


def test_the_server_and_its_workers_have_one_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read it from the environment, which the server hands on."""
    started: list[tuple[ServeConfig, Any]] = []
    monkeypatch.setattr(supervisor, "serve", lambda config, url, commands, **more: started.append((config, more)) or 0)
    monkeypatch.setenv("TUBELET_CHAT_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("TUBELET_CHAT_MODEL", "bard")
    cli.Serve(data=tmp_path)()
    ((config, more),) = started
    assert config.expander == ChatExpander("http://127.0.0.1:9/v1", "bard")
    assert more["environment"]["TUBELET_CHAT_URL"] == "http://127.0.0.1:9/v1"
    monkeypatch.delenv("TUBELET_CHAT_URL")
    cli.Serve(data=tmp_path)()
    assert started[-1][0].expander is None
