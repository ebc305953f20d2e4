"""The alerts of docs/serving.md: each fires when what it is for happens, and none while all is well."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql
import pytest
import torch
from api_rig import Rig, serving, until
from promql import Page
from torch import nn
from worker_rig import PATIENCE, Gate, hurry, with_network

from tubelet.generate.system import System
from tubelet.serve import worker as room
from tubelet.serve.jobs import Jobs
from tubelet.serve.provenance import Signer
from tubelet.serve.render import OutOfMemory, Rendered
from tubelet.serve.webhooks import GIVE_UP, Deliveries, new_secret
from tubelet.serve.worker import Worker, WorkerConfig

DOCS = Path(__file__).parents[3] / "docs" / "serving.md"


def alerts() -> dict[str, str]:
    """The expressions of the page, by name."""
    table = DOCS.read_text(encoding="utf-8").partition("| alert | expression | for | why |")[2].partition("\n\n")[0]
    rows = table.strip().splitlines()[1:]
    found = [re.fullmatch(r"\| (\w+) \| `([^`]+)` \| (?:\d+m)? ?\| [^|]+ \|", row) for row in rows]
    return {row[1]: row[2] for row in found if row is not None} if all(found) else {}


@dataclass
class Site:
    """A server, and what its workers are made of."""

    rig: Rig
    system: System
    signer: Signer
    patch: pytest.MonkeyPatch
    ends: contextlib.ExitStack

    def page(self) -> Page:
        """The figures as they are."""
        answer = self.rig.client.get("/metrics")
        assert answer.status_code == 200
        return promql.read(answer.text)

    def ask(self) -> str:
        """A film that is to be made."""
        made = self.rig.client.post("/v1/videos", json={"prompt": "a ball", "model": "tiny", "frames": 5, "size": "32x32"})
        assert made.status_code == 200, made.text
        return made.json()["id"]

    def make(self, network: nn.Module | None = None, *, signs: bool = True) -> None:
        """Let a worker take a job to its end."""
        jobs = self.ago(0)
        config = WorkerConfig(self.rig.config.data, self.url, "tiny", name="worker")
        system = self.system if network is None else with_network(self.system, network)
        Worker(jobs, self.rig.store, system, config, signer=self.signer if signs else None).turn()

    def ago(self, seconds: float) -> Jobs:
        """The job store as it was used then."""
        jobs = Jobs.open(self.url, clock=lambda: time.time() - seconds)
        self.ends.callback(jobs.close)
        return jobs

    @property
    def url(self) -> str:
        return f"sqlite:///{self.rig.config.data}/tubelet.db"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.open(tmp_path_factory.mktemp("provenance") / "secrets")


@pytest.fixture
def site(tmp_path: Path, system: System, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    hurry(monkeypatch)
    with serving(tmp_path, working=False, cap=2) as rig, contextlib.ExitStack() as ends:
        rig.jobs.hello("worker", {})
        yield Site(rig, system, signer, monkeypatch, ends)


def dead_worker(site: Site) -> None:
    site.ago(60).hello("worker", {})


def long_wait(site: Site) -> None:
    site.ago(3600).create({"prompt": "p"})


def hung_step(site: Site) -> Page:
    gate, start = Gate(site.system.denoiser, before=1), site.page()
    site.ask()
    thread = threading.Thread(target=site.make, args=(gate,), daemon=True)
    thread.start()
    site.ends.callback(thread.join, PATIENCE)
    site.ends.callback(gate.open.set)
    assert gate.reached.wait(PATIENCE)
    moved = until(site.page, lambda page: page["tubelet_steps_total"] != start["tubelet_steps_total"])
    assert promql.value(alerts()["WorkStands"], start, moved) == {}, "it moved until now"
    return moved


def deaths(site: Site) -> None:
    for _ in range(2):
        site.ask()
        assert site.ago(60).claim("dead") is not None
    site.rig.jobs.sweep()


def broken_network(site: Site) -> None:
    class Broken(Gate):
        def forward(self, *question: Any, **more: Any) -> torch.Tensor:
            raise RuntimeError("shapes do not fit")

    site.ask()
    site.make(Broken(site.system.denoiser, 0))


def little_memory(site: Site) -> None:
    render = room.render

    def poor(*wish: Any, lean: bool, **more: Any) -> Rendered:
        if not lean:
            raise OutOfMemory
        return render(*wish, lean=lean, **more)

    site.patch.setattr(room, "render", poor)
    id = site.ask()
    site.make()
    assert site.rig.client.get(f"/v1/videos/{id}").json()["status"] == "completed", "all the same"


def unsigned(site: Site) -> None:
    site.ask()
    site.make(signs=False)


def little_room(site: Site) -> None:
    site.patch.setattr(site.rig.store, "free", lambda: 5 * 10**8)


def no_room(site: Site) -> None:
    site.patch.setattr(site.rig.store, "free", lambda: -1)
    assert site.rig.client.post("/v1/videos", json={"prompt": "p"}).status_code == 503


def many_jobs(site: Site) -> None:
    for _ in range(2):
        site.ask()
    assert site.rig.client.post("/v1/videos", json={"prompt": "p"}).status_code == 429


def lost_database(site: Site) -> None:
    site.rig.jobs.close()
    path = site.rig.config.data / "tubelet.db"
    path.rename(path.with_suffix(".away"))
    path.mkdir()

    def back() -> None:
        path.rmdir()
        path.with_suffix(".away").rename(path)

    site.ends.callback(back)


def defect(site: Site) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    site.patch.setattr(site.rig.jobs, "page", broken)
    assert site.rig.client.get("/v1/videos").status_code == 500


def slow_polls(site: Site) -> Page:
    id, get = site.ask(), site.rig.jobs.get
    site.rig.client.get(f"/v1/videos/{id}")
    before = site.page()

    def slow(*asked: Any) -> Any:
        time.sleep(0.6)
        return get(*asked)

    site.patch.setattr(site.rig.jobs, "get", slow)
    site.rig.client.get(f"/v1/videos/{id}")
    return before


def deaf_receiver(site: Site) -> None:
    endpoint = {"id": "hook", "url": "https://nowhere.invalid/", "event_types": ["video.completed"], "secret": new_secret()}
    site.rig.jobs.put("webhook_endpoint", "hook", "local", endpoint)
    message = {"id": "wh_1", "endpoint": "hook", "owner": "local", "type": "video.completed", "job": f"video_{'0' * 26}"}
    message |= {"tries": 20, "created_at": time.time() - GIVE_UP, "due": time.time()}
    service = site.rig.app.state.service
    Deliveries(site.rig.jobs, service.outbound, service.metrics).attempt(message)


FAULTS: dict[str, Callable[[Site], Page | None]] = {
    "NoWorker": dead_worker,
    "QueueStands": long_wait,
    "WorkStands": hung_step,
    "WorkersDie": deaths,
    "FilmsFail": broken_network,
    "MemoryShort": little_memory,
    "Unsigned": unsigned,
    "DiskLow": little_room,
    "DiskFull": no_room,
    "QueueFull": many_jobs,
    "DatabaseGone": lost_database,
    "ServerBreaks": defect,
    "AnswersSlow": slow_polls,
    "HooksGivenUp": deaf_receiver,
}
"""What each is for, made to happen. Returns the figures before it did, where these are not those of the start."""


def test_every_alert_has_its_fault() -> None:
    assert list(alerts()) == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_fires(site: Site, name: str) -> None:
    before = site.page()
    assert promql.value(alerts()[name], before, before) == {}, "nothing has happened yet"
    before = FAULTS[name](site) or before
    # Ends are counted a moment after they come.
    until(site.page, lambda after: promql.value(alerts()[name], before, after))


def test_no_alert_fires_while_all_is_well(site: Site) -> None:
    before = site.page()
    for _ in range(2):
        id = site.ask()
        site.make()
        assert site.rig.until(id)["status"] == "completed"
    done = ("tubelet_jobs_finished_total", frozenset({("status", "completed"), ("code", "")}))
    after = until(site.page, lambda page: page[done[0]][done[1]] == 2)
    assert [name for name, expression in alerts().items() if promql.value(expression, before, after)] == []
    assert after["tubelet_steps_total"] == {frozenset(): 4.0}
    assert after["tubelet_provenance_signed_total"] == {frozenset(): 6.0}, "film, thumbnail and sheet of each"


@pytest.mark.parametrize(
    ("expression", "gives"),
    [
        ("a > 1", {frozenset({("x", "2")}): 5.0}),
        ("a == 1", {frozenset({("x", "1")}): 1.0}),
        ('a{x="1"} > 1', {}),
        ("increase(a[5m]) > 0", {frozenset({("x", "2")}): 2.0}),
        ("increase(new[5m]) > 0", {}),
        ("b < 1e3 and on() a == 5", {frozenset(): 7.0}),
        ("b < 1e3 and on() a == 6", {}),
        ('a{x="2"} / on() b < 1', {frozenset(): 5 / 7}),
        ("none == 0", {}),
    ],
)
def test_expressions_are_read_as_prometheus_reads_them(expression: str, gives: promql.Vector) -> None:
    before, after = promql.read('a{x="1"} 1\na{x="2"} 3\nb 7'), promql.read('a{x="1"} 1\na{x="2"} 5\nb 7\nnew 1')
    assert promql.value(expression, before, after) == gives
