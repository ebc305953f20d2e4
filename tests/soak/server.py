"""A whole `tubelet serve` with a worker: too many creators, a long queue, hostile files, clients that stall, hours of work."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import older
from test_serve_intake import HOSTILE
from test_serve_whole import Server, until
from tests.soak.figures import Figure, Settings, Skipped, at_most, exactly, percentile
from tiny_system import save_tiny

MIB = 2**20
SAMPLES = 200
"""Of memory, during the watch for leaks."""
LEAST = 6
"""Samples that are taken however slow the machine is: a slope needs some."""
HEADS = 20.0
"""Seconds that the server gives the head of a request."""
POLLS = 0.02
"""Seconds between two polls of a bystander."""


def overload(settings: Settings) -> Iterator[Figure]:
    """Many creators at once before a small queue, while a bystander polls (R5)."""
    with served(settings, "overload", "--cap", str(settings.cap)) as server:
        server.http.post("/v1/queue", json={"paused": True}).raise_for_status()
        watched = server.ask()
        before = memory(server.process.pid)
        # A process of their own: the bystander would wait for them, not for the server, in one with a thousand clients.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as crowd:
            crowd.submit(os.getpid).result()
            with _polling(server, f"/v1/videos/{watched}") as polls:
                took, answers = crowd.submit(_create_at_once, server.http.base_url.port, settings.creates).result()
        said = Counter(code for code, _ in answers)
        waits = [wait for code, wait in answers if code == 429]
        queued = server.http.get("/v1/queue").json()["queued"]
        yield Figure("creates", settings.creates, f"at once, {took:.1f} s, client on the same machine")
        yield exactly("accepted", said[200], min(settings.creates, settings.cap - 1), f"into a queue of {settings.cap} with 1")
        yield exactly("queued", queued, min(settings.creates + 1, settings.cap))
        yield exactly("other", settings.creates - said[200] - said[429], 0, f"neither 200 nor 429 ({dict(said)})")
        unsaid = sum(not 1 <= wait <= 60 for wait in waits)
        yield exactly("retry_after", unsaid, 0, f"answers 429 without 1 to 60 s, these say {sorted(set(waits))}")
        yield from _polled("get", polls, 0.5)
        yield at_most("memory", (memory(server.process.pid) - before) / MIB, 200, "MiB more")


def queue(settings: Settings) -> Iterator[Figure]:
    """A long queue: how soon the server is ready after a kill, and what each request takes (R4, R5)."""
    folder = settings.folder / "queue"
    folder.mkdir()
    older.write_schema_1(f"sqlite:///{folder / 'tubelet.db'}", settings.queued)
    with served(settings, "queue", "--cap", str(10 * settings.queued + 1000)) as server:
        yield Figure("queued", server.http.get("/v1/queue").json()["queued"], "jobs, in a store of the version before")
        server.http.post("/v1/queue", json={"paused": True}).raise_for_status()
        for name, call in _requests(server).items():
            seconds = [_timed(call) for _ in range(100)]
            p50, p99 = percentile(seconds, 0.5), percentile(seconds, 0.99)
            yield at_most(name, 1e3 * p99, 500, f"ms p99, {1e3 * p50:.1f} ms p50")
        begin = time.monotonic()
        seen = list(_every(server))
        yield exactly("walk", len(seen) - len(set(seen)), 0, f"of {len(seen)} seen twice, in pages of 100, {_since(begin)}")
        server.process.kill()
        server.process.wait()
    begin = time.monotonic()
    with served(settings, "queue") as server:
        until(lambda: server.http.get("/healthz").status_code == 200)
        answered = time.monotonic() - begin
        until(lambda: server.http.get("/readyz").status_code == 200)
        yield at_most("answers", answered, 5, "s from the start after kill -9 to the first answer, imports included")
        yield at_most("ready", time.monotonic() - begin, 5, "s to a worker of its own with its system loaded")
        server.http.post("/v1/queue", json={"paused": False}).raise_for_status()
        begin = time.monotonic()
        until(lambda: server.events("started"))
        yield Figure("first", time.monotonic() - begin, "s until a worker has claimed the first one")


def media(settings: Settings) -> Iterator[Figure]:
    """Every hostile file to every door that takes one (R9, S4)."""
    with served(settings, "media") as server:
        before, files = memory(server.process.pid), descriptors(server.process.pid)
        slowest, accepted = 0.0, []
        for name, (make, _) in HOSTILE.items():
            data = make()
            for path, field in (("/v1/videos", "input_reference"), ("/v1/videos/edits", "video")):
                begin = time.monotonic()
                answer = server.http.post(path, data={"prompt": "p"}, files={field: ("film.mp4", io.BytesIO(data))})
                slowest = max(slowest, time.monotonic() - begin)
                if answer.status_code not in (400, 413) or not answer.json()["error"]["code"]:
                    accepted.append(f"{name}: {answer.status_code}")
        yield Figure("files", len(HOSTILE), "at two doors")
        yield exactly("accepted", len(accepted), 0, f"not refused: {accepted[:3]}" if accepted else "not refused")
        yield at_most("slowest", slowest, 20, "s, the decoder's limit")
        yield at_most("memory", (memory(server.process.pid) - before) / MIB, 50, "MiB more")
        yield at_most("descriptors", descriptors(server.process.pid) - files, 2, "more")


def stalls(settings: Settings) -> Iterator[Figure]:
    """Uploads that stop in the middle, downloads that nobody reads, heads of a byte a second, while a bystander polls (R9)."""
    with served(settings, "stalls") as server, contextlib.ExitStack() as opened:
        place = (server.http.base_url.host, server.http.base_url.port)
        watched = server.ask()
        until(lambda: server.video(watched)["status"] == "completed")
        half = "content-type: application/json\r\ncontent-length: 5000\r\n\r\n{"
        slow: list[socket.socket] = []
        for number in range(3 * settings.stalled):
            line = opened.enter_context(socket.create_connection(place, timeout=60))
            head = f"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\n{half}"
            if number % 3 == 1:
                head = f"GET /v1/videos/{watched}/content HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
            elif number % 3 == 2:
                head = "GET /v1/videos HTTP/1.1\r\nx: "
                slow.append(line)
            line.sendall(head.encode())
        begin = time.monotonic()
        with _polling(server, f"/v1/videos/{watched}") as polls:
            while slow and time.monotonic() - begin < 2 * HEADS:
                time.sleep(1)
                slow = [line for line in slow if _byte_sent(line)]
        yield Figure("stalled", settings.stalled, "uploads, downloads that nobody reads, and heads of a byte a second, each")
        yield exactly("heads", len(slow), 0, f"still listened to after {time.monotonic() - begin:.0f} s")
        yield from _polled("get", polls, 1.0)


def _byte_sent(line: socket.socket) -> bool:
    """Whether the other side still takes what comes."""
    try:
        line.sendall(b"a")
    except OSError:
        return False
    return True


def cancels(settings: Settings) -> Iterator[Figure]:
    """Running films that are cancelled at random moments (R10)."""
    with served(settings, "cancels") as server:
        chance, seconds = random.Random(7), []
        for number in range(settings.cancels):
            id = server.ask(seconds="20", steps=400, seed=number)
            until(lambda id=id: server.video(id)["status"] == "in_progress")
            time.sleep(chance.uniform(0, 1))
            begin = time.monotonic()
            server.http.post(f"/v1/videos/{id}/cancel").raise_for_status()
            until(lambda id=id: server.video(id)["status"] == "failed")
            seconds.append(time.monotonic() - begin)
        yield at_most("slowest", max(seconds), 2.5, f"s of {len(seconds)}, p50 {percentile(seconds, 0.5):.2f} s")
        journals = settings.folder / "cancels" / "journals"
        begin = time.monotonic()
        while left := len(list(journals.iterdir())) if journals.exists() else 0:
            if time.monotonic() - begin > 10:  # the last one goes a moment after its job has failed
                break
            time.sleep(0.1)
        yield exactly("journals", left, 0, "left behind")
        yield exactly("starts", len(server.events("worker started")), 1, "of the worker")


def restarts(settings: Settings) -> Iterator[Figure]:
    """A server that is stopped and started again and again while clients make and look at films (R6)."""
    chance, made, said = random.Random(6), list[str](), Counter[str]()
    codes, seconds = Counter[int](), list[float]()
    for _ in range(settings.restarts):
        with served(settings, "restarts", "--cap", "100000") as server, _crowd(server, made, said):
            time.sleep(chance.uniform(0.2, 1.0))
            begin = time.monotonic()
            codes[server.end(signal.SIGTERM)] += 1
            seconds.append(time.monotonic() - begin)
    with served(settings, "restarts") as server:
        lost = [id for id in made if server.http.get(f"/v1/videos/{id}").status_code != 200]
        kept = set(_every(server))
    yield Figure("restarts", settings.restarts, f"{len(made)} films acknowledged, answers {dict(said)}")
    yield exactly("lost", len(lost) + len(set(made) - kept), 0, "of these, asked for one by one and in the list")
    wrong = sum(count for answer, count in said.items() if answer not in ("200", "429", "503", "away"))
    yield exactly("errors", wrong, 0, "other than 429 and 503 and a server that is away")
    yield exactly("codes", sum(count for code, count in codes.items() if code != 0), 0, f"not 0 ({dict(codes)})")
    yield at_most("slowest", max(seconds), 35, f"s to the end, p50 {percentile(seconds, 0.5):.1f} s")


WISHES = (
    {"seconds": "4", "steps": 30},
    {"seconds": "8", "steps": 30},
    {"seconds": "4", "size": "640x480"},
    {"seconds": "8", "size": "320x240", "steps": 15},
)
"""Films of different lengths, sizes and steps, each a second of work or more: of less nobody looks at the estimate."""


def estimates(settings: Settings) -> Iterator[Figure]:
    """How far off the told end of a film is, from its place in the queue to its end (R11).

    `alone`: film after film of several kinds on an idle server; `equal`, `mixed`: in a queue, of one kind and of several.
    """
    with served(settings, "estimates") as server:
        for _ in range(1 + settings.estimated // 10):  # so that the server knows its pace
            for wish in WISHES:
                _estimated(server, [server.ask(**wish)])
        number = itertools.count()
        alone = [_estimated(server, [server.ask(seed=next(number), **wish)]) for wish in WISHES * (settings.estimated // 4 + 1)]
        several = {
            "alone": list(itertools.chain(*alone)),
            "equal": _estimated(server, [server.ask(seed=next(number), **WISHES[0]) for _ in range(settings.estimated)]),
            "mixed": _estimated(server, [server.ask(seed=place, **WISHES[place % 4]) for place in range(settings.estimated)]),
        }
        for name, errors in several.items():
            yield Figure(f"{name}/told", len(errors), "times")
            if errors:
                yield at_most(
                    f"{name}/p50", 100 * percentile(errors, 0.5), 20, f"% off, p90 {100 * percentile(errors, 0.9):.0f}"
                )


def _estimated(server: Server, ids: list[str]) -> list[float]:
    """How far off each told end of these films was, in parts of the time that was left. Nearer than .5 s nobody looks."""
    told: dict[str, list[tuple[float, float]]] = {id: [] for id in ids}
    ended: dict[str, float] = {}
    while len(ended) < len(ids):
        for video in server.http.get("/v1/videos", params={"limit": 100}).json()["data"]:
            now = time.monotonic()
            if video["id"] not in told or video["id"] in ended:
                continue
            if video["status"] == "completed":
                ended[video["id"]] = now
            elif video.get("eta_ms") is not None:
                told[video["id"]].append((now, video["eta_ms"] / 1e3))
        time.sleep(0.25)  # who asks oftener slows what is measured
    return [abs(now + left - ended[id]) / (ended[id] - now) for id in ids for now, left in told[id] if ended[id] - now > 0.5]


def paging(settings: Settings) -> Iterator[Figure]:
    """A list that is read page by page, in both orders, while films come and go (R12)."""
    with served(settings, "paging", "--cap", str(10**6)) as server:
        server.http.post("/v1/queue", json={"paused": True}).raise_for_status()
        there = [server.ask() for _ in range(settings.paged)]
        came, went, walks, twice, missing, seen_in_all = 0, 0, 0, 0, 0, 0
        for order in ("desc", "asc"):
            over, made, gone = threading.Event(), list[str](), set[str]()
            with _changing(server, there, made, gone, settings.paged // 2, over):
                while not over.is_set() or not walks:
                    before = set(there) | set(made)
                    seen = list(_every(server, limit=20, order=order))
                    stayed = before - gone
                    walks, twice = walks + 1, twice + len(seen) - len(set(seen))
                    missing, seen_in_all = missing + len(stayed - set(seen)), seen_in_all + len(stayed)
            there = [id for id in [*there, *made] if id not in gone]
            came, went = came + len(made), went + len(gone)
        yield Figure("changes", came + went, f"{came} films came and {went} went during {walks} walks in pages of 20")
        yield exactly("twice", twice, 0, "films seen twice in one walk")
        yield exactly("missing", missing, 0, f"of {seen_in_all} that were there all the time")


@contextlib.contextmanager
def _changing(
    server: Server, there: list[str], made: list[str], gone: set[str], number: int, over: threading.Event
) -> Iterator[None]:
    """So many films come and so many go meanwhile, old ones and new ones, at any place of the list."""
    chance = random.Random(12)

    def change() -> None:
        with httpx.Client(base_url=server.http.base_url, timeout=60) as client:
            for _ in range(number):
                body = {"prompt": "a red ball falls", "model": "tiny", "size": "64x48"}
                made.append(client.post("/v1/videos", json=body).raise_for_status().json()["id"])
                id = chance.choice([id for id in [*there, *made] if id not in gone])
                gone.add(id)  # before: a walk may or may not see it
                client.delete(f"/v1/videos/{id}").raise_for_status()
        over.set()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextlib.contextmanager
def _crowd(server: Server, made: list[str], said: Counter[str]) -> Iterator[None]:
    """Four clients that ask for films and look at those that there are; the ids that were acknowledged, and all answers."""
    over, lock = threading.Event(), threading.Lock()

    def one(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=server.http.base_url, timeout=60) as client:
            while not over.wait(0.1):
                known = chance.choice(made) if made and chance.random() < 0.5 else None
                try:
                    if known is None:
                        answer = client.post(
                            "/v1/videos", json={"prompt": "a red ball falls", "model": "tiny", "size": "64x48"}
                        )
                    else:
                        answer = client.get(f"/v1/videos/{known}")
                except httpx.TransportError:
                    with lock:
                        said["away"] += 1
                    continue
                with lock:
                    said[str(answer.status_code)] += 1
                    if known is None and answer.status_code == 200:
                        made.append(answer.json()["id"])

    crowd = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in crowd:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in crowd:
            thread.join()


def leaks(settings: Settings) -> Iterator[Figure]:
    """Films, refusals, lists, downloads, listeners and deletions for a long time (R15)."""
    if not Path("/proc/self/statm").exists():
        raise Skipped("memory is read from /proc")
    with served(settings, "leaks") as server:
        worker = server.events("worker started")[0]["pid"]
        watched = {"server": server.process.pid, "worker": worker}
        begin, every = time.monotonic(), 60 * settings.minutes / SAMPLES
        seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in watched}
        turns = 0
        while (now := time.monotonic() - begin) < 60 * settings.minutes or len(seen["server"]) < LEAST:
            _turn(server, turns)
            turns += 1
            if now >= every * len(seen["server"]):
                for name, pid in watched.items():
                    seen[name].append((now, memory(pid), descriptors(pid)))
        yield Figure("minutes", settings.minutes, f"{turns} films made, downloaded and deleted")
        yield exactly("starts", len(server.events("worker started")), 1, "of the worker")
        for name, samples in seen.items():
            settled = samples[len(samples) // 3 :]  # caches fill and pools open at the beginning
            slope, error = _slope([(second / 3600, held / MIB) for second, held, _ in settled])
            unit = f"MiB/h +- {error:.2f}, at {settled[-1][1] / MIB:.0f} MiB"
            if error < 0.5:
                yield at_most(f"{name}/slope", slope, 1.0, unit)
            else:
                yield Figure(f"{name}/slope", slope, f"{unit}: too short to judge")
            fewer, more = settled[: len(settled) // 2], settled[len(settled) // 2 :]
            grown = statistics.median(open for *_, open in more) - statistics.median(open for *_, open in fewer)
            yield at_most(f"{name}/descriptors", grown, 1, f"more, at {settled[-1][2]}")


def _turn(server: Server, number: int) -> None:
    """What a client does with a film, and some things that it ought not to do."""
    http = server.http
    id = server.ask(seconds="1", seed=number)
    assert http.post("/v1/videos", json={"prompt": ""}).status_code == 400
    bad = {"input_reference": ("x.png", io.BytesIO(b"\x89PNG\r\n\x1a\n" + bytes(100)))}
    assert http.post("/v1/videos", data={"prompt": "p"}, files=bad).status_code == 400
    with http.stream("GET", f"/v1/videos/{id}/events") as stream:
        for _ in stream.iter_lines():
            if number % 2:
                break  # some go away early
    video = until(lambda: (found := server.video(id))["status"] in ("completed", "failed") and found)
    assert video["status"] == "completed", video
    for variant in ("video", "thumbnail", "spritesheet"):
        assert http.get(f"/v1/videos/{id}/content", params={"variant": variant}).status_code == 200
    assert http.get("/v1/videos").json()["data"][0]["id"] == id
    assert http.get("/metrics").status_code == 200
    assert http.delete(f"/v1/videos/{id}").status_code == 200


def _requests(server: Server) -> dict[str, Callable[[], httpx.Response]]:
    """What clients do with a queue, by name."""
    http = server.http
    last = http.get("/v1/videos", params={"limit": 1}).json()["data"][0]["id"]
    return {
        "create": lambda: http.post("/v1/videos", json={"prompt": "a red ball falls", "model": "tiny"}),
        "get": lambda: http.get(f"/v1/videos/{last}"),
        "list": lambda: http.get("/v1/videos"),
        "list_100": lambda: http.get("/v1/videos", params={"limit": 100}),
        "queue": lambda: http.get("/v1/queue"),
    }


def _every(server: Server, **how: Any) -> Iterator[str]:
    """The ids of all films, page by page."""
    more: dict[str, Any] = {"limit": 100, **how}
    while True:
        page = server.http.get("/v1/videos", params=more).json()
        yield from (video["id"] for video in page["data"])
        if not page["has_more"]:
            return
        more["after"] = page["last_id"]


def _create_at_once(port: int, number: int) -> tuple[float, list[tuple[int, int]]]:
    """As many creates at one moment: the seconds until all are answered, and the status and Retry-After (or 0) of each.

    In plain bytes on connections that stand before, since a client with a pool sends no thousand of them within a second.
    """

    async def create(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], seed: int) -> tuple[int, int]:
        reader, writer = streams
        body = json.dumps({"prompt": "a red ball falls", "model": "tiny", "seed": seed}).encode()
        head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, *fields = (await reader.read()).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
        writer.close()
        return int(status.split()[1]), int(dict(field.split(": ", 1) for field in fields).get("retry-after", 0))

    async def creates() -> tuple[float, list[tuple[int, int]]]:
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
        begin = time.monotonic()
        answers = await asyncio.gather(*(create(streams, seed) for seed, streams in enumerate(crowd)))
        return time.monotonic() - begin, answers

    return asyncio.run(creates())


@contextlib.contextmanager
def served(settings: Settings, name: str, *options: str, module: str = "tubelet") -> Iterator[Server]:
    """A server with one worker of a tiny system, in the folder of this name; ready."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of this client
    system = settings.folder / "tiny"
    if not system.exists():
        save_tiny(system)
    server = Server(system, settings.folder / name, *options, module=module)
    try:
        until(lambda: server.http.get("/readyz").status_code == 200)
        yield server
        assert server.process.poll() is not None or server.end(signal.SIGTERM) == 0
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def _polling(server: Server, path: str) -> Iterator[list[float]]:
    """A bystander in a thread of its own: the seconds of each of its answers, once the block has ended."""
    seconds: list[float] = []
    over = threading.Event()

    def poll() -> None:
        with httpx.Client(base_url=server.http.base_url, timeout=60) as client:
            while not over.wait(POLLS):
                seconds.append(_timed(lambda: client.get(path)))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def _polled(name: str, seconds: list[float], most: float) -> Iterator[Figure]:
    p50 = 1e3 * percentile(seconds, 0.5)
    yield Figure(f"{name}/polls", len(seconds), f"meanwhile, p50 {p50:.0f} ms, the slowest {1e3 * max(seconds):.0f}")
    yield at_most(f"{name}/p99", percentile(seconds, 0.99), most, "s")


def _timed(call: Callable[[], httpx.Response]) -> float:
    begin = time.monotonic()
    call().raise_for_status()
    return time.monotonic() - begin


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"


def memory(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Files that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: the slope and its standard error."""
    times, values = [time for time, _ in points], [value for _, value in points]
    line = statistics.linear_regression(times, values)
    centre = statistics.fmean(times)
    spread = sum((time - centre) ** 2 for time in times)
    rest = sum((value - line.slope * time - line.intercept) ** 2 for time, value in points)
    return line.slope, (rest / max(1, len(points) - 2) / spread) ** 0.5
