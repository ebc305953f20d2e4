"""Workers that are killed while they make films, at answers of the denoiser that are drawn, and workers that go on.

Run as a program this file is a driver, which loads the system once and forks a worker for each attempt: a child starts in
milliseconds, so that most of the time is work and the kills hit that.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.generate.system import System, load
from tubelet.media.encode import save
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Job
from tubelet.serve.store import Store
from tubelet.serve.worker import Worker, WorkerConfig

KINDS: dict[str, dict[str, Any]] = {
    "extend": {"task": "extend", "frames": 7, "expand": True},
    "create": {"task": "create", "seconds": 1.5},
    "edit": {"task": "edit", "strength": 0.7},
}
"""Films in several windows, with and without one that they are made from."""
STEPS = 20
EACH = 2
"""Kills of one film at most: the third would give it up."""


class Telling(nn.Module):
    """A denoiser that writes a byte when each of its answers begins, and begins no more than so many of them."""

    def __init__(self, network: nn.Module, told: int, most: int | None) -> None:
        super().__init__()
        self.network, self.config, self.told, self.left = network, network.config, told, most

    def forward(self, *question: Any, **more: Any) -> Tensor:
        if self.left is not None:
            if self.left == 0:
                threading.Event().wait()  # for the kill, which may be late on a busy machine
            self.left -= 1
        os.write(self.told, b".")
        return self.network(*question, **more)


class Place:
    """A folder with a queue and a store. Nothing is open in it between two calls, since processes are forked."""

    def __init__(self, folder: Path, system: System) -> None:
        self.folder, self.system, self.url = folder, system, f"sqlite:///{folder / 'tubelet.db'}"
        self.store = Store(folder / "assets", reserve=0)
        still = np.linspace(30, 220, 64).astype(np.uint8)
        film = np.stack([np.roll(np.broadcast_to(still[None, :, None], (48, 64, 3)), 3 * t, 1) for t in range(6)])
        save(film, folder / "source.mp4", 8.0)

    @contextlib.contextmanager
    def jobs(self, later: float = 0.0) -> Iterator[Jobs]:
        """The queue, or as it is seen so many seconds later."""
        jobs = Jobs.open(self.url, clock=lambda: time.time() + later)
        try:
            yield jobs
        finally:
            jobs.close()

    def ask(self, kind: str, seed: int) -> Job:
        source = self.store.put(self.folder / "source.mp4", "input", "video/mp4")
        inputs = [] if kind == "create" else [{"role": "video", "asset": source.id, "media": source.media}]
        plain = {"prompt": "a red ball falls", "system": "tiny", "size": [48, 64], "seed": seed, "steps": STEPS}
        with self.jobs() as jobs:
            return jobs.create({**plain, "inputs": inputs, "expand": False, **KINDS[kind]})[0]

    def job(self, job: Job) -> Job:
        with self.jobs() as jobs:
            found = jobs.get(job.id, None)
        assert found is not None
        return found

    def noted(self, job: Job) -> int:
        """How many answers the job's journal holds."""
        return len(list((self.folder / "journals" / job.id / "answers").glob("*.safetensors")))

    def attempt(self, job: Job, kill: tuple[int, float] | None = None) -> int:
        """The answers that one attempt of a worker begins; it is killed so many seconds after the n-th one."""
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                engine = replace(self.system.engine, denoiser=Telling(self.system.denoiser, tells, kill and kill[0]))
                with self.jobs() as jobs:
                    config = WorkerConfig(self.folder, self.url, "tiny", sign=False)
                    assert Worker(jobs, self.store, replace(self.system, engine=engine), config).turn()
                os._exit(0)
            finally:
                os._exit(1)
        os.close(tells)
        begun = 0
        with os.fdopen(told, "rb", buffering=0) as heard:
            while heard.read(1):
                begun += 1
                if kill is not None and begun == kill[0]:
                    time.sleep(kill[1])
                    os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if kill is None else -signal.SIGKILL), f"{job.request['task']} ended with {code}"
        return begun


def drive(folder: Path, system: Path, kills: int) -> None:
    """Kill the makers of film after film; a line of each says where, and whether it became what it is without."""
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent computes with, and would wait
    place, chance = Place(folder, load(system, device="cpu", dtype="float32")), random.Random(4)
    whole: dict[str, tuple[list[str], int, float]] = {}
    for kind in KINDS:
        job = place.ask(kind, 7)
        answers = place.attempt(job)
        done = place.job(job)
        whole[kind] = [asset.id for asset in done.outputs], answers, done.result["timings"]["denoise"] / answers
    number = 0
    while kills > 0:
        kind = list(KINDS)[number % len(KINDS)]
        number += 1
        files, answers, each = whole[kind]
        job = place.ask(kind, 7)
        places = sorted(chance.sample(range(1 + chance.randrange(2), answers - 1, 2), min(EACH, kills)))
        kept = 0
        for at in places:
            place.attempt(job, (at - kept + 1, chance.uniform(0, each)))
            with place.jobs(later=60) as jobs:  # a minute from now every lease has run out
                assert (jobs.sweep(), jobs.get(job.id, None).state) == (1, "queued")  # type: ignore[union-attr]
            kept = place.noted(job)
            assert at <= kept <= at + 1, "what had been answered was noted"
        kills -= len(places)
        computed, done = place.attempt(job), place.job(job)
        same = [asset.id for asset in done.outputs] == files and all(place.store.verify(asset) for asset in done.outputs)
        said = {"kind": kind, "kills": places, "answers": answers, "again": kept + computed - answers, "same": same}
        sys.stdout.write(json.dumps(said) + "\n")


def killed(folder: Path, system: Path, kills: int, patience: float) -> list[dict[str, Any]]:
    """What became of films whose makers were killed that many times in all."""
    command = [sys.executable, __file__, str(folder), str(system), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
