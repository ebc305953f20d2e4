"""The supervisor keeps workers running: dead ones come again, hopeless ones are given up, silent ones are killed, all stop."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tubelet.core.errors import UserError
from tubelet.serve import supervisor as room
from tubelet.serve.jobs import Jobs
from tubelet.serve.journals import tidy
from tubelet.serve.records import StorageFull
from tubelet.serve.supervisor import Supervisor, listen

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(room, "LOOK", 0.01)
    monkeypatch.setattr(room, "FIRST_PAUSE", 0.001)
    caplog.set_level(logging.INFO, "tubelet.serve")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs.open(f"sqlite:///{tmp_path / 'tubelet.db'}")
    yield jobs
    jobs.close()


def program(text: str) -> Callable[[str], Sequence[str]]:
    """The command of a worker that is a line of Python; `name` is what it is called."""
    return lambda name: [sys.executable, "-S", "-c", f"import os, signal, time; name = {name!r}; {text}"]


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def supervised(supervisor: Supervisor) -> Iterator[Supervisor]:
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.stop(grace=PATIENCE)


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(record.message) for record in caplog.records if record.name == "tubelet.serve"]
    return [line for line in lines if line["event"] == event]


def test_a_worker_that_was_killed_is_started_again_under_another_name(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with supervised(Supervisor([program("time.sleep(60)")], jobs, tmp_path)) as supervisor:
        (seat,) = supervisor.seats
        names: list[str] = []
        for _ in range(room.TRIES + 1):  # one that was ready may die as often as it likes
            until(lambda: seat.process is not None and seat.name not in names)
            names.append(seat.name)
            jobs.hello(seat.name, {})
            until(lambda: seat.ready)
            os.kill(said(caplog, "worker started")[-1]["pid"], signal.SIGKILL)
        until(lambda: seat.process is not None and seat.name not in names)
    assert len(set(names)) == room.TRIES + 1
    assert [line["code"] for line in said(caplog, "worker ended")] == [-signal.SIGKILL] * (room.TRIES + 1)


def test_a_worker_that_never_gets_ready_is_given_up(jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[bool] = []
    supervisor = Supervisor([program("os._exit(7)")], jobs, tmp_path, gave_up=lambda: ended.append(True))
    with supervised(supervisor):
        until(lambda: ended)
    assert supervisor.failed
    assert len(said(caplog, "worker started")) == room.TRIES
    assert [line["code"] for line in said(caplog, "worker given up")] == [7]
    pauses = [line["again_in"] for line in said(caplog, "worker ended")]
    assert pauses == [0.002, 0.004, 0.008, 0.016], "later each time"


def test_a_worker_that_was_told_nonsense_is_given_up_at_once(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[bool] = []
    with supervised(Supervisor([program("os._exit(2)")], jobs, tmp_path, gave_up=lambda: ended.append(True))):
        until(lambda: ended)
    assert len(said(caplog, "worker started")) == 1


def test_one_that_can_work_is_enough(jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[bool] = []
    commands = [program("os._exit(2)"), program("time.sleep(60)")]
    with supervised(Supervisor(commands, jobs, tmp_path, gave_up=lambda: ended.append(True))) as supervisor:
        until(lambda: said(caplog, "worker given up"))
        until(lambda: supervisor.seats[1].process is not None)
        time.sleep(0.05)
        assert supervisor.seats[1].process.poll() is None  # type: ignore[union-attr]
    assert not ended
    assert not supervisor.failed


def test_a_worker_that_falls_silent_is_killed(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SILENT", 0.2)
    with supervised(Supervisor([program("time.sleep(60)")], jobs, tmp_path)) as supervisor:
        (seat,) = supervisor.seats
        until(lambda: seat.process is not None)
        first, begin = seat.name, time.monotonic()
        while time.monotonic() - begin < 0.5:
            jobs.hello(first, {})
            time.sleep(0.01)
        assert seat.name == first, "it spoke"
        until(lambda: seat.name != first)
    assert [line["worker"] for line in said(caplog, "worker silent")][:1] == [first]


def test_what_cannot_be_heard_is_not_silence(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SILENT", 0.2)
    workers, asked = jobs.workers, [0]

    def deaf() -> Any:
        asked[0] += 1
        raise StorageFull

    with supervised(Supervisor([program("time.sleep(60)")], jobs, tmp_path)) as supervisor:
        (seat,) = supervisor.seats
        until(lambda: seat.process is not None)
        jobs.hello(seat.name, {})
        until(lambda: seat.ready)
        monkeypatch.setattr(jobs, "workers", deaf)
        until(lambda: asked[0] > 40)
        monkeypatch.setattr(jobs, "workers", workers)
        assert not said(caplog, "worker silent")


def test_all_workers_are_asked_to_stop_and_the_deaf_are_killed(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready = "open(name, 'w').close(); time.sleep(60)"
    polite = f"signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); os.chdir({str(tmp_path)!r}); {ready}"
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); os.chdir({str(tmp_path)!r}); {ready}"
    supervisor = Supervisor([program(polite), program(deaf)], jobs, tmp_path)
    supervisor.start()
    until(lambda: all(seat.name and (tmp_path / seat.name).exists() for seat in supervisor.seats))
    supervisor.stop(grace=0.3)
    codes = [seat.process.returncode for seat in supervisor.seats if seat.process is not None]
    assert codes == [0, -signal.SIGKILL]
    assert [line["worker"] for line in said(caplog, "worker killed")] == [supervisor.seats[1].name]
    assert not said(caplog, "worker ended"), "nobody died who was not asked to go"


def test_a_watch_that_is_behind_looks_at_no_worker_that_was_asked_to_stop(
    jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor([program("time.sleep(60)")], jobs, tmp_path)
    workers, inside, go = jobs.workers, threading.Event(), threading.Event()

    def slow() -> Any:
        if supervisor.seats[0].process is not None:
            inside.set()
            go.wait(PATIENCE)
        return workers()

    monkeypatch.setattr(jobs, "workers", slow)
    supervisor.start()
    assert inside.wait(PATIENCE)
    supervisor.drain()
    process = supervisor.seats[0].process
    assert process is not None
    process.wait(PATIENCE)
    go.set()
    supervisor.stop()
    assert supervisor.seats[0].process is process
    assert not said(caplog, "worker ended")


def test_only_journals_of_jobs_to_be_made_stay(jobs: Jobs, tmp_path: Path) -> None:
    kept, ended, running = (jobs.create({"task": "create"})[0] for _ in range(3))
    jobs.cancel(ended.id, None)
    jobs.move(running.id, None, 1)
    claim = jobs.claim("somebody")
    assert claim is not None
    assert claim.job.id == running.id
    journals = tmp_path / "journals"
    for name in (kept.id, ended.id, running.id, "video_of_nobody"):
        (journals / name / "answers").mkdir(parents=True)
        (journals / name / "answers" / "000000.safetensors").touch()
    assert tidy(journals, jobs) == 2
    assert {path.name for path in journals.iterdir()} == {kept.id, running.id}
    assert tidy(tmp_path / "nowhere", jobs) == 0


def test_journals_are_tidied_while_all_runs(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "journals" / "video_of_nobody").mkdir(parents=True)
    with supervised(Supervisor([program("time.sleep(60)")], jobs, tmp_path)):
        until(lambda: not any((tmp_path / "journals").iterdir()))


def test_a_taken_port_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port, "free again at once"


@pytest.mark.parametrize(("host", "port"), [("nowhere.invalid", 0), ("127.0.0.1", 70000), ("127.0.0.1", -1), ("192.0.2.1", 0)])
def test_a_place_that_is_not_here_is_one_sentence(host: str, port: int) -> None:
    with pytest.raises(UserError, match=r"correct --"):
        listen(host, port)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_it_listens_on_ipv6_too() -> None:
    try:
        listener = listen("::1", 0)
    except UserError:
        pytest.skip("this machine has no IPv6 loopback")
    with listener:
        assert room._address(listener).startswith("http://[::1]:")
