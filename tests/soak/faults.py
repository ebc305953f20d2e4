"""Workers that run out of memory, hang, are killed or lose their device, and a server that is killed while it tells others."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import film_deaths
import openai
from test_serve_whole import Server, until
from tests.soak import faulty
from tests.soak.figures import Figure, Settings, exactly, percentile
from tests.soak.server import served
from tiny_system import save_tiny

WAYS = {
    "memory,1": (1, "completed"),
    "memory": (1, "out_of_memory"),
    "hang,1": (2, "completed"),
    "hang": (3, "worker_crashed"),
    "device,1": (2, "completed"),
    "poison": (3, "worker_crashed"),
}
"""What breaks, in how many attempts, and how it ends."""


def faults(settings: Settings) -> Iterator[Figure]:
    """Films that break what makes them, each with a sound one behind it (R8)."""
    with served(settings, "faults", module=faulty.MODULE) as server:
        for fault, (tries, end) in WAYS.items():
            name, attempts, ends, over, next_one = fault.replace(",1", " once"), list[int](), Counter[str](), [0.0], [0.0]
            behind = Counter[str]()
            for number in range(settings.faults):
                bad = server.ask(prompt=f"a red ball falls FAULT={fault}", seed=number)
                sound = server.ask(seed=number)
                video = until(lambda bad=bad: (v := server.video(bad))["status"] in ("completed", "failed") and v)
                done = until(lambda sound=sound: (v := server.video(sound))["status"] in ("completed", "failed") and v)
                begun = [line["at"] for line in server.events("started") if line["job"] == bad]
                first = min(line["at"] for line in server.events("started") if line["job"] == sound)
                attempts.append(len(begun))
                ends[video["status"] if video["error"] is None else video["error"]["code"]] += 1
                behind[done["status"]] += 1
                over.append(video["completed_at"] - begun[0])
                next_one.append(first - begun[0])
            unit = f"attempts of each of {settings.faults}: {dict(ends)}, told after {max(over):.1f} s at most"
            yield Figure(name, max(attempts), unit, f"= {tries}", set(attempts) == {tries} and set(ends) == {end})
            # A hung worker is noticed after its patience; a new one has to be started, and to import torch.
            patience = f", {faulty.PATIENCE:g} of them patience" if fault.startswith("hang") else ""
            yield Figure(f"{name}/next", max(next_one), f"s at most until the film behind was begun{patience}")
            yield exactly(f"{name}/behind", behind["completed"], settings.faults, "films behind that were made")
        again = len(server.events("once more, with less memory"))
        yield exactly("memory/again", again, 2 * settings.faults, "tries with less memory")
        yield Figure("starts", len(server.events("worker started")), "of the worker")


class Receiver:
    """A place for webhooks that fails half of the time, at most twice for a message: an error, a redirect, or no answer."""

    def __init__(self) -> None:
        self.got: list[tuple[float, int, str, bytes]] = []
        self.secret, self.disbelieved = "", 0
        client = openai.OpenAI(api_key="x", base_url="http://127.0.0.1:1")
        chance, lock, failed, receiver = random.Random(13), threading.Lock(), Counter[str](), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                name = self.headers["webhook-id"]
                try:  # now, for old messages are believed by nobody
                    headers = {key.lower(): value for key, value in self.headers.items()}
                    client.webhooks.unwrap(body, headers, secret=receiver.secret)
                except (openai.InvalidWebhookSignatureError, ValueError):
                    receiver.disbelieved += 1
                with lock:
                    status = chance.choice((200, 200, 200, 200, 500, 503, 302, 0)) if failed[name] < 2 else 200
                    failed[name] += status != 200
                    receiver.got.append((time.time(), status, name, body))
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def hooks(settings: Settings) -> Iterator[Figure]:
    """Films whose end is told to a receiver that fails half of the time, by a server that is killed again and again (R13)."""
    receiver, chance = Receiver(), random.Random(14)
    ids, ends = list[str](), dict[str, float]()
    each = -(-settings.hooked // max(1, settings.killed))
    with contextlib.ExitStack() as opened:
        opened.callback(receiver.server.server_close)
        opened.callback(receiver.server.shutdown)
        for turn in range(settings.killed + 1):
            with served(settings, "hooks", module=faulty.MODULE) as server:
                if not receiver.secret:
                    wish = {"name": "soak", "url": receiver.url, "event_types": ["video.completed", "video.failed"]}
                    made = server.http.post("/v1/webhook_endpoints", json=wish).raise_for_status().json()
                    receiver.secret = made["signing_secret"]
                if turn < settings.killed:
                    ids += [server.ask(seconds="1", seed=len(ids) + n) for n in range(min(each, settings.hooked - len(ids)))]
                    last = ids[-1]
                    until(lambda last=last, server=server: server.video(last)["status"] in ("in_progress", "completed"))
                    time.sleep(chance.uniform(0, 3))
                    server.process.send_signal(signal.SIGKILL)
                    server.process.wait()
                    continue
                for id in ids:
                    ends[id] = until(lambda id=id, server=server: _ended(server, id))
                until(lambda server=server: len(_told(receiver)) == settings.hooked and _delivered(server))
    yield from _said(receiver, ids, ends, settings)


def renders(settings: Settings) -> Iterator[Figure]:
    """Films whose makers are killed at random answers of the denoiser, and which others go on with (R4)."""
    system, place = save_tiny(settings.folder / "tiny"), settings.folder / "renders"
    place.mkdir()
    films = film_deaths.killed(place, system, settings.cuts, 60 + 10 * settings.cuts)
    kinds, cuts = dict(Counter(film["kind"] for film in films)), sum(len(film["kills"]) for film in films)
    yield exactly(
        "kills", cuts, settings.cuts, f"at random answers of the denoiser, of the makers of {len(films)} films: {kinds}"
    )
    other = [film for film in films if not film["same"]]
    yield exactly("other", len(other), 0, f"films with other bytes than without a kill{f': {other[:3]}' if other else ''}")
    yield exactly("again", sum(film["again"] for film in films), 0, "answers computed again that had been noted")


def _ended(server: Server, id: str) -> float:
    video = server.video(id)
    return float(video["completed_at"] or 0) if video["status"] in ("completed", "failed") else 0.0


def _delivered(server: Server) -> bool:
    """Whether the outbox is empty: nothing more comes."""
    from tubelet.serve.jobs import Jobs

    data = server.data
    jobs = Jobs.open(f"sqlite:///{data / 'tubelet.db'}")
    try:
        return not jobs.all("outbox", None)
    finally:
        jobs.close()


def _told(receiver: Receiver) -> dict[str, float]:
    """When each film's end was first taken."""
    told: dict[str, float] = {}
    for at, status, _, body in list(receiver.got):
        if status == 200:
            told.setdefault(json.loads(body)["data"]["id"], at)
    return told


def _said(receiver: Receiver, ids: list[str], ends: dict[str, float], settings: Settings) -> Iterator[Figure]:
    names, taken = defaultdict[str, set[str]](set), Counter[str]()
    for _, status, name, body in receiver.got:
        id = json.loads(body)["data"]["id"]
        names[id].add(name)
        taken[id] += status == 200
    delays = [max(0.0, at - ends[id]) for id, at in _told(receiver).items() if id in ends]
    tries = len(receiver.got)
    yield Figure("films", len(ids), f"told by a server that was killed {settings.killed} times, in {tries} tries, of which "
                 f"{sum(taken.values())} were taken")  # fmt: skip
    yield exactly("untold", sum(taken[id] == 0 for id in ids), 0, "films whose end nobody was told")
    yield exactly("names", sum(len(several) != 1 for several in names.values()), 0, "films with more than one webhook-id")
    yield exactly("refused", receiver.disbelieved, 0, "messages that the official client does not believe")
    yield Figure("again", sum(taken[id] > 1 for id in ids), "films that were told and taken more than once")
    yield Figure("delay", percentile(delays, 0.5), f"s from a film's end until it was taken, p50; {max(delays):.1f} at most")
