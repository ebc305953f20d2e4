"""Jobs outlive what kills their processes: SIGKILL at random points, os._exit at every step, SIGSTOP for longer than a lease.

The processes are real. They are forked by a driver, this file run as a program, which has imported everything once: a child
starts in milliseconds, so that most of a round is work and the kills hit that.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim, Job

ROUNDS = 25
STOPPED = 50
SEED = 7
LEASE = 0.3


# What the processes do.


def open_jobs(folder: Path, **more: Any) -> Jobs:
    return Jobs.open(f"sqlite:///{folder / 'tubelet.db'}", **({"lease": LEASE, "attempts": 1000} | more))


def note(folder: Path, name: str, line: str) -> None:
    """Append a line in one write: after a kill it is there or it is not."""
    with (folder / name).open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def notes(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines() if (folder / name).exists() else []


def submit(folder: Path) -> None:
    """A client that numbers its wishes and, having been killed before the answer came, asks for the last one again."""
    jobs = open_jobs(folder)
    asked = notes(folder, "asked")
    known = {line.split()[0] for line in notes(folder, "acknowledged")}
    number = len(set(asked))
    if asked and asked[-1] not in known:
        number = int(asked[-1])
    while True:
        note(folder, "asked", str(number))
        job, _ = jobs.create({"number": number}, key=f"wish {number}", fingerprint=str(number))
        note(folder, "acknowledged", f"{number} {job.id}")
        number += 1
        time.sleep(0.004)


def render(folder: Path, claim: Claim) -> Asset:
    """A film of some ten kilobytes, another one in each attempt; whole or absent under its name."""
    data = random.Random(f"{claim.job.id} {claim.attempt}").randbytes(10_000)
    temporary = folder / "assets" / f".{os.getpid()}"
    with temporary.open("wb") as file:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
            file.flush()
        os.fsync(file.fileno())
    name = hashlib.sha256(data).hexdigest()
    temporary.rename(folder / "assets" / name)
    return Asset(name, "video", "video/mp4", len(data))


def work(folder: Path, until_empty: bool = False, ahead: float = 0.0) -> None:
    jobs = open_jobs(folder, clock=lambda: time.time() + ahead)
    while True:
        claim = jobs.claim(f"worker {os.getpid()}")
        if claim is None:
            counts = jobs.counts()
            if until_empty and counts["queued"] + counts["in_progress"] == 0:
                jobs.close()
                return
            time.sleep(0.002)
            continue
        film = render(folder, claim)
        jobs.heartbeat(claim, progress=50)
        if jobs.finish(claim, [film], {"attempt": claim.attempt}):
            note(folder, "finished", claim.job.id)


def stale(folder: Path, where: int) -> None:
    """Claim, be stopped for longer than the lease (30 s) at one of four places, go on, and say what came of it."""
    jobs = open_jobs(folder, lease=30.0)
    claim = jobs.claim(f"stale {os.getpid()}")
    assert claim is not None
    for place in range(4):
        if place == where:
            os.kill(os.getpid(), signal.SIGSTOP)
        if place == 1:
            jobs.heartbeat(claim, progress=10)
        if place == 2:
            film = render(folder, claim)
    lost = jobs.heartbeat(claim, progress=90).lost
    published = jobs.finish(claim, [film], {"stale": True})
    note(folder, "stale", f"{int(lost)} {int(published)} {int(jobs.release(claim))}")
    os._exit(0)


# The drivers.


def child(call: Callable[..., None], *arguments: Any) -> int:
    number = os.fork()
    if number == 0:
        try:
            call(*arguments)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return number


def drive_rounds(folder: Path) -> None:
    chance = random.Random(SEED)
    for _ in range(ROUNDS):
        children = [child(submit, folder), child(work, folder), child(work, folder)]
        chance.shuffle(children)
        name = chance.choice(["acknowledged", "finished"])
        enough = len(notes(folder, name)) + chance.randint(1, 5)
        until = time.monotonic() + 60
        while len(notes(folder, name)) < enough:
            assert time.monotonic() < until, "nothing moves"
            time.sleep(0.001)
        for number in children:
            time.sleep(chance.uniform(0, 0.02))
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
            assert os.WIFSIGNALED(status), "it ended before it was killed"
    workers = [child(work, folder, True) for _ in range(2)]
    assert [os.waitpid(number, 0)[1] for number in workers] == [0, 0]


def drive_stops(folder: Path) -> None:
    jobs = open_jobs(folder)
    for number in range(STOPPED):
        jobs.create({"number": number})
    jobs.close()
    children = [child(stale, folder, number % 4) for number in range(STOPPED)]
    for number in children:
        assert os.WIFSTOPPED(os.waitpid(number, os.WUNTRACED)[1])
    worker = child(work, folder, True, 40.0)  # by its clock they were stopped for 40 s
    assert os.waitpid(worker, 0)[1] == 0
    for number in children:
        os.kill(number, signal.SIGCONT)
        assert os.waitpid(number, 0)[1] == 0


class Steps:
    """Counts the steps a process takes in its storage, before each statement and on both sides of each commit.

    At the chosen one the process ends: no handler runs, nothing is flushed.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.taken = 0
        sa.event.listen(sa.Engine, "before_cursor_execute", self.step)
        commit = DefaultDialect.do_commit

        def stepping(dialect: Any, connection: Any) -> None:
            self.step()
            commit(dialect, connection)
            self.step()

        DefaultDialect.do_commit = stepping

    def step(self, *_: Any) -> None:
        self.taken += 1
        if self.taken == self.last:
            os._exit(3)


def opening(folder: Path, last: int) -> None:
    """The tables are made, in a process that is ended at step `last`."""
    Steps(last)
    open_jobs(folder).close()


def one_life(folder: Path, last: int) -> None:
    """Everything that can happen to a job, in one process that is ended at step `last`."""
    jobs = open_jobs(folder)
    steps = Steps(last)
    jobs.put("webhook_endpoint", "e", "local", {"id": "e"})
    job, _ = jobs.create({"number": 0}, key="wish", fingerprint="f", cap=10)
    note(folder, "acknowledged", f"0 {job.id}")
    claim = jobs.claim("one")
    assert claim is not None
    film = render(folder, claim)
    steps.step()
    jobs.heartbeat(claim, progress=50, preview=film)
    jobs.release(claim)
    claim = jobs.claim("one")
    assert claim is not None
    if jobs.finish(claim, [render(folder, claim)], {}):
        note(folder, "finished", claim.job.id)
    spare, other = jobs.create({})[0].id, jobs.create({})[0].id
    jobs.move(other, None, 1)
    claim = jobs.claim("one")
    assert claim is not None
    jobs.fail(claim, "bad", "It went wrong.")
    jobs.cancel(spare, None)
    note(folder, "cancelled", spare)
    jobs.delete(spare, None)
    note(folder, "deleted", spare)


def drive_steps(folder: Path) -> None:
    """One life after the other, each in a database of its own and ended one step later, until one ends by itself."""
    template = folder / "template"
    template.mkdir()
    open_jobs(template).close()
    for life in (opening, one_life):
        last = status = 0
        while not last or status != 0:
            last += 1
            place = folder / f"{life.__name__} {last}"
            (place / "assets").mkdir(parents=True)
            if life is one_life:
                shutil.copy(template / "tubelet.db", place)
            status = os.waitstatus_to_exitcode(os.waitpid(child(life, place, last), 0)[1])
            assert status in (0, 3), place
            jobs = open_jobs(place, clock=lambda: time.time() + 60)  # whatever was left behind, it opens
            check(place, jobs)
            while claim := jobs.claim("next"):
                assert jobs.finish(claim, [render(place, claim)], {})
                note(place, "finished", claim.job.id)
            assert {job.state for job in check(place, jobs)} <= {"completed", "failed"}
            jobs.close()
            shutil.rmtree(place)
        note(folder, "steps", str(last - 1))


# What must hold.


def check(folder: Path, jobs: Jobs) -> list[Job]:
    """The rows of a database agree with each other, with the files and with what was acknowledged. Returns the jobs."""
    every = {job.id: job for job in jobs.page(None, limit=1_000_000).jobs}
    events = jobs.events(limit=1_000_000)
    outbox = Counter(document["job"] for document in jobs.all("outbox", None))
    hooked = bool(jobs.all("webhook_endpoint", None))
    rows = sqlite3.connect(folder / "tubelet.db")
    assert rows.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert rows.execute("SELECT count(*) - count(DISTINCT place) FROM jobs").fetchone() == (0,)
    leased = dict(rows.execute("SELECT id, worker IS NOT NULL AND lease_until IS NOT NULL FROM jobs"))
    rows.close()

    gone = {id for _, id, facts in events if facts["type"] == "video.deleted"}
    assert not gone & set(every), "a deleted job is still there"
    assert set(notes(folder, "deleted")) <= gone
    for line in notes(folder, "acknowledged"):
        assert line.split()[1] in every, "an acknowledged job was lost"
    finished = notes(folder, "finished")
    assert len(finished) == len(set(finished)), "a job was finished twice"
    assert all(every[id].state == "completed" for id in finished), "a finished job is not completed"
    assert all(id in gone or every[id].cancelled for id in notes(folder, "cancelled"))

    sequences = [sequence for sequence, _, _ in events]
    assert sequences == sorted(set(sequences))
    last: dict[str, dict[str, Any]] = {}
    ends = Counter()
    for _, id, facts in events:
        last[id] = facts
        ends[id] += facts["type"] in ("video.completed", "video.failed")
    wishes = Counter(json.dumps(job.request) for job in every.values() if job.request)
    assert set(wishes.values()) <= {1}, "a wish was fulfilled twice"
    for job in every.values():
        ended = job.state in ("completed", "failed")
        assert (last[job.id]["state"], last[job.id]["progress"]) == (job.state, job.progress), "row and event disagree"
        assert ends[job.id] == ended, "an end was told twice or not at all"
        assert outbox[job.id] == (ended and hooked), "an end and its webhook disagree"
        assert leased[job.id] == (job.state == "in_progress")
        assert (job.completed_at is not None) == ended
        for asset in job.outputs:
            data = (folder / "assets" / asset.id).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (asset.id, asset.bytes), "a torn asset"
        if job.state == "completed":
            assert [asset.role for asset in job.outputs] == ["video"]
    return list(every.values())


def driven(name: str, folder: Path) -> None:
    (folder / "assets").mkdir(exist_ok=True)
    ran = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: an end of the process, other than an end of the machine, spares the page cache."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared)) if os.access(shared, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)


def test_kills_at_random_points_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    driven("rounds", tmp_path)
    jobs = check(tmp_path, open_jobs(tmp_path))
    assert {job.state for job in jobs} == {"completed"}
    assert len(jobs) > ROUNDS, "the rounds did some work"
    assert any(job.attempt > 1 for job in jobs), "no kill hit a worker at work: the test tests nothing"
    numbers = sorted(job.request["number"] for job in jobs)
    assert numbers == list(range(len(numbers))), "each wish once, those without an answer too"


def test_a_worker_that_was_stopped_for_too_long_cannot_publish(memory: Path) -> None:
    driven("stops", memory)
    assert notes(memory, "stale") == ["1 0 0"] * STOPPED
    jobs = check(memory, open_jobs(memory))
    assert [(job.state, job.attempt, job.result) for job in jobs] == [("completed", 2, {"attempt": 2})] * STOPPED


def test_the_store_is_consistent_after_an_end_at_any_step(memory: Path) -> None:
    driven("steps", memory)
    opened, lived = (int(line) for line in notes(memory, "steps"))
    assert opened > 20
    assert lived > 100


if __name__ == "__main__":
    {"rounds": drive_rounds, "stops": drive_stops, "steps": drive_steps}[sys.argv[1]](Path(sys.argv[2]))
