from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tubelet.core.errors import UserError
from tubelet.text.expand import ChatExpander, Expander, RuleExpander

Answer = tuple[int, bytes]


class Endpoint:
    """A chat endpoint on this machine: `reply` decides, `asked` remembers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.reply: Callable[[], Answer] = lambda: (200, completion("A dense caption."))
        self.location: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, dict(self.headers), json.loads(body)))
                status, answer = outer.reply()
                self.send_response(status)
                if outer.location is not None:
                    self.send_header("Location", outer.location)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers), None))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Endpoint()
    yield made
    made.stop()


def test_rules_expand_what_they_can_read() -> None:
    rules: Expander = RuleExpander[str](
        parse=lambda prompt: "red" if "red" in prompt else None,
        compose=lambda scene: f"A medium {scene} ball rests on the floor.",
    )
    expanded = rules.expand("red thing")
    assert (expanded.original, expanded.text) == ("red thing", "A medium red ball rests on the floor.")
    assert expanded.changed
    assert expanded.source == "rules"
    left = rules.expand("a cat")
    assert left.text == left.original == "a cat"
    assert not left.changed


def test_chat_sends_the_prompt_and_returns_both(endpoint: Endpoint) -> None:
    chat: Expander = ChatExpander(endpoint.url + "/", "tiny", "secret")
    expanded = chat.expand("ein roter Ball — 球")
    assert (expanded.original, expanded.text, expanded.source) == ("ein roter Ball — 球", "A dense caption.", "tiny")
    path, headers, question = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert question["model"] == "tiny"
    assert [m["role"] for m in question["messages"]] == ["system", "user"]
    assert question["messages"][1]["content"] == "ein roter Ball — 球"


def test_no_key_no_header_and_the_key_is_not_printed(endpoint: Endpoint) -> None:
    ChatExpander(endpoint.url, "tiny").expand("a ball")
    assert "Authorization" not in endpoint.asked[0][1]
    assert "secret" not in repr(ChatExpander(endpoint.url, "tiny", "secret"))


@pytest.mark.parametrize(
    ("said", "text"),
    [('"Quoted."', "Quoted."), ("Two\n\nlines. ", "Two lines."), ("<think>hm\n</think>\nA ball.", "A ball."), ('"', '"')],
)
def test_answers_are_tidied(endpoint: Endpoint, said: str, text: str) -> None:
    endpoint.reply = lambda: (200, completion(said))
    assert ChatExpander(endpoint.url, "tiny").expand("a ball").text == text


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, b"no such key", r"answered 401 \(no such key\); check the key"),
        (404, b"", r"answered 404 .*; check the address"),
        (500, b"\xff\n\nbroken", r"answered 500 .*; "),
        (200, b"hello", r"did not answer with a chat completion; "),
        (200, b"[]", r"did not answer with a chat completion; "),
        (200, b'{"choices": []}', r"did not answer with a chat completion; "),
        (200, b'{"choices": 7}', r"did not answer with a chat completion; "),
        (200, completion(None), r"did not answer with a chat completion; "),
        (200, completion(["a"]), r"did not answer with a chat completion; "),
        (200, completion("  "), r"empty caption; "),
        (200, completion('""'), r"empty caption; "),
    ],
)
def test_bad_answers_are_one_sentence(endpoint: Endpoint, status: int, body: bytes, sentence: str) -> None:
    endpoint.reply = lambda: (status, body)
    with pytest.raises(UserError, match=sentence) as caught:
        ChatExpander(endpoint.url, "tiny", "secret").expand("a ball")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_do_not_carry_the_key_away(endpoint: Endpoint, status: int) -> None:
    other = Endpoint()
    try:
        endpoint.location = other.url
        endpoint.reply = lambda: (status, b"")
        with pytest.raises(UserError, match=str(status)):
            ChatExpander(endpoint.url, "tiny", "secret").expand("a ball")
        assert other.asked == []
    finally:
        other.stop()


def test_a_slow_endpoint(endpoint: Endpoint) -> None:
    def slow() -> Answer:
        time.sleep(0.5)
        return 200, completion("late")

    endpoint.reply = slow
    with pytest.raises(UserError, match=r"longer than 0.1 s; raise the timeout"):
        ChatExpander(endpoint.url, "tiny", timeout=0.1).expand("a ball")


def test_nobody_there(endpoint: Endpoint) -> None:
    gone = Endpoint()
    gone.stop()
    with pytest.raises(UserError, match=r"cannot reach the chat endpoint .*; start it"):
        ChatExpander(gone.url, "tiny").expand("a ball")


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "ftp://host/v1"},
        {"base_url": "localhost:8080"},
        {"base_url": "http://"},
        {"base_url": "http://["},
        {"base_url": "http://localhost:many/v1"},
        {"base_url": "http://localhost:99999/v1"},
        {"base_url": ""},
        {"model": ""},
        {"api_key": ""},
        {"api_key": "a\nb"},
        {"api_key": "ключ"},
        {"timeout": 0},
        {"timeout": float("nan")},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="; "):
        ChatExpander(**{"base_url": "http://127.0.0.1/v1", "model": "tiny", **wrong})


def test_half_a_surrogate_pair_can_be_sent(endpoint: Endpoint) -> None:
    ChatExpander(endpoint.url, "tiny").expand("a \ud800 ball")
    assert endpoint.asked[0][2]["messages"][1]["content"] == "a ? ball"
