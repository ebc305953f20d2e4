"""Processes at work on a job store, and what kills them: SIGKILL at random points, os._exit at every step, SIGSTOP.

The processes are real. They are forked by a driver, this file run as a program, which has imported everything once: a child
starts in milliseconds, so that most of a round is work and the kills hit that. A driver works in a folder; which job store is
its is written in the folder's file "url", and is a SQLite file beside it where there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

import older
import postgres_server

from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim, Job

SEED = 7
LEASE = 0.3


# What the processes do.


def url_of(folder: Path) -> str:
    named = folder / "url"
    return named.read_text(encoding="utf-8") if named.exists() else f"sqlite:///{folder / 'tubelet.db'}"


def open_jobs(folder: Path, **more: Any) -> Jobs:
    return Jobs.open(url_of(folder), **({"lease": LEASE, "attempts": 1000} | more))


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


def hold(folder: Path) -> None:
    """Claim, and beat once a second for ever."""
    jobs = open_jobs(folder, lease=15.0)
    claim = jobs.claim(f"holder {os.getpid()}")
    assert claim is not None
    note(folder, "held", claim.job.id)
    while True:
        time.sleep(1.0)
        jobs.heartbeat(claim)


def take(folder: Path) -> None:
    """Look at the queue as a worker does until there is something to claim."""
    jobs = open_jobs(folder, lease=15.0)
    while (claim := jobs.claim(f"taker {os.getpid()}")) is None:
        time.sleep(0.25)
    note(folder, "taken", f"{time.monotonic()}")
    jobs.finish(claim, [], {})


def one_life(folder: Path) -> None:
    """Everything that can happen to a job."""
    jobs = open_jobs(folder)
    jobs.put("webhook_endpoint", "e", "local", {"id": "e"})
    job, _ = jobs.create({"number": 0}, key="wish", fingerprint="f", cap=10)
    note(folder, "acknowledged", f"0 {job.id}")
    claim = jobs.claim("one")
    assert claim is not None
    film = render(folder, claim)
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


def opening(folder: Path) -> None:
    """The tables are made, or brought up to date."""
    open_jobs(folder).close()


def ended_at(life: Callable[[Path], None], folder: Path, last: int) -> None:
    """A life whose process ends at step `last` in its storage: no handler runs, nothing is flushed.

    Steps are counted before each statement and on both sides of each commit.
    """
    taken = 0

    def step(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == last:
            os._exit(3)

    commit = DefaultDialect.do_commit

    def stepping(dialect: Any, connection: Any) -> None:
        step()
        commit(dialect, connection)
        step()

    sa.event.listen(sa.Engine, "before_cursor_execute", step)
    DefaultDialect.do_commit = stepping
    life(folder)


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


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def drive_rounds(folder: Path, rounds: int) -> None:
    """A submitter and two workers, killed at random points; at the end two workers finish what is left."""
    chance = random.Random(SEED)
    for _ in range(rounds):
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
            assert ended(number) == -signal.SIGKILL, "it ended before it was killed"
    workers = [child(work, folder, True) for _ in range(2)]
    assert [ended(number) for number in workers] == [0, 0]


def drive_stops(folder: Path, number: int) -> None:
    """Workers that are stopped for longer than their lease, while another takes their jobs."""
    jobs = open_jobs(folder)
    for index in range(number):
        jobs.create({"number": index})
    jobs.close()
    children = [child(stale, folder, index % 4) for index in range(number)]
    for process in children:
        assert os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1])
    assert ended(child(work, folder, True, 40.0)) == 0  # by its clock they were stopped for 40 s
    for process in children:
        os.kill(process, signal.SIGCONT)
        assert ended(process) == 0


def drive_lost(folder: Path, number: int) -> None:
    """Workers with the lease of the server that are killed at some moment between two heartbeats, while another looks on."""
    chance = random.Random(SEED)
    for _ in range(number):
        jobs = open_jobs(folder)
        jobs.create({})
        jobs.close()
        before = len(notes(folder, "held"))
        holder = child(hold, folder)
        while len(notes(folder, "held")) == before:
            time.sleep(0.01)
        taker = child(take, folder)
        time.sleep(chance.uniform(1, 3))
        os.kill(holder, signal.SIGKILL)
        killed = time.monotonic()
        ended(holder)
        assert ended(taker) == 0
        note(folder, "noticed", f"{float(notes(folder, 'taken')[-1]) - killed}")


def steps(life: Callable[[Path], None], begin: Callable[[int], Path]) -> Iterator[tuple[Path, bool]]:
    """The places that `begin` makes, each after a life that was ended one step later; the last one ended by itself."""
    last, whole = 0, False
    while not whole:
        last += 1
        place = begin(last)
        status = ended(child(ended_at, life, place, last))
        assert status in (0, 3), (place, status)
        whole = status == 0
        yield place, whole


def drive_steps(folder: Path) -> None:
    """Whatever was left behind by a life that was ended at any step, the store opens, is consistent and can go on."""
    template = folder / "template"
    template.mkdir()
    open_jobs(template).close()
    for life in (opening, one_life):

        def begin(last: int, life: Callable[[Path], None] = life) -> Path:
            place = folder / f"{life.__name__} {last}"
            (place / "assets").mkdir(parents=True)
            if life is one_life:
                shutil.copy(template / "tubelet.db", place)
            return place

        early = 0
        for place, whole in steps(life, begin):
            early += not whole
            jobs = open_jobs(place, clock=lambda: time.time() + 60)
            check(place, jobs)
            while claim := jobs.claim("next"):
                assert jobs.finish(claim, [render(place, claim)], {})
                note(place, "finished", claim.job.id)
            assert {job.state for job in check(place, jobs)} <= {"completed", "failed"}
            jobs.close()
            shutil.rmtree(place)
        note(folder, "steps", str(early))


def old_store(folder: Path, name: str, more: int) -> Path:
    """A store of schema 1 on the server whose socket the file "server" names, or in a file."""
    place = folder / name
    place.mkdir()
    server = folder / "server"
    if server.exists():
        (place / "url").write_text(postgres_server.new_schema(server.read_text()))
    older.write_schema_1(url_of(place), more)
    return place


def whole_version(folder: Path, whole: dict[int | None, Any], rows: Any) -> int:
    """The version that a store has: with all the tables of that version and every row of the older one."""
    version, tables = older.shape(url_of(folder))
    assert version is not None
    assert tables == whole[version], f"neither one nor the other: {tables}"
    assert older.rows(url_of(folder)) == rows
    return version


def drive_upgrades(folder: Path, rounds: int, more: int) -> None:
    """A store of schema 1 is opened by a process that ends at each step, then by ones that are killed at random moments.

    Each leaves the old store whole or the new one, and the next opening makes it the new one.
    """
    pattern = old_store(folder, "pattern", more)
    whole = dict([older.shape(url_of(pattern))])
    rows = older.rows(url_of(pattern))
    begin = time.monotonic()
    assert ended(child(opening, pattern)) == 0
    took = time.monotonic() - begin
    version, tables = older.shape(url_of(pattern))
    whole[version] = tables
    assert len(whole) == 2, "the pattern was not brought up to date"

    def left(place: Path) -> int:
        found = whole_version(place, whole, rows)
        opening(place)
        assert whole_version(place, whole, rows) == version
        return found

    found = [left(place) for place, _ in steps(opening, lambda last: old_store(folder, f"step {last}", more))]
    assert found == sorted(found), "once new, always new"
    note(folder, "upgrades", " ".join(map(str, found)))
    chance, found = random.Random(SEED), []
    for number in range(rounds):
        place = old_store(folder, f"kill {number}", more)
        process = child(opening, place)
        time.sleep(chance.uniform(0, took))
        os.kill(process, signal.SIGKILL)
        ended(process)
        found.append(left(place))
        if not (folder / "server").exists():
            shutil.rmtree(place)
    note(folder, "upgrades", " ".join(map(str, found)))


# What must hold.


def check(folder: Path, jobs: Jobs) -> list[Job]:
    """The rows of a store agree with each other, with the files and with what was acknowledged. Returns the jobs."""
    every = {job.id: job for job in jobs.page(None, limit=1_000_000).jobs}
    events = jobs.events(limit=1_000_000)
    outbox = Counter(document["job"] for document in jobs.all("outbox", None))
    hooked = bool(jobs.all("webhook_endpoint", None))
    with older.engine(url_of(folder)).connect() as rows:
        if rows.dialect.name == "sqlite":
            assert rows.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        assert rows.exec_driver_sql("SELECT count(*) - count(DISTINCT place) FROM jobs").scalar_one() == 0
        held = rows.exec_driver_sql("SELECT id, worker IS NOT NULL AND lease_until IS NOT NULL FROM jobs")
        leased = dict(held.tuples().all())

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
        over = job.state in ("completed", "failed")
        assert (last[job.id]["state"], last[job.id]["progress"]) == (job.state, job.progress), "row and event disagree"
        assert ends[job.id] == over, "an end was told twice or not at all"
        assert outbox[job.id] == (over and hooked), "an end and its webhook disagree"
        assert leased[job.id] == (job.state == "in_progress")
        assert (job.completed_at is not None) == over
        for asset in job.outputs:
            data = (folder / "assets" / asset.id).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (asset.id, asset.bytes), "a torn asset"
        if job.state == "completed":
            assert [asset.role for asset in job.outputs] == ["video"]
    return list(every.values())


def driven(name: str, folder: Path, *numbers: int, patience: float = 300.0) -> None:
    """Run a driver in a folder, in a process of its own."""
    (folder / "assets").mkdir(exist_ok=True)
    command = [sys.executable, __file__, name, folder, *map(str, numbers)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience)
    assert ran.returncode == 0, ran.stderr[-3000:]


DRIVERS: dict[str, Callable[..., None]] = {
    "rounds": drive_rounds,
    "stops": drive_stops,
    "lost": drive_lost,
    "steps": drive_steps,
    "upgrades": drive_upgrades,
}

if __name__ == "__main__":
    DRIVERS[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
