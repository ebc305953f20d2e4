"""One SQL database, SQLite or PostgreSQL: how it is opened, read and written. What is committed is on the disk.

SQLite runs in WAL mode with synchronous=FULL and has one writer at a time, so a write begins with BEGIN IMMEDIATE: it waits for
its turn at the start and never finds in the middle that it has read something old.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Insert,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from tubelet.core.errors import UserError
from tubelet.serve.records import StorageFull
from tubelet.serve.tables import NUMBERS, SCHEMA, STEPS, make_tables

PATIENCE = 10.0
"""Seconds to wait for another writer."""
HELD = 8
"""Connections that stay open; more are opened for a while when all are busy."""

_SQLITE_CODES = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
}
# Connection lost, out of resources, stopped by the operator, system error; read-only, idle too long, lock not given.
_POSTGRES_CLASSES = ("08", "53", "57", "58")
_POSTGRES_CODES = ("25006", "25P03", "55P03")
_MIGRATION_LOCK, _CLAIM_LOCK = 0x7475_6265, 0x7475_6266


class Database:
    """Transactions on one database, from any thread. Make it with `open`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turns = _Turns()
        self._writer = engine.execution_options(writes=True)

    @classmethod
    def open(cls, url: str) -> Database:
        """Open `sqlite:///FILE` (made with mode 0600 when absent) or `postgresql://...`, and bring its tables up to date.

        Raises UserError when it cannot be opened, has no room for the tables, or was written by a newer tubelet.
        """
        database = cls(_engine(url))
        try:
            database._migrate()
            database._connect()
        except DBAPIError as error:
            database.close()
            raise UserError(
                f"cannot open the database {database.place}: {_reason(error)}; check its address and that there is room"
            ) from error
        except BaseException:
            database.close()
            raise
        return database

    def _connect(self) -> None:
        """Open the connections that are held, so that memory and files do not grow with the first hours."""
        if self._engine.dialect.name == "sqlite":
            with contextlib.ExitStack() as stack:
                for _ in range(HELD):
                    stack.enter_context(self._engine.connect())

    @property
    def place(self) -> str:
        """The address, without a password."""
        return self._engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises StorageFull when the database cannot be reached."""
        with _telling(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block, and undone when the block raises.

        Raises StorageFull, with nothing written, when the disk is full, or the database is read-only, cannot be reached, or is
        kept locked by another program for ten seconds.
        """
        with self._in_turn(), _telling(), self._writer.begin() as connection:
            yield connection

    def upsert(self, table: Table, values: dict[str, Any], keep: tuple[str, ...] = ()) -> Insert:
        """Insert a row, or replace all but the `keep` columns of the row that has its primary key."""
        dialect = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        statement = dialect.insert(table).values(values)
        names = [column.name for column in table.primary_key]
        new = {name: statement.excluded[name] for name in values if name not in (*names, *keep)}
        return statement.on_conflict_do_update(index_elements=names, set_=new)

    def alone(self, connection: Connection) -> None:
        """In a transaction that writes: wait until no other one that called this goes on. On SQLite there is never another."""
        if self._engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CLAIM_LOCK})

    def scrub(self) -> None:
        """Let deleted text vanish from the files: on SQLite empty the write-ahead log, unless a reader is in the way."""
        if self._engine.dialect.name != "sqlite":
            return
        raw = self._engine.raw_connection()
        try:
            cursor = raw.cursor()
            with contextlib.suppress(sqlite3.OperationalError):
                cursor.execute("PRAGMA busy_timeout = 1000")
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            cursor.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}")
            cursor.close()
        finally:
            raw.close()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """On SQLite the writing threads of a process queue up here, in memory, where they do not poll the file's lock."""
        if self._engine.dialect.name != "sqlite":
            yield
            return
        if not self._turns.take(PATIENCE):
            raise StorageFull("the database cannot be used now: the disk does not keep up")
        try:
            yield
        finally:
            self._turns.give()

    def _migrate(self) -> None:
        with self._engine.connect() as connection:
            version = _version(connection)
        if version < SCHEMA:
            with self._writer.begin() as connection:  # all of it or, whatever ends this process, nothing
                if connection.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
                version = _version(connection)  # another process may have been here meanwhile
                if version == 0:
                    make_tables(connection)
                elif version < SCHEMA:
                    for statement in itertools.chain.from_iterable(STEPS[version - 1 :]):
                        plain = statement if isinstance(statement, str) else statement[connection.dialect.name]
                        connection.exec_driver_sql(plain)
                    connection.execute(update(NUMBERS).where(NUMBERS.c.name == "schema").values(value=SCHEMA))
        if version > SCHEMA:
            raise UserError(
                f"the database {self.place} was written by a newer tubelet (schema {version}, this one knows {SCHEMA}); "
                "update tubelet or choose another folder"
            )


class _Turns:
    """A lock that goes to who asked first. A plain one goes to whoever is quick, and an unlucky thread waits for hundreds."""

    def __init__(self) -> None:
        self._inside = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def take(self, patience: float) -> bool:
        """Wait for the turn; False when it did not come within `patience` seconds."""
        with self._inside:
            if not self._taken:
                self._taken = True
                return True
            called = threading.Event()
            self._waiting.append(called)
        if called.wait(patience):
            return True
        with self._inside:
            if called.is_set():  # in the last moment
                return True
            self._waiting.remove(called)
            return False

    def give(self) -> None:
        """Let the next one have it."""
        with self._inside:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


def _version(connection: Connection) -> int:
    if not inspect(connection).has_table(NUMBERS.name):
        return 0
    return connection.scalar(select(NUMBERS.c.value).where(NUMBERS.c.name == "schema")) or 0


def _engine(url: str) -> Engine:
    try:
        address = make_url(url)
        if address.drivername in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        if address.drivername == "postgresql+psycopg":
            engine = create_engine(address, pool_size=HELD, max_overflow=32, pool_pre_ping=True)
            event.listen(engine, "connect", _prepare_postgres)
            return engine
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"{url!r} is no database address; write sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    except ModuleNotFoundError as error:
        raise UserError("PostgreSQL needs psycopg; run pip install 'tubelet[postgres]'") from error
    if address.get_backend_name() != "sqlite":
        raise UserError(f"{address.get_backend_name()} is not supported; write sqlite:///FILE or postgresql://USER@HOST/NAME")
    if address.database in (None, "", ":memory:"):
        raise UserError("jobs must outlive the server, so they need a file; write sqlite:///FILE")
    if not address.database.startswith("file:"):
        path = Path(address.database)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch(mode=0o600)  # prompts and hashed keys are nobody else's business
        except OSError as error:
            raise UserError(f"cannot make {path}: {error.strerror or error}; choose another folder or make room") from error
    engine = create_engine(address, pool_size=HELD, max_overflow=32, connect_args={"timeout": PATIENCE})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(raw: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    raw.isolation_level = None  # transactions are begun below, not by the driver
    until = time.monotonic() + PATIENCE
    while True:
        try:
            raw.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait by itself when two programs switch a new file to WAL at once.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
    raw.execute("PRAGMA synchronous = FULL")
    raw.execute("PRAGMA secure_delete = ON")
    # Pages of every connection are copies of what the system caches of the file: by default up to 2 MiB each, for ever.
    raw.execute("PRAGMA cache_size = -256")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _prepare_postgres(raw: Any, _: ConnectionPoolEntry) -> None:
    with raw.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {int(PATIENCE * 1000)}")
        # A stopped process must not keep its locks; its transaction is undone, and it finds out when it goes on.
        cursor.execute(f"SET idle_in_transaction_session_timeout = {int(PATIENCE * 1000)}")
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    raw.commit()


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Turn what a driver says of a full, read-only, locked or lost database into StorageFull."""
    try:
        yield
    except DBAPIError as error:
        if _unwritable(error):
            raise StorageFull(f"the database cannot be used now: {_reason(error)}") from error
        raise


def _reason(error: DBAPIError) -> str:
    """What the driver says, in one line."""
    return (str(error.orig).strip().splitlines() or ["no reason given"])[0]


def _unwritable(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_CODES
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, OperationalError)  # the server did not answer
    return state.startswith(_POSTGRES_CLASSES) or state in _POSTGRES_CODES
