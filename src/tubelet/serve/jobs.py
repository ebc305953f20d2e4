"""The job store: every job, its events and what stands beside it, in one SQL database that the API and the workers share.

A job that `create` returned is on the disk. A worker claims a job for the time of a lease and moves the lease on with
heartbeats; a lease that runs out puts the job back in its old place. The number of the claim is a fencing token: each write of
a worker names job, worker and attempt, and a worker that was taken for dead can change nothing.

On PostgreSQL rows are locked in one order: jobs, then workers, then the counter of events, then the totals. The counter of
events stays locked until the transaction ends, so sequences become visible in the order of their numbers and no reader of
events misses one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from tubelet.serve.changes import CANCELLED, DAMAGED, change_job, end_job, held_row, ran_out, record, requeue, take_back, tell
from tubelet.serve.database import Database
from tubelet.serve.records import KEYS, TOTALS, Asset, Claim, Job, KeyConflict, Page, QueueFull, Signal, Total
from tubelet.serve.rows import SELECT, add, created_at, find_job, job_of, lock_events, new_id, next_sequence, positions, text_of
from tubelet.serve.tables import DOCUMENTS, EVENTS, JOBS, NUMBERS, WORKERS

KEPT = 86400.0
"""Seconds that finer events, the traces of deleted jobs and silent workers are remembered."""

# Ids of assets stand in these fields. Quotes within what a person wrote are escaped, so no words look like this.
_NAMED = re.compile(r'"(?:id|asset|credentials)":"([0-9a-f]{64})"')
_PASSING = ("video.progress", "video.preview", "video.deleted")


class Jobs:
    """The job store. One instance serves all threads of a process; make it with `open`.

    Every method raises `StorageFull`, with nothing written, when the database cannot be used, and works again when it can.
    Where `owner` is asked for, None stands for any owner, and a job of another owner is treated as absent.
    """

    def __init__(self, database: Database, lease: float, attempts: int, clock: Callable[[], float]) -> None:
        self._database = database
        self._lease = lease
        self._attempts = attempts
        self._clock = clock
        self._slept = seconds_slept()

    @classmethod
    def open(cls, url: str, *, lease: float = 15.0, attempts: int = 3, clock: Callable[[], float] = time.time) -> Jobs:
        """Open the database at `url`, `sqlite:///FILE` or `postgresql://...`; make or update its tables.

        `lease` is in seconds. A job whose workers died `attempts` times has failed. `clock` gives unix seconds; where workers
        run on several machines, these must agree to well within a lease. Raises UserError when the database cannot be used.
        """
        return cls(Database.open(url), lease, attempts, clock)

    def close(self) -> None:
        """Close the connections; what was committed stays."""
        self._database.close()

    # The API's side.

    def create(
        self,
        request: dict[str, Any],
        *,
        owner: str = "local",
        parent: str | None = None,
        kind: str = "video",
        cap: int | None = None,
        own_cap: int | None = None,
        key: str | None = None,
        fingerprint: str | None = None,
        window: float = 86400.0,
        dedupe: float = 0.0,
        underway: float = 0.0,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> tuple[Job, bool]:
        """Put a job at the end of the queue: (job, True), on the disk when this returns.

        A `key` that this owner used within `window` seconds gives (the job of then, False). Without a key, so does a
        `fingerprint` that this owner used within `dedupe` seconds: a client's retry; or within `underway` seconds, since this
        request began, for a job that says "retry" in its request: the retry overtook the first try. Raises KeyConflict when the
        key came with another fingerprint, QueueFull when `cap` jobs are queued or in progress, or `own_cap` of this owner.
        """
        words = text_of(request)
        with self._database.write() as db:
            lock_events(db)  # one creator at a time: each sees every job that counts for a key or a cap
            now = self._clock()
            known = _known(db, owner, key, fingerprint, now - window, now - dedupe if dedupe > 0 else None)
            if known is None and key is None and fingerprint is not None and underway > 0:
                known = _overtook(db, owner, fingerprint, now - underway)
            if known is not None:
                return known, False
            _refuse_over(db, kind, owner, cap, own_cap)
            id = new_id(kind, now)
            values = {"id": id, "kind": kind, "owner": owner, "state": "queued", "request": words, "created_at": now}
            values |= {"place": next_sequence(db), "parent": parent, "key": key, "fingerprint": fingerprint}
            values |= {"request_id": request_id, "traceparent": traceparent, "system": str(request.get("system") or "")}
            db.execute(insert(JOBS).values(values))
            return tell(db, id, "queued", now), True

    def recent(self, owner: str, fingerprint: str, window: float, key: str | None = None) -> Job | None:
        """The owner's newest job with this key, or without one with this fingerprint, if younger than `window` seconds.

        Raises KeyConflict when the key came with another fingerprint.
        """
        with self._database.read() as db:
            since = self._clock() - window
            return _known(db, owner, key, fingerprint, since, since)

    def get(self, id: str, owner: str | None) -> Job | None:
        """One job, or None."""
        with self._database.read() as db:
            return find_job(db, id, owner)

    def page(
        self,
        owner: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        kind: str = "video",
    ) -> Page:
        """`limit` jobs by time of creation, from behind the job `after`, which may have been deleted less than a day ago.

        Jobs that come and go meanwhile shift nothing: who follows the pages sees each job that stays exactly once. Raises
        LookupError when `after` is unknown.
        """
        columns = (JOBS.c.created_at, JOBS.c.id)
        query = select(JOBS).where(JOBS.c.kind == kind).limit(limit + 1)
        query = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in columns))
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        with self._database.read() as db:
            if after is not None:
                cursor = sa.tuple_(sa.literal(created_at(db, after, owner), sa.Double), sa.literal(after, sa.Text))
                query = query.where(sa.tuple_(*columns) < cursor if order == "desc" else sa.tuple_(*columns) > cursor)
            rows = db.execute(query).all()
            shown = rows[:limit]
            position = positions(db, shown)
        return Page(tuple(job_of(row, position.get(row.id)) for row in shown), len(rows) > limit)

    def cancel(self, id: str, owner: str | None) -> Job | None:
        """Stop a job. A queued one has failed at once, code "cancelled"; a running one is told with its next heartbeat; a
        finished one stays as it is. Returns the job as it is now, or None."""
        with self._database.write() as db:
            now = self._clock()
            job = find_job(db, id, owner, lock=True)
            if job is None or job.cancelled or job.state in ("completed", "failed"):
                return job
            if job.state == "queued":
                return end_job(db, id, "failed", now, error=text_of(CANCELLED), cancelled=True)
            return change_job(db, id, "progress", now, cancelled=True)

    def delete(self, id: str, owner: str | None) -> Job | None:
        """Wipe a job with its request and events; a worker that still renders it is fenced off. Returns what it was."""
        with self._database.write() as db:
            job = find_job(db, id, owner, lock=True)
            if job is None:
                return None
            sequence = next_sequence(db)
            db.execute(delete(EVENTS).where(EVENTS.c.job == id))
            db.execute(delete(JOBS).where(JOBS.c.id == id))
            record(db, sequence, job, "deleted", self._clock())
        self._database.scrub()
        return job

    def move(self, id: str, owner: str | None, place: int) -> Job | None:
        """Move a queued job to `place`, 1 is next. Returns the job as it is now, or None.

        Only the places of `owner`'s own jobs are dealt out anew, so nobody else's job waits longer: the job gets the first of
        these at or behind `place`, else the last.
        """
        with self._database.write() as db:
            queued = select(JOBS.c.id, JOBS.c.owner, JOBS.c.place).where(JOBS.c.state == "queued").order_by(JOBS.c.id)
            queue = sorted(db.execute(queued.with_for_update()).all(), key=lambda row: row.place)
            own = [(number, row) for number, row in enumerate(queue, 1) if owner in (None, row.owner)]
            ids = [row.id for _, row in own if row.id != id]
            if len(ids) == len(own):
                return find_job(db, id, owner)  # absent, another owner's, or no longer queued
            ids.insert(next((n for n, (number, _) in enumerate(own) if number >= place), len(ids)), id)
            moved = [{"row": name, "to": row.place} for name, (_, row) in zip(ids, own, strict=True) if name != row.id]
            if moved:
                statement = update(JOBS).where(JOBS.c.id == sa.bindparam("row")).values(place=sa.bindparam("to"))
                db.execute(statement, moved)
            return tell(db, id, "queued", self._clock())

    def pause(self, paused: bool) -> None:
        """Stop or resume handing out jobs; running ones go on."""
        with self._database.write() as db:
            db.execute(update(NUMBERS).where(NUMBERS.c.name == "paused").values(value=int(paused)))

    def paused(self) -> bool:
        """Whether the queue is paused."""
        with self._database.read() as db:
            return _paused(db)

    def line(self, most: int) -> tuple[list[Job], list[Job], bool]:
        """The jobs that are being made, the first `most` of the queue in their order, and whether it is paused."""
        with self._database.read() as db:
            running = db.execute(select(JOBS).where(JOBS.c.state == "in_progress")).all()
            queued = db.execute(select(JOBS).where(JOBS.c.state == "queued").order_by(JOBS.c.place).limit(most)).all()
            return [job_of(row, None) for row in running], [job_of(row, n) for n, row in enumerate(queued, 1)], _paused(db)

    def counts(self, owner: str | None = None) -> dict[str, int]:
        """How many jobs are in each state, and "oldest_queued_age": how many seconds the oldest queued one has waited."""
        whose = sa.true() if owner is None else JOBS.c.owner == owner
        counts = {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0}
        with self._database.read() as db:
            for state, number in db.execute(select(JOBS.c.state, func.count()).where(whose).group_by(JOBS.c.state)):
                counts[state] = number
            oldest = db.scalar(select(func.min(JOBS.c.created_at)).where(JOBS.c.state == "queued", whose))
        return counts | {"oldest_queued_age": 0 if oldest is None else max(0, int(self._clock() - oldest))}

    def queued_for_others(self, systems: Collection[str]) -> dict[str, int]:
        """How many jobs wait for each system that is none of these."""
        others = (JOBS.c.state == "queued") & JOBS.c.system.not_in(("", *systems))
        with self._database.read() as db:
            rows = db.execute(select(JOBS.c.system, func.count()).where(others).group_by(JOBS.c.system).order_by(JOBS.c.system))
            return {row[0]: row[1] for row in rows}

    def totals(self) -> dict[Total, int]:
        """What was counted since there is this store, by all processes."""
        with self._database.read() as db:
            rows = db.execute(select(NUMBERS.c.name, NUMBERS.c.value).where(NUMBERS.c.name.in_(TOTALS))).all()
        found = {row.name: row.value for row in rows}
        return {name: found[name] for name in TOTALS}

    def count(self, counted: Mapping[Total, int]) -> None:
        """Add to the totals."""
        with self._database.write() as db:
            add(db, counted)

    def probe(self) -> None:
        """Write something of no meaning, to see that the database takes what is written: one that can only be read raises
        `StorageFull`."""
        with self._database.write() as db:
            db.execute(update(NUMBERS).where(NUMBERS.c.name == "probes").values(value=NUMBERS.c.value + 1))

    def events(
        self, after: int = 0, owner: str | None = None, job: str | None = None, limit: int = 500
    ) -> list[tuple[int, str, dict[str, Any]]]:
        """What happened behind sequence `after`, in order: (sequence, job id, facts).

        facts["type"] is video.queued, .in_progress, .progress, .preview, .completed, .failed or .deleted, for pictures too; the
        other facts are the job's id, kind, state, progress, attempt, cancelled, error, created_at, and the time `at`.
        """
        query = select(EVENTS.c.sequence, EVENTS.c.job, EVENTS.c.facts).where(EVENTS.c.sequence > after)
        if owner is not None:
            query = query.where(EVENTS.c.owner == owner)
        if job is not None:
            query = query.where(EVENTS.c.job == job)
        with self._database.read() as db:
            rows = db.execute(query.order_by(EVENTS.c.sequence).limit(limit)).all()
        return [(row.sequence, row.job, json.loads(row.facts)) for row in rows]

    def last_event(self) -> int:
        """The sequence of the newest event; 0 when there was none."""
        with self._database.read() as db:
            return db.scalar(select(NUMBERS.c.value).where(NUMBERS.c.name == "events")) or 0

    # The workers' side.

    def claim(
        self, worker: str, *, kinds: Sequence[str] = ("video", "image"), systems: Sequence[str] | None = None
    ) -> Claim | None:
        """The next job of these kinds, leased to `worker`; None when there is none or the queue is paused.

        With `systems` only jobs for one of these, or for no system by name; those of others wait for a worker that has theirs.
        Jobs of a key of which as many run as may (`running` of its document) wait, and those behind them go first.
        """
        with self._database.read() as db:  # idle workers ask often and should not hold up those who write
            worth = (ran_out(self._clock()), _waiting(db, kinds, systems))
            if all(db.execute(select(JOBS.c.id).where(one).limit(1)).first() is None for one in worth):
                return None
        with self._database.write() as db:
            self._database.alone(db)  # two that claim at once would each see room for one more of a key
            now = self._clock()  # a lease counts from here, not from when the wait for the other writers began
            self._take_back(db, now)
            if _paused(db):
                return None
            waiting = _waiting(db, kinds, systems)
            first = select(JOBS.c.id, JOBS.c.attempt).where(waiting).order_by(JOBS.c.place).limit(1)
            row = db.execute(first.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            self._see(db, worker, row.id, now)
            values = {"worker": worker, "attempt": row.attempt + 1, "lease_until": now + self._lease, "started_at": now}
            job = change_job(db, row.id, "in_progress", now, state="in_progress", **values)
            add(db, {"attempts": 1})
        return Claim(job, worker, job.attempt, now + self._lease)

    def heartbeat(
        self,
        claim: Claim,
        *,
        progress: int | None = None,
        preview: Asset | None = None,
        counted: Mapping[Total, int] | None = None,
    ) -> Signal:
        """Move the lease on and say how far the work is, in percent; a lower value than before is ignored, 100 counts as 99.

        A preview is the job's only output until the job ends. What the worker `counted` since it last said so is added to the
        totals, whether the claim is still good or not.
        """
        with self._database.write() as db:
            now = self._clock()
            held = held_row(db, claim)
            self._see(db, claim.worker, None if held is None else held.id, now)
            if held is not None:
                db.execute(update(JOBS).where(JOBS.c.id == held.id).values(lease_until=now + self._lease))
                if progress is not None and min(progress, 99) > held.progress:
                    change_job(db, held.id, "progress", now, progress=min(progress, 99))
                if preview is not None:
                    change_job(db, held.id, "preview", now, outputs=text_of([dataclasses.asdict(preview)]))
            add(db, counted or {})
        return Signal(lost=held is None, cancelled=held is not None and held.cancelled)

    def finish(self, claim: Claim, outputs: Sequence[Asset], result: dict[str, Any], expires_at: float | None = None) -> bool:
        """Publish what was made: the job is completed, and its event and its webhooks' documents are written with it.

        False: the claim was lost and nothing changed, or the job was cancelled meanwhile and has now failed as such.
        """
        made, said = text_of([dataclasses.asdict(asset) for asset in outputs]), text_of(result)
        with self._database.write() as db:
            now = self._clock()
            held = held_row(db, claim)
            if held is None:
                return False
            self._see(db, claim.worker, None, now)
            if held.cancelled:
                end_job(db, held.id, "failed", now, error=text_of(CANCELLED))
                return False
            end_job(db, held.id, "completed", now, progress=100, outputs=made, result=said, expires_at=expires_at)
            return True

    def fail(self, claim: Claim, code: str, message: str) -> bool:
        """The job has failed; event and webhooks as with `finish`. False: the claim was lost, nothing changed."""
        with self._database.write() as db:
            now = self._clock()
            held = held_row(db, claim)
            if held is None:
                return False
            self._see(db, claim.worker, None, now)
            end_job(db, held.id, "failed", now, error=text_of({"code": code, "message": message}))
            return True

    def damage(self, id: str, assets: Container[str]) -> Job | None:
        """Some of a film's files, by their ids, are no longer what was made. Returns the job as it is now; None when none of
        them is a finished job's.

        Without the film itself the job has failed, code "file_damaged", event and webhooks as with `fail`; its outputs are
        still named, so that what is left goes only when the job is deleted. A smaller file is just no longer among them.
        """
        with self._database.write() as db:
            job = find_job(db, id, None, lock=True)
            if job is None or job.state != "completed":
                return None
            good = [dataclasses.asdict(asset) for asset in job.outputs if asset.id not in assets]
            if len(good) == len(job.outputs):
                return None
            if any(asset.role in ("video", "image") and asset.id in assets for asset in job.outputs):
                kept = text_of([dataclasses.asdict(asset) for asset in job.outputs])
                return end_job(db, id, "failed", self._clock(), error=text_of(DAMAGED), progress=99, outputs=kept)
            db.execute(update(JOBS).where(JOBS.c.id == id).values(outputs=text_of(good)))
            return find_job(db, id, None)

    def release(self, claim: Claim) -> bool:
        """Give a job back, to its old place in the queue; it does not count as a crash. False: the claim was lost."""
        with self._database.write() as db:
            now = self._clock()
            held = held_row(db, claim)
            if held is None:
                return False
            self._see(db, claim.worker, None, now)
            requeue(db, held.id, held.cancelled, now)
            return True

    def sweep(self) -> int:
        """Take back the jobs whose lease ran out, and say how many: to their old places, or failed with code "worker_crashed"
        after the last attempt. Also forget what is older than a day and not needed. Call it every few seconds."""
        now = self._clock()
        past = EVENTS.c.type.in_(_PASSING) & (EVENTS.c.at < now - KEPT)
        silent = WORKERS.c.seen < now - KEPT
        number = 0
        if self._any(JOBS.c.id, ran_out(now)):
            with self._database.write() as db:
                number = self._take_back(db, self._clock())
        if self._any(EVENTS.c.sequence, past) or self._any(WORKERS.c.id, silent):
            with self._database.write() as db:
                db.execute(delete(WORKERS).where(silent))
                lock_events(db)
                db.execute(delete(EVENTS).where(past))
        return number

    def workers(self) -> list[dict[str, Any]]:
        """The workers of the last day: what they said of themselves (device, system), id, when they were seen, their job."""
        with self._database.read() as db:
            rows = db.execute(select(WORKERS).order_by(WORKERS.c.id)).all()
        return [json.loads(row.facts) | {"id": row.id, "seen": row.seen, "job": row.job} for row in rows]

    def hello(self, worker: str, facts: dict[str, Any]) -> None:
        """The worker is alive, with or without a job; `facts` says what it is (device, system)."""
        values = {"id": worker, "facts": text_of(facts), "seen": self._clock()}
        with self._database.write() as db:
            db.execute(self._database.upsert(WORKERS, values))

    # Documents beside the jobs.

    def put(self, collection: str, id: str, owner: str, document: dict[str, Any]) -> None:
        """Store a JSON document, or replace it. Collections: file, character, key, webhook_endpoint, outbox."""
        values = {"collection": collection, "id": id, "owner": owner, "put_at": self._clock(), "document": text_of(document)}
        with self._database.write() as db:
            db.execute(self._database.upsert(DOCUMENTS, values, keep=("put_at",)))

    def find(self, collection: str, id: str, owner: str | None) -> dict[str, Any] | None:
        """A document, or None."""
        query = _within(select(DOCUMENTS.c.document), collection, owner).where(DOCUMENTS.c.id == id)
        with self._database.read() as db:
            found = db.scalar(query)
        return None if found is None else json.loads(found)

    def all(self, collection: str, owner: str | None) -> list[dict[str, Any]]:
        """The documents of a collection, oldest first."""
        query = _within(select(DOCUMENTS.c.document), collection, owner).order_by(DOCUMENTS.c.put_at, DOCUMENTS.c.id)
        with self._database.read() as db:
            return [json.loads(document) for document in db.scalars(query)]

    def drop(self, collection: str, id: str, owner: str | None) -> bool:
        """Remove a document; False when there was none."""
        with self._database.write() as db:
            gone = db.execute(_within(delete(DOCUMENTS), collection, owner).where(DOCUMENTS.c.id == id)).rowcount > 0
        if gone and collection != "outbox":  # messages hold nothing that a person wrote
            self._database.scrub()
        return gone

    def referenced(self, owner: str | None = None, *, pictures: bool = True) -> set[str]:
        """The ids of all assets that a job or a document names; with `pictures=False` without those of jobs for pictures."""
        names: set[str] = set()
        jobs, documents = select(JOBS.c.request, JOBS.c.outputs), select(DOCUMENTS.c.document)
        if owner is not None:
            jobs, documents = jobs.where(JOBS.c.owner == owner), documents.where(DOCUMENTS.c.owner == owner)
        if not pictures:
            jobs = jobs.where(JOBS.c.kind != "image")
        with self._database.read() as db:
            for row in itertools.chain(db.execute(jobs), db.execute(documents)):
                names.update(name for column in row for name in _NAMED.findall(column))
        return names

    def stop(self, owner: str) -> int:
        """Cancel all unfinished jobs of an owner. Returns how many there were."""
        query = select(JOBS.c.id).where(JOBS.c.owner == owner, JOBS.c.state.in_(("queued", "in_progress")))
        with self._database.read() as db:
            found = list(db.scalars(query))
        for id in found:
            self.cancel(id, owner)
        return len(found)

    def _any(self, column: ColumnElement[Any], condition: ColumnElement[bool]) -> bool:
        with self._database.read() as db:
            return db.execute(select(column).where(condition).limit(1)).first() is not None

    def _see(self, db: Connection, worker: str, job: str | None, now: float) -> None:
        values = {"id": worker, "facts": "{}", "seen": now, "job": job}
        db.execute(self._database.upsert(WORKERS, values, keep=("facts",)))

    def _take_back(self, db: Connection, now: float) -> int:
        slept = seconds_slept()
        if slept - self._slept > 1:  # the machine was suspended: its workers could not beat, and go on now
            self._slept = slept
            running = update(JOBS).where(JOBS.c.state == "in_progress")
            db.execute(running.values(lease_until=now + self._lease))
        return take_back(db, now, self._attempts)


def seconds_slept() -> float:
    """How long this machine was suspended since it started; 0 where the system does not tell (Linux does)."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _known(
    db: Connection, owner: str, key: str | None, fingerprint: str | None, key_since: float, since: float | None
) -> Job | None:
    newest = SELECT.where(JOBS.c.owner == owner).order_by(JOBS.c.created_at.desc()).limit(1)
    row = None
    if key is not None:
        row = db.execute(newest.where(JOBS.c.key == key, JOBS.c.created_at >= key_since)).first()
        if row is not None and row.fingerprint != fingerprint:
            raise KeyConflict("this idempotency key came with another request before")
    elif fingerprint is not None and since is not None:
        row = db.execute(newest.where(JOBS.c.fingerprint == fingerprint, JOBS.c.created_at >= since)).first()
    return None if row is None else job_of(row, row.position)


def _overtook(db: Connection, owner: str, fingerprint: str, since: float) -> Job | None:
    """The job that a retry made with this fingerprint since then."""
    made = SELECT.where(JOBS.c.owner == owner, JOBS.c.fingerprint == fingerprint, JOBS.c.created_at >= since)
    jobs = (job_of(row, row.position) for row in db.execute(made.order_by(JOBS.c.created_at)))
    return next((job for job in jobs if job.request.get("retry")), None)


def _refuse_over(db: Connection, kind: str, owner: str, cap: int | None, own_cap: int | None) -> None:
    unfinished = select(func.count()).select_from(JOBS).where(JOBS.c.state.in_(("queued", "in_progress")))
    full = cap is not None and db.execute(unfinished).scalar_one() >= cap
    if own_cap is not None and not full:
        full = db.execute(unfinished.where(JOBS.c.owner == owner)).scalar_one() >= own_cap
    if full:
        # There is room when the next one is done, which takes no longer than one takes of late.
        took = select(JOBS.c.completed_at - JOBS.c.started_at).where(JOBS.c.kind == kind, JOBS.c.state == "completed")
        seconds = db.execute(took.order_by(JOBS.c.created_at.desc()).limit(10)).scalars().all()
        raise QueueFull(min(60, max(1, math.ceil(sum(seconds) / len(seconds)))) if seconds else 10)


def _waiting(db: Connection, kinds: Sequence[str], systems: Sequence[str] | None) -> ColumnElement[bool]:
    """Which jobs could be begun now."""
    ready = (JOBS.c.state == "queued") & JOBS.c.kind.in_(kinds)
    if systems is not None:
        ready &= JOBS.c.system.in_(("", *systems))
    running = select(JOBS.c.owner, func.count()).where(JOBS.c.state == "in_progress").group_by(JOBS.c.owner)
    busy = []
    for owner, number in db.execute(running).all():
        key = db.scalar(_within(select(DOCUMENTS.c.document), KEYS, None).where(DOCUMENTS.c.id == owner))
        most = None if key is None else json.loads(key).get("running")
        if most is not None and number >= most:
            busy.append(owner)
    return ready & JOBS.c.owner.not_in(busy) if busy else ready


def _paused(db: Connection) -> bool:
    return bool(db.scalar(select(NUMBERS.c.value).where(NUMBERS.c.name == "paused")))


_Query = TypeVar("_Query", sa.Select[Any], sa.Delete)


def _within(query: _Query, collection: str, owner: str | None) -> _Query:
    query = query.where(DOCUMENTS.c.collection == collection)
    return query if owner is None else query.where(DOCUMENTS.c.owner == owner)
