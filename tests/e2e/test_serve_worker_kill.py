"""Real workers, killed and stopped where it hurts: no job is lost, no film differs by a bit, nobody waits for a corpse."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

import film_deaths
import httpx
import postgres_server
from api_rig import config_of, listening
from unpickling import assert_quiet, watched

from tubelet.media.encode import save
from tubelet.serve.app import create_app
from tubelet.serve.jobs import Jobs
from tubelet.serve.objects import Objects, open_assets
from tubelet.serve.records import Job
from tubelet.serve.store import Store

PATIENCE = 240.0
STEPS = 120
"""Of each of two windows: long enough to be killed in the middle, on any machine."""


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


class Place:
    """A server's folder, its queue and store, and the workers that were started on it."""

    def __init__(self, folder: Path, system: Path, url: str | None = None, objects: str | None = None) -> None:
        self.folder, self.system, self.objects = folder, system, objects
        self.url = url or f"sqlite:///{folder / 'tubelet.db'}"
        self.jobs, self.store = Jobs.open(self.url), open_assets(folder, objects)
        self.workers: list[subprocess.Popen[Any]] = []

    def machine(self, name: str) -> Path:
        """The data folder of a machine of its own: of this one's files it has none, or the films, as over a network."""
        data = self.folder / name
        data.mkdir()
        if isinstance(self.store, Store):
            (data / "assets").symlink_to(self.store.folder)
        return data

    def words(self, data: Path | None = None) -> list[str]:
        """Of the command line of a worker."""
        words = ["worker", "--system", self.system, "--data", data or self.folder, "--store", self.url, "--device", "cpu"]
        return [str(word) for word in words + ([] if self.objects is None else ["--objects", self.objects])]

    def worker(self, data: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tubelet", *self.words(data), "--no-sign"]
        log = (self.folder / "log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.workers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=environment))
        log.close()
        return self.workers[-1]

    def film(self, **more: Any) -> Job:
        """A clip that goes on: known frames, and more than one window."""
        asset = self.store.put(self.folder / "source.mp4", "input", "video/mp4")
        inputs = [{"role": "video", "asset": asset.id, "media": asset.media}]
        request = {"task": "extend", "prompt": "a red ball falls", "system": "tiny", "seed": 7, "frames": 7, "steps": STEPS}
        return self.jobs.create({**request, "size": [48, 64], "inputs": inputs, "expand": True, **more})[0]

    def job(self, job: Job) -> Job:
        found = self.jobs.get(job.id, None)
        assert found is not None
        return found

    def answers(self, job: Job, data: Path | None = None) -> int:
        """How many answers the job's journal holds."""
        return len(list(((data or self.folder) / "journals" / job.id / "answers").glob("*.safetensors")))

    def holder(self, job: Job) -> int | None:
        """The living process that works on a job."""
        alive = {worker.pid for worker in self.workers if worker.poll() is None}
        return next((w["pid"] for w in self.jobs.workers() if w["job"] == job.id and w.get("pid") in alive), None)

    def kill(self, *pids: int | None) -> None:
        for worker in self.workers:
            if worker.pid in pids:
                worker.kill()
                worker.wait()

    def sweep(self) -> int:
        """Take back what killed workers held, without waiting for their leases."""
        later = Jobs.open(self.url, clock=lambda: time.time() + 60)
        try:
            return later.sweep()
        finally:
            later.close()


@contextlib.contextmanager
def placed(tmp_path: Path, tiny: Path, url: str | None = None, objects: str | None = None) -> Iterator[Place]:
    still = np.linspace(30, 220, 64).astype(np.uint8)
    film = np.stack([np.roll(np.broadcast_to(still[None, :, None], (48, 64, 3)), 3 * t, 1) for t in range(6)])
    save(film, tmp_path / "source.mp4", 8.0)
    place = Place(tmp_path, tiny, url, objects)
    try:
        yield place
    finally:
        for worker in place.workers:
            worker.kill()
            worker.wait()
        place.jobs.close()


@pytest.fixture
def place(tmp_path: Path, tiny: Path) -> Iterator[Place]:
    with placed(tmp_path, tiny) as place:
        yield place


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The folder of the socket of a real PostgreSQL, for machines that do not see each other's files."""
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(postgres_server.running())
        except postgres_server.Absent as absent:
            pytest.skip(str(absent))
        yield folder


@pytest.fixture
def shared_place(tmp_path: Path, tiny: Path, postgres: str) -> Iterator[Place]:
    """A place whose queue is in a real PostgreSQL, and whose machines share the folder of films."""
    with placed(tmp_path, tiny, postgres_server.new_schema(postgres)) as place:
        yield place


@pytest.fixture
def bucket_place(tmp_path: Path, tiny: Path, postgres: str) -> Iterator[Place]:
    """A place whose queue is in a real PostgreSQL, and whose machines share an object store and no folder."""
    with placed(tmp_path, tiny, postgres_server.new_schema(postgres), (tmp_path / "bucket").as_uri()) as place:
        yield place


def test_killed_workers_lose_no_job_and_change_no_bit(place: Place) -> None:
    film, poison = place.film(), place.film(seed=8, steps=1000)
    first_answer = place.folder / "journals" / film.id / "answers" / "000000.safetensors"
    computed = set()
    for _ in range(2):
        kept = {job.id: place.answers(job) for job in (film, poison)}
        both = {place.worker().pid, place.worker().pid}
        for job in (film, poison):
            until(lambda job=job, kept=kept: place.answers(job) > kept[job.id] + 20)
            pid = place.holder(job)
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)  # so that neither is done before the other has begun
        computed.add(first_answer.stat().st_mtime_ns)
        assert {place.holder(film), place.holder(poison)} == both, "two workers share the work"
        place.kill(*both)
        assert place.sweep() == 2
        assert [place.job(job).state for job in (film, poison)] == ["queued", "queued"]
    assert len(computed) == 1, "what was computed once is not computed again"
    place.worker()
    place.worker()
    until(lambda: place.holder(poison))
    place.kill(place.holder(poison))
    until(lambda: place.job(film).state == "completed")
    place.sweep()
    failed = place.job(poison)
    assert (failed.state, (failed.error or {})["code"]) == ("failed", "worker_crashed"), "no job kills workers for ever"
    again = place.film()
    until(lambda: place.job(again).state == "completed")
    assert place.job(film).attempt == 3
    assert place.job(again).attempt == 1
    assert [asset.id for asset in place.job(film).outputs] == [asset.id for asset in place.job(again).outputs]
    assert all(place.store.verify(asset) for asset in place.job(film).outputs)
    assert not (place.folder / "journals" / film.id).exists()


def test_a_film_is_the_same_after_a_kill_at_any_of_twenty_random_answers(tiny: Path, tmp_path: Path) -> None:
    films = film_deaths.killed(tmp_path, tiny, 20, PATIENCE)
    assert sum(len(film["kills"]) for film in films) == 20
    assert {film["kind"] for film in films} == set(film_deaths.KINDS)
    assert [film for film in films if not film["same"]] == []
    assert [film for film in films if film["again"]] == [], "what was noted is not computed again"


def test_a_running_job_is_cancelled_and_a_stopped_worker_gives_its_job_back(place: Place) -> None:
    unwanted, film = place.film(steps=1000), place.film()
    worker = place.worker()
    until(lambda: place.answers(unwanted) > 3)
    place.jobs.cancel(unwanted.id, None)
    asked, answers = time.monotonic(), place.answers(unwanted)
    until(lambda: place.job(unwanted).state == "failed")
    assert (place.job(unwanted).error or {})["code"] == "cancelled"
    assert time.monotonic() - asked < 10, "a heartbeat and a step, on a busy machine"
    assert answers < 1000
    until(lambda: place.answers(film) > 30)
    worker.terminate()
    assert worker.wait(PATIENCE) == 0
    back = place.job(film)
    assert (back.state, back.attempt, back.error) == ("queued", 1, None)
    answers = place.answers(film)
    assert 30 < answers < 2 * STEPS
    place.worker()
    again = place.film()
    until(lambda: place.job(again).state == "completed")
    assert place.job(film).state == "completed"
    assert [asset.id for asset in place.job(film).outputs] == [asset.id for asset in place.job(again).outputs]
    log = (place.folder / "log").read_text()
    assert "given back" in log
    assert "red ball" not in log, "nothing that a person wrote is logged"


def test_another_machine_makes_the_film_of_one_that_died(shared_place: Place) -> None:
    place = shared_place
    near, far = place.machine("near"), place.machine("far")
    taking = place.worker(far)
    until(lambda: place.jobs.workers())
    taking.send_signal(signal.SIGSTOP)  # so that the other one gets the film
    film = place.film()
    dying = place.worker(near)
    until(lambda: place.answers(film, near) > 20)
    dying.send_signal(signal.SIGSTOP)  # so that it is not done before it dies
    assert place.holder(film) == dying.pid
    place.kill(dying.pid)
    taking.send_signal(signal.SIGCONT)
    place.sweep()
    until(lambda: place.answers(film, far) > 0)
    assert place.holder(film) == taking.pid
    until(lambda: place.job(film).state == "completed")
    assert place.job(film).attempt == 2
    assert place.answers(film, near) > 20, "what the dead machine noted was out of reach"
    again = place.film()
    until(lambda: place.job(again).state == "completed")
    assert place.job(again).attempt == 1
    assert [asset.id for asset in place.job(film).outputs] == [asset.id for asset in place.job(again).outputs]
    assert all(place.store.verify(asset) for asset in place.job(film).outputs)


def test_another_machine_goes_on_where_one_died(bucket_place: Place) -> None:
    """Two workers and a server, each with a folder of its own, share a database and an object store. One worker dies in the
    middle; the other has what it noted, and the server has the film, byte for byte the one that is made without a death."""
    place, bucket = bucket_place, bucket_place.folder / "bucket"
    near, far, front = (place.machine(name) for name in ("near", "far", "front"))
    taking = place.worker(far)
    until(lambda: place.jobs.workers())
    taking.send_signal(signal.SIGSTOP)  # so that the other one gets the film
    film = place.film(steps=5 * STEPS)  # long enough to be caught in the middle
    dying = place.worker(near)
    until(lambda: place.answers(film, bucket) > 20)
    dying.send_signal(signal.SIGSTOP)  # so that it is not done before it dies
    assert place.holder(film) == dying.pid
    place.kill(dying.pid)
    noted = {path.name: path.stat().st_mtime_ns for path in (bucket / "journals" / film.id / "answers").glob("*.safetensors")}
    assert not list(far.iterdir()), "the other machine has nothing yet"
    taking.send_signal(signal.SIGCONT)
    place.sweep()
    until(lambda: place.answers(film, bucket) > len(noted))
    assert place.holder(film) == taking.pid
    since = {path.name: path.stat().st_mtime_ns for path in (bucket / "journals" / film.id / "answers").glob("*.safetensors")}
    assert noted.items() <= since.items(), "what was computed once is not computed again"
    until(lambda: place.job(film).state == "completed")
    assert place.job(film).attempt == 2
    with listening(create_app(place.jobs, open_assets(front, place.objects), config_of(front))) as url:
        streamed = httpx.get(f"{url}/v1/videos/{film.id}/content", timeout=60)
        part = httpx.get(f"{url}/v1/videos/{film.id}/content", headers={"range": "bytes=100-199"}, timeout=60)
        again = place.film(steps=5 * STEPS)
        until(lambda: place.job(again).state == "completed")
        assert place.job(again).attempt == 1
        whole = httpx.get(f"{url}/v1/videos/{again.id}/content", timeout=60)
        assert (streamed.status_code, streamed.content) == (200, whole.content)
        assert (part.status_code, part.content) == (206, whole.content[100:200])
        assert [asset.id for asset in place.job(film).outputs] == [asset.id for asset in place.job(again).outputs]
        assert all(place.store.verify(asset) for asset in place.job(film).outputs)
        for id in (film.id, again.id):
            assert httpx.delete(f"{url}/v1/videos/{id}", timeout=60).status_code == 200
    assert [entry.name for entry in Objects.open(str(place.objects)).entries("")] == [], (
        "nothing of the films, their source and journals stays"
    )
    for data in (near, far, front):
        assert not (data / "assets").exists(), "no machine kept a film"


def test_a_worker_unpickles_nothing(place: Place) -> None:
    """It loads a system, reads a clip, makes, marks and signs a film and pictures of words, and ends when it is asked to."""
    code = """
from tubelet.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    film = place.film(steps=4)
    pictures = place.jobs.create(
        {"task": "image", "prompt": "a ball", "system": "tiny", "seed": 1, "size": None, "inputs": [], "n": 2, "format": "png"},
        kind="image",
    )[0]
    worker = watched(code, *place.words())
    place.workers.append(worker)
    until(lambda: worker.poll() is not None or {place.job(job).state for job in (film, pictures)} == {"completed"})
    worker.terminate()
    assert_quiet(worker)
    assert len(place.job(film).outputs) == 3
    assert len(place.job(pictures).outputs) == 2
    assert place.jobs.totals()["signed"] == 5


def test_a_worker_that_cannot_begin_says_why(place: Place, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no system" in refused("worker", "--system", "worlds-9", "--data", tmp_path)
    assert "device" in refused("worker", "--system", place.system, "--data", tmp_path, "--device", "abacus")
    assert "--patience" in refused("worker", "--patience", "0", "--data", tmp_path)
    assert "cannot write in" in refused("worker", "--data", place.folder / "source.mp4" / "below")
    assert "s3://BUCKET" in refused("worker", "--system", place.system, "--data", tmp_path, "--objects", "films")
    assert "sqlite:///FILE" in refused("worker", "--system", place.system, "--data", tmp_path, "--store", "mysql://host/x")
