"""The tables of the job store, and the steps that bring an older database up to date. JSON is text, times are unix seconds."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import BigInteger, Boolean, Column, Connection, Double, Index, Integer, MetaData, Table, Text, insert

_METADATA = MetaData()

# Counters: "schema", the version of these tables; "events", the last sequence given out; "paused", 0 or 1.
NUMBERS = Table(
    "numbers",
    _METADATA,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)

JOBS = Table(
    "jobs",
    _METADATA,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("progress", Integer, nullable=False, default=0),
    Column("request", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("error", Text),
    Column("outputs", Text, nullable=False, default="[]"),
    Column("result", Text, nullable=False, default="{}"),
    Column("parent", Text),
    Column("cancelled", Boolean, nullable=False, default=False),
    # The queue runs by place. A job keeps its place while it is worked on, so that it goes back to where it was.
    Column("place", BigInteger, nullable=False),
    Column("worker", Text),
    Column("lease_until", Double),
    Column("attempt", Integer, nullable=False, default=0),  # claims so far
    Column("crashes", Integer, nullable=False, default=0),  # leases that ran out
    Column("key", Text),
    Column("fingerprint", Text),
    Index("jobs_queue", "state", "place"),
    Index("jobs_page", "kind", "created_at", "id"),
    Index("jobs_owner_page", "owner", "kind", "created_at", "id"),
    Index("jobs_key", "owner", "key"),
    Index("jobs_fingerprint", "owner", "fingerprint"),
)

EVENTS = Table(
    "events",
    _METADATA,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("job", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("facts", Text, nullable=False),
    Index("events_job", "job", "sequence"),
    Index("events_owner", "owner", "sequence"),
    Index("events_age", "type", "at"),
)

WORKERS = Table(
    "workers",
    _METADATA,
    Column("id", Text, primary_key=True),
    Column("facts", Text, nullable=False),
    Column("seen", Double, nullable=False),
    Column("job", Text),
)

DOCUMENTS = Table(
    "documents",
    _METADATA,
    Column("collection", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("put_at", Double, nullable=False),
    Column("document", Text, nullable=False),
)


def _first(connection: Connection) -> None:
    _METADATA.create_all(connection)
    connection.execute(insert(NUMBERS), [{"name": name, "value": 0} for name in ("schema", "events", "paused")])


STEPS: tuple[Callable[[Connection], None], ...] = (_first,)
"""Step n turns a database of schema n into schema n + 1; an empty database has schema 0."""
