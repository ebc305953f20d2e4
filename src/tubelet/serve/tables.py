"""The tables of the job store, and the steps that bring older ones up to date. JSON is text, times are unix seconds."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import BigInteger, Boolean, Column, Connection, Double, Index, Integer, MetaData, Table, Text, insert

from tubelet.serve.records import TOTALS

_METADATA = MetaData()

# Counters: "schema", the version of these tables; "events", the last sequence given out; "paused", 0 or 1; "probes", writes
# that only tried whether the database takes any; and the totals.
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
    Column("request_id", Text),
    Column("traceparent", Text),
    Column("system", Text, nullable=False, server_default=""),  # the system that it is for; empty: any
    Index("jobs_queue", "state", "place"),
    Index("jobs_of_system", "state", "system", "place"),
    Index("jobs_age", "state", "created_at"),
    Index("jobs_of_owner", "owner", "state"),
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
    Index("documents_of_owner", "owner"),
)


STEPS: tuple[tuple[str | Mapping[str, str], ...], ...] = (
    # A full queue says when to come again, how long the oldest has waited and what is a key's own, with 10,000 jobs too.
    ("CREATE INDEX jobs_age ON jobs (state, created_at)", "CREATE INDEX jobs_of_owner ON jobs (owner, state)"),
    # What a key keeps is counted from its jobs and documents.
    ("CREATE INDEX documents_of_owner ON documents (owner)",),
    # A worker's log lines name the request that a job came with; what is counted outlives the processes that count.
    (
        "ALTER TABLE jobs ADD COLUMN request_id TEXT",
        "ALTER TABLE jobs ADD COLUMN traceparent TEXT",
        "INSERT INTO numbers (name, value) VALUES ('probes', 0), ('attempts', 0), ('leases_lost', 0), ('steps', 0), "
        "('signed', 0), ('out_of_memory', 0)",
    ),
    # Workers take the jobs of the system that they have.
    (
        "ALTER TABLE jobs ADD COLUMN system TEXT NOT NULL DEFAULT ''",
        {
            "sqlite": "UPDATE jobs SET system = coalesce(json_extract(request, '$.system'), '')",
            "postgresql": "UPDATE jobs SET system = coalesce(CAST(request AS json) ->> 'system', '')",
        },
        "CREATE INDEX jobs_of_system ON jobs (state, system, place)",
    ),
)
"""What turns tables of schema n + 1 into those of n + 2, statement by statement, where need be by the name of the dialect. A
step stays as it was written."""

SCHEMA = 1 + len(STEPS)
"""The version of the tables above."""


def make_tables(connection: Connection) -> None:
    """Make the tables in an empty database."""
    _METADATA.create_all(connection)
    numbers = {"schema": SCHEMA, **dict.fromkeys(("events", "paused", "probes", *TOTALS), 0)}
    connection.execute(insert(NUMBERS), [{"name": name, "value": value} for name, value in numbers.items()])
