"""Requests to a running `tubelet serve`: idle, while its worker renders, and with ten thousand films waiting."""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.clip import PROMPT, _system
from benchmarks.timing import Figure, Settings
from tubelet.serve.jobs import Jobs

CLIENTS, BURST, WAITING = 4, 100, 10_000
BODY = {"prompt": PROMPT, "model": "sora-2"}
LONG = {"prompt": PROMPT, "seconds": "20", "steps": 50}
"""A film that keeps the worker busy."""


def serving(settings: Settings) -> Iterator[Figure]:
    """Requests a second and their 99th percentile, by the wall clock; clients and server share the machine."""
    with tempfile.TemporaryDirectory() as folder:
        place, peer = _system(Path(folder))
        with _served(place, Path(folder)) as server:
            jobs = Jobs.open(f"sqlite:///{folder}/tubelet.db")
            jobs.pause(True)
            film, _ = jobs.create({})
            jobs.cancel(film.id, None)
            yield from _stage("idle", server, jobs, film.id, settings, "an idle server")
            for _ in range(20):
                server.post(LONG)
            jobs.pause(False)
            while not jobs.counts()["in_progress"]:
                time.sleep(0.05)
            yield from _stage("rendering", server, jobs, film.id, settings, f"while a worker renders with {peer}")
            last = film
            pattern = jobs.page(None, limit=1).jobs[0].request
            for _ in range(WAITING):
                last, _ = jobs.create(pattern)
            yield from _stage(
                str(WAITING), server, jobs, last.id, settings, f"the same, {WAITING} films waiting, get of the last"
            )
            assert jobs.counts()["in_progress"], "the worker had nothing to do: the figures are of an idle server"
            jobs.close()


class _Server:
    """Where it listens, and how to ask it."""

    def __init__(self, host: str) -> None:
        self.host = host

    def connection(self) -> http.client.HTTPConnection:
        """One that is kept alive."""
        return http.client.HTTPConnection(self.host, timeout=60)

    def post(self, body: dict[str, object]) -> None:
        """Ask for a film."""
        _ask(self.connection(), "POST", "/v1/videos", body)


@contextlib.contextmanager
def _served(system: Path, data: Path) -> Iterator[_Server]:
    """A server that is ready, with its worker."""
    options = ["--system", str(system), "--data", str(data), "--port", "0", "--cap", str(10 * WAITING)]
    command = [sys.executable, "-m", "tubelet", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            server = _Server(process.stdout.readline().split(" at http://")[1].split(",")[0])
            ready = server.connection()
            while _ask(ready, "GET", "/readyz", fine=(200, 503)) != 200:
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()


def _stage(name: str, server: _Server, jobs: Jobs, film: str, settings: Settings, how: str) -> Iterator[Figure]:
    calls: dict[str, tuple[str, str, dict[str, object] | None]] = {
        "create": ("POST", "/v1/videos", dict(BODY)),
        "get": ("GET", f"/v1/videos/{film}", None),
        "list": ("GET", "/v1/videos?limit=20", None),
        "nothing": ("GET", "/healthz", None),
    }
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    spans: dict[str, list[float]] = {call: [] for call in calls}
    for turn in range(settings.repeats + 1):
        for call, (method, path, body) in calls.items():
            before = jobs.page(None, limit=1).jobs[0].created_at
            span, took = _burst(server, lambda line, m=method, p=path, b=body: _ask(line, m, p, b))
            if turn:  # the first one warms up
                spans[call].append(span)
                seconds[call] += took
            for job in jobs.page(None, limit=BURST).jobs if call == "create" else ():
                if job.created_at > before:
                    jobs.delete(job.id, None)  # so that no turn finds a longer queue
    for call in calls:
        what = "an answer that needs no database" if call == "nothing" else how
        yield Figure(f"serving/{name}/{call}/rate", BURST / statistics.median(spans[call]), "requests/s", what)
        worst = sorted(seconds[call])[int(0.99 * len(seconds[call]))]
        yield Figure(f"serving/{name}/{call}/p99", 1e3 * worst, "ms", f"{CLIENTS} clients, {len(seconds[call])} requests")


def _burst(server: _Server, call: Callable[[http.client.HTTPConnection], object]) -> tuple[float, list[float]]:
    """`BURST` requests by `CLIENTS` clients: the seconds of all, and of each."""
    took: list[float] = []

    def client() -> None:
        line = server.connection()
        for _ in range(BURST // CLIENTS):
            begin = time.perf_counter()
            call(line)
            took.append(time.perf_counter() - begin)
        line.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == BURST, "a request failed"
    return time.perf_counter() - begin, took


def _ask(
    line: http.client.HTTPConnection,
    method: str,
    path: str,
    body: dict[str, object] | None = None,
    fine: tuple[int, ...] = (200,),
) -> int:
    line.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    answer = line.getresponse()
    said = answer.read()
    assert answer.status in fine, said[:200]
    return answer.status
