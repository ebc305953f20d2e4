"""Between rows and records: how a job is read with its place in the queue, how ids, JSON and event numbers are made."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, case, func, null, select, update

from tubelet.serve.records import Asset, Job, Total
from tubelet.serve.tables import EVENTS, JOBS, NUMBERS

_LETTERS = string.digits + string.ascii_lowercase
_ID = re.compile(r"[a-z]+_[0-9a-z]{26}")
_AHEAD = JOBS.alias("ahead")

_POSITION = case(
    (
        JOBS.c.state == "queued",
        select(func.count())
        .select_from(_AHEAD)
        .where(_AHEAD.c.state == "queued", _AHEAD.c.place <= JOBS.c.place)
        .correlate(JOBS)
        .scalar_subquery(),
    ),
    else_=null(),
).label("position")

SELECT = select(JOBS, _POSITION)
"""Whole jobs, and "position", their place in the queue, 1 is next."""


def new_id(kind: str, now: float) -> str:
    """`kind`, "_" and 26 of [0-9a-z]: ten for the microsecond (until the year 2085), sixteen drawn (82 bits)."""
    stamp = int(now * 1e6)
    time = "".join(_LETTERS[stamp // 36**power % 36] for power in range(9, -1, -1))
    return f"{kind}_{time}{''.join(secrets.choice(_LETTERS) for _ in range(16))}"


def born(id: str) -> float | None:
    """Unix seconds of when an id was made, by what it says itself; None for what is no id."""
    return int(id.partition("_")[2][:10], 36) / 1e6 if _ID.fullmatch(id) else None


def kind_of(id: str) -> str:
    """The kind that an id was made for."""
    return id.partition("_")[0]


def text_of(value: Any) -> str:
    """JSON as text. Raises ValueError or TypeError for what JSON cannot hold, NaN included."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def positions(db: Connection, rows: Sequence[Row[Any]]) -> dict[str, int]:
    """Id -> position, for the queued among rows of the table: counted for all at once, where `SELECT` counts each."""
    queued = {row.place: row.id for row in rows if row.state == "queued"}
    if not queued:
        return {}
    waiting, first, last = JOBS.c.state == "queued", min(queued), max(queued)
    ahead = db.execute(select(func.count()).select_from(JOBS).where(waiting, JOBS.c.place < first)).scalar_one()
    between = select(JOBS.c.place).where(waiting, JOBS.c.place.between(first, last)).order_by(JOBS.c.place)
    return {queued[place]: number for number, place in enumerate(db.scalars(between), ahead + 1) if place in queued}


def job_of(row: Row[Any], position: int | None) -> Job:
    """The job in a row of the table."""
    return Job(
        id=row.id,
        owner=row.owner,
        state=row.state,
        progress=row.progress,
        request=json.loads(row.request),
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        expires_at=row.expires_at,
        attempt=row.attempt,
        error=None if row.error is None else json.loads(row.error),
        outputs=tuple(Asset(**asset) for asset in json.loads(row.outputs)),
        result=json.loads(row.result),
        parent=row.parent,
        cancelled=row.cancelled,
        position=position,
        request_id=row.request_id,
        traceparent=row.traceparent,
    )


def find_job(db: Connection, id: str, owner: str | None, *, lock: bool = False) -> Job | None:
    """A job, or None when it is absent or another owner's; with `lock` nobody else changes it in this transaction."""
    query = SELECT.where(JOBS.c.id == id)
    if owner is not None:
        query = query.where(JOBS.c.owner == owner)
    row = db.execute(query.with_for_update() if lock else query).first()
    return None if row is None else job_of(row, row.position)


def created_at(db: Connection, id: str, owner: str | None) -> float:
    """When a job was created, one deleted lately included. Raises LookupError when it is unknown or another owner's."""
    found = db.execute(select(JOBS.c.created_at, JOBS.c.owner).where(JOBS.c.id == id)).first()
    if found is None:
        trace = select(EVENTS.c.facts, EVENTS.c.owner).where(EVENTS.c.job == id, EVENTS.c.type == "video.deleted")
        found = db.execute(trace).first()
    if found is None or owner not in (None, found.owner):
        raise LookupError(f"there is no job {id}")
    return found[0] if isinstance(found[0], float) else json.loads(found[0])["created_at"]


def lock_events(db: Connection) -> None:
    """Take the counter of events for the rest of the transaction."""
    db.execute(select(NUMBERS.c.value).where(NUMBERS.c.name == "events").with_for_update())


def next_sequence(db: Connection) -> int:
    """The sequence of a new event. The counter stays taken until the transaction ends; undone, it leaves no gap."""
    counted = update(NUMBERS).where(NUMBERS.c.name == "events").values(value=NUMBERS.c.value + 1)
    return db.execute(counted.returning(NUMBERS.c.value)).scalar_one()


def add(db: Connection, counted: Mapping[Total, int]) -> None:
    """Add to totals. They stay taken until the transaction ends, so this comes last in it."""
    for name in sorted(counted):
        counter = update(NUMBERS).where(NUMBERS.c.name == name)
        db.execute(counter.values(value=NUMBERS.c.value + counted[name]))
