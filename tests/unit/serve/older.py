"""Job stores as earlier versions wrote them, and how to see that a database is a whole one of its version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa

TABLES = ("numbers", "jobs", "events", "workers", "documents")
NUMBERS = ("events", "paused")
"""Counters of schema 1, beside its version."""
_MORE = """
INSERT INTO jobs
    (id, kind, owner, state, progress, request, created_at, outputs, result, cancelled, place, attempt, crashes)
WITH RECURSIVE more (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM more WHERE n < {number})
SELECT substr(id, 1, 22) || substr(CAST(10000000000 + n AS TEXT), 2), kind, 'local', 'queued', 0, request,
    created_at + n, '[]', '{{}}', FALSE, 1000 + n, 0, 0
FROM jobs, more WHERE kind = 'video' AND state = 'queued'
"""


def write_schema_1(url: str, more: int = 0) -> None:
    """Fill an empty database with the tables and rows of schema 1, and `more` queued jobs."""
    text = (Path(__file__).parent / "schema_1.sql").read_text(encoding="utf-8")
    statements = [part for part in text.split(";\n") if part.strip()]
    if more:
        statements.append(_MORE.format(number=more))
    with engine(url).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def shape(url: str) -> tuple[int | None, dict[str, Any]]:
    """The version that a database says it has, and its tables: columns, whether they may be null, and indexes."""
    opened = engine(url)
    tables: dict[str, Any] = {}
    inspector = sa.inspect(opened)
    for table in sorted(inspector.get_table_names()):
        columns = {column["name"]: (column["type"].python_type, column["nullable"]) for column in inspector.get_columns(table)}
        indexes = {index["name"]: index["column_names"] for index in inspector.get_indexes(table)}
        tables[table] = columns, indexes, inspector.get_pk_constraint(table)["constrained_columns"]
    if "numbers" not in tables:
        return None, tables
    with opened.connect() as connection:
        return connection.exec_driver_sql("SELECT value FROM numbers WHERE name = 'schema'").scalar_one(), tables


def rows(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in the columns and counters that schema 1 had, but the version."""
    text = (Path(__file__).parent / "schema_1.sql").read_text(encoding="utf-8")
    tables = re.findall(r"TABLE (\w+) \((.*?)\);", text, re.S)
    made = {name: re.findall(r"^    ([a-z_]+) ", body, re.M) for name, body in tables}
    found: dict[str, list[tuple[Any, ...]]] = {}
    with engine(url).connect() as connection:
        for table in TABLES:
            which = f" WHERE name IN {NUMBERS}" if table == "numbers" else ""
            every = connection.exec_driver_sql(f"SELECT {', '.join(made[table])} FROM {table}{which}")
            found[table] = sorted((tuple(row) for row in every), key=repr)
    return found


def engine(url: str) -> sa.Engine:
    """A plain connection, with nothing of ours in between."""
    return sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
