"""A real PostgreSQL for the length of a test, where its programs are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa


class Absent(Exception):  # noqa: N818  a reason to skip, not a defect
    """There can be no server here, and why."""


@contextlib.contextmanager
def running() -> Iterator[str]:
    """A server without durability, as the folder of its socket. Raises Absent."""
    programs = _programs()
    if programs is None:
        raise Absent("no PostgreSQL programs on this machine")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    before: list[str] = []
    try:
        if os.geteuid() == 0:  # the server refuses to run as root
            if shutil.which("setpriv") is None:
                raise Absent("PostgreSQL does not run as root, and there is no setpriv to become someone else")
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            before = ["setpriv", "--pdeathsig=INT", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        data = folder / "data"
        make = [programs / "initdb", "-D", data, "-U", "tubelet", "-A", "trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        made = subprocess.run([*before, *make], cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise Absent(f"initdb does not run here: {made.stderr.strip()[-200:]}")
        serve = [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen([*before, *serve], cwd=folder, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while not ((folder / ".s.PGSQL.5432").exists() and _answers(str(folder))):
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.02)
            yield str(folder)
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: what it holds is thrown away
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def address(folder: str, name: str) -> str:
    """The URL of a database of the server."""
    return f"postgresql://tubelet@/{name}?host={folder}"


def new_schema(folder: str) -> str:
    """The URL of an empty schema of its own, which is much cheaper than a database."""
    name = f"t{time.monotonic_ns()}"
    as_operator(folder, f"CREATE SCHEMA {name}")
    return f"{address(folder, 'postgres')}&options=-csearch_path%3D{name}"


def as_operator(folder: str, statement: str) -> None:
    """Run a statement that needs no transaction."""
    engine = sa.create_engine(address(folder, "postgres").replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)


def _programs() -> Path | None:
    for folder in [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/bin"), Path("/usr/bin")]:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    return None


def _answers(folder: str) -> bool:
    try:
        as_operator(folder, "SELECT 1")
    except sa.exc.OperationalError:
        return False
    return True
