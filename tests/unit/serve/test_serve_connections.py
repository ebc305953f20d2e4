"""Clients that are slow or many, before a real socket: each has its time, what moves is left alone, the rest has a place."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from api_rig import Rig, serving, until

from tubelet.serve import connections
from tubelet.serve.connections import SPARE_FILES, room_for

HEAD = b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
LOOK = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
PAUSE = 0.05
QUICK = {"head_patience": 0.5, "request_patience": 0.5}


@dataclass
class Line:
    """A client that speaks to a server in bytes."""

    socket: socket.socket
    begun: float

    def send(self, data: bytes, *, at_most: float = 30.0, pause: float = PAUSE) -> None:
        """Byte by byte, until the server does not listen any more."""
        for byte in data:
            if time.monotonic() - self.begun > at_most:
                raise AssertionError("it listens for ever")
            try:
                self.socket.sendall(bytes([byte]))
            except OSError:
                return
            with contextlib.suppress(TimeoutError):
                self.socket.settimeout(pause)
                if self.socket.recv(1, socket.MSG_PEEK) is not None:
                    return
        self.socket.settimeout(30)

    def rest(self) -> bytes:
        """All that comes until the server closes."""
        self.socket.settimeout(30)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                said += piece
        return said

    def answer(self) -> bytes:
        """One error object with its head."""
        said = b""
        while not said.endswith(b"}}"):
            said += self.socket.recv(65536)
        return said

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


@contextlib.contextmanager
def line(rig: Rig, first: bytes = b"") -> Iterator[Line]:
    place = (rig.client.base_url.host, rig.client.base_url.port)
    with socket.create_connection(place, timeout=30) as opened:
        opened.sendall(first)
        yield Line(opened, time.monotonic())


def answer(said: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Status, headers and the error object of an answer."""
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines)
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers, json.loads(body)["error"]


def refused(rig: Rig, code: str) -> float:
    return rig.app.state.service.metrics.rejected.values.get((code,), 0)


def test_a_head_that_comes_byte_by_byte_has_its_time(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, live=True, **QUICK) as rig, line(rig) as slow:
        slow.send(b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 1000)
        status, headers, error = answer(slow.rest())
        assert (status, error["code"], headers["connection"]) == (408, "request_timeout", "close")
        assert 0.4 < slow.seconds < 10
        assert refused(rig, "request_timeout") == 1


@pytest.mark.parametrize("path", ["/v1/videos", "/nothing"])
def test_a_body_that_comes_byte_by_byte_has_its_time(tmp_path: Path, path: str) -> None:
    """Also one that no route reads: the answer is there at once, and the rest still comes."""
    with serving(tmp_path, working=False, live=True, **QUICK) as rig:
        head = (HEAD % 100_000).replace(b"/v1/videos", path.encode())
        with line(rig, head) as slow:
            if path == "/nothing":
                assert slow.answer().startswith(b"HTTP/1.1 404")
                until(lambda: _closed_after_a_byte(slow), bool, 20)
            else:
                slow.send(b'{"prompt": "' + b"a" * 1000)
                status, headers, error = answer(slow.rest())
                assert (status, error["code"]) == (408, "request_timeout")
                assert headers["x-request-id"].startswith("req_")
                until(lambda: refused(rig, "request_timeout"), lambda number: number == 1, connections.LINGER / 2)
            assert 0.4 < slow.seconds < 10
        assert rig.client.get("/v1/queue").json()["queued"] == 0


def _closed_after_a_byte(slow: Line) -> bool:
    try:
        slow.socket.sendall(b"a")
        slow.socket.settimeout(PAUSE)
        assert slow.socket.recv(1) == b"", "a second answer to one request"
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_the_next_request_of_a_connection_has_its_time_too(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, live=True, **QUICK) as rig, line(rig, LOOK) as slow:
        assert slow.socket.recv(65536).startswith(b"HTTP/1.1 200")
        slow.send(LOOK[:-2] + b"x: " + b"a" * 1000)
        assert answer(slow.rest())[0] == 408


def test_a_silent_connection_is_closed_without_a_word(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, live=True, **QUICK) as rig, line(rig) as silent:
        assert silent.rest() == b""
        assert 0.4 < silent.seconds < 10


def test_a_body_that_comes_fast_enough_comes_through(tmp_path: Path) -> None:
    """What has come wins time for the rest: no upload is too long for a line that is slow but not too slow."""
    body = b'{"prompt": "a red ball", "unknown": "' + b"a" * 40 + b'"}'
    with serving(tmp_path, working=False, live=True, **QUICK, slowest=10) as rig, line(rig, HEAD % len(body)) as slow:
        slow.send(body, pause=0.03)
        assert answer(slow.answer())[2]["code"] == "unknown_parameter"
        assert slow.seconds > 1.0


def test_downloads_and_event_streams_have_all_the_time(tmp_path: Path) -> None:
    """Long after every deadline a film that is read slowly still comes, and a film's end is still told."""
    with serving(tmp_path, live=True, **QUICK) as rig:
        long = rig.store.put(b"film " * 2_000_000, "video", "video/mp4")
        film = rig.film()["id"]
        rig.store.path(rig.jobs.get(film, None).outputs[0].id).write_bytes(rig.store.path(long.id).read_bytes())  # type: ignore[union-attr]
        rig.worker.held.set()
        watched = rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"]
        get = b"GET /v1/videos/%s/%s HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
        with (
            line(rig, get % (film.encode(), b"content")) as download,
            line(rig, get % (watched.encode(), b"events")) as stream,
        ):
            assert download.socket.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(1.5)
            rig.worker.held.clear()
            assert b"video.completed" in stream.rest()
            assert len(download.rest()) > 9_999_000


def test_an_answer_that_nobody_reads_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path, live=True, unread_patience=0.5) as rig:
        film = rig.film()["id"]
        with open(rig.store.path(rig.jobs.get(film, None).outputs[0].id), "wb") as file:  # type: ignore[union-attr, arg-type]
            file.truncate(200 * 2**20)
        with line(rig, b"GET /v1/videos/%s/content HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % film.encode()) as stalled:
            time.sleep(1.5)
            assert len(stalled.rest()) < 150 * 2**20


def test_more_connections_than_may_are_told_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, live=True, connections=3) as rig, contextlib.ExitStack() as opened:
        rig.client.close()
        lines = [opened.enter_context(line(rig, LOOK[:-2])) for _ in range(3)]
        for first in (b"", LOOK):  # before a word is said, and to a whole request
            with line(rig, first) as late:
                status, headers, error = answer(late.rest())
                assert (status, error["code"], headers["x-should-retry"]) == (503, "too_many_connections", "true")
                assert 1 <= int(headers["retry-after"]) <= 60
        for old in lines:  # whoever is in stays in
            old.socket.sendall(b"connection: close\r\n\r\n")
            assert old.rest().startswith(b"HTTP/1.1 200")
        with line(rig, LOOK) as next_one:
            assert next_one.socket.recv(65536).startswith(b"HTTP/1.1 200")
        assert refused(rig, "too_many_connections") == 2


def test_crowds_that_are_turned_away_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_LINGERING", 2)
    with serving(tmp_path, working=False, live=True, connections=1) as rig, contextlib.ExitStack() as opened:
        rig.client.close()
        opened.enter_context(line(rig, LOOK[:-2]))
        crowd = [opened.enter_context(line(rig)) for _ in range(8)]
        for late in crowd:
            assert answer(late.rest())[0] == 503
        time.sleep(connections.LINGER + 0.5)
        for late in crowd:  # nobody is listened to any more
            with pytest.raises(OSError):  # noqa: PT012  the first byte is how one finds out
                for _ in range(20):
                    late.socket.sendall(b"a")
                    time.sleep(PAUSE)


def test_connections_leave_room_for_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for soft, hard, wanted, room in [
        (20_000, 20_000, 2000, 2000),
        (1024, 20_000, 2000, 2000),
        (1024, 1024, 2000, 1024 - SPARE_FILES),
        (100, 100, 2000, 1),
        (1024, resource.RLIM_INFINITY, 2000, 2000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, 2000),
    ]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft, hard=hard: (soft, hard))
        assert room_for(wanted) == room
    assert set_to == [
        (2000 + SPARE_FILES, 20_000),
        (1024, 1024),
        (100, 100),
        (2000 + SPARE_FILES, resource.RLIM_INFINITY),
    ]
