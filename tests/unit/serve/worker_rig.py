"""What tests of a worker share: a server's folder, a denoiser that waits, and no waiting otherwise."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from render_rig import ask
from torch import nn

from tubelet.generate.system import System
from tubelet.serve import worker as room
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Job
from tubelet.serve.store import Store
from tubelet.serve.worker import Worker, WorkerConfig

PATIENCE = 60.0


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and polls that take no time."""
    monkeypatch.setattr(room, "BEAT", 0.02)
    monkeypatch.setattr(room, "POLL", 0.01)
    monkeypatch.setattr(room, "ROOM_PAUSE", 0.02)


class Place:
    """A server's folder with its queue and its store."""

    def __init__(self, folder: Path, store: Any = None) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder / 'tubelet.db'}"
        self.jobs = Jobs.open(self.url)
        self.store = store or Store(folder / "assets")

    def ask(self, **more: Any) -> Job:
        return self.jobs.create({**ask(**more), "model": "sora-2", "system": "tiny"})[0]

    def job(self, job: Job) -> Job:
        found = self.jobs.get(job.id, None)
        assert found is not None
        return found

    def worker(self, system: System, folder: Path | None = None, **more: Any) -> Worker:
        config = WorkerConfig(folder or self.folder, self.url, "tiny", sign=False, **more)
        return Worker(self.jobs, self.store, system, config)

    @property
    def journals(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "journals").glob("*"))

    def later(self) -> Jobs:
        """The queue as it is seen a minute from now: every lease has run out."""
        return Jobs.open(self.url, clock=lambda: time.time() + 60)


@contextlib.contextmanager
def placed(folder: Path, store: Any = None) -> Iterator[Place]:
    place = Place(folder, store)
    yield place
    place.jobs.close()


class Gate(nn.Module):
    """A denoiser that waits at its n-th answer until it is let go on."""

    def __init__(self, network: nn.Module, before: int) -> None:
        super().__init__()
        self.network, self.config, self.before = network, network.config, before
        self.reached, self.open = threading.Event(), threading.Event()
        self.answers = 0

    def forward(self, *question: Any, **more: Any) -> torch.Tensor:
        if self.answers == self.before:
            self.reached.set()
            assert self.open.wait(PATIENCE)
        self.answers += 1
        return self.network(*question, **more)


def with_network(system: System, network: nn.Module) -> System:
    return replace(system, engine=replace(system.engine, denoiser=network))


@contextlib.contextmanager
def running(call: Callable[[], Any]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
