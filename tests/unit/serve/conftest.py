"""Job stores, on SQLite and on a real PostgreSQL; a tiny system, and a place where workers make its films."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import postgres_server
import pytest
from jobs_rig import Clock
from postgres_server import Absent, as_operator, new_schema
from render_rig import save_tiny
from worker_rig import Place, hurry, placed

from tubelet.generate.system import System, load
from tubelet.serve.jobs import Jobs


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The folder of the socket of a PostgreSQL server that lives as long as this file's tests."""
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(postgres_server.running())
        except Absent as absent:
            pytest.skip(str(absent))
        yield folder


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tubelet.db'}"


@pytest.fixture
def postgres_url(postgres: str) -> str:
    return new_schema(postgres)


@pytest.fixture
def postgres_database(postgres: str) -> str:
    """The name of a database of its own."""
    name = f"t{time.monotonic_ns()}"
    as_operator(postgres, f"CREATE DATABASE {name}")
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")


@pytest.fixture
def other_url(url: str, request: pytest.FixtureRequest) -> str:
    """A second empty database of the same kind."""
    return f"{url}.other" if url.startswith("sqlite") else new_schema(request.getfixturevalue("postgres"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Jobs]:
    opened = Jobs.open(url, clock=clock)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return load(save_tiny(tmp_path_factory.mktemp("systems") / "tiny"), device="cpu", dtype="float32")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    hurry(monkeypatch)
    with placed(tmp_path) as place:
        yield place
