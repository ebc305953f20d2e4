"""The database under the job store: opened, updated, refused, full, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import full_disk
import older
import pytest
from jobs_rig import FILM, at_once, new, now
from postgres_server import address, as_operator

from tubelet.core.errors import UserError
from tubelet.serve import database
from tubelet.serve.database import HELD
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import StorageFull


def test_many_may_open_a_new_database_at_once(url: str) -> None:
    opened = at_once(6, lambda n: Jobs.open(url))
    assert [type(one) for one in opened] == [Jobs] * 6
    new(opened[0])
    assert [one.counts()["queued"] for one in opened] == [1] * 6
    for one in opened:
        one.close()


def test_a_newer_database_is_left_alone(url: str) -> None:
    Jobs.open(url).close()
    with older.engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE numbers SET value = 99 WHERE name = 'schema'")
    before = older.shape(url), older.rows(url)
    with pytest.raises(UserError, match=r"^[^\n]* written by a newer tubelet \(schema 99, .*\); update tubelet or [^\n]*$"):
        Jobs.open(url)
    assert (older.shape(url), older.rows(url)) == before


def test_an_older_database_becomes_what_a_new_one_is_and_keeps_every_row(url: str, other_url: str) -> None:
    older.write_schema_1(url)
    before = older.rows(url)
    store = Jobs.open(url)
    Jobs.open(other_url).close()
    assert older.shape(url) == older.shape(other_url)
    assert older.rows(url) == before
    done, failed, running, _, _ = store.page(None, limit=100, order="asc").jobs
    assert (done.state, done.outputs[0].id, done.result["seed"]) == ("completed", "a" * 64, 7)
    assert (failed.owner, failed.error) == ("anna", {"code": "invalid_request", "message": "It cannot be made."})
    assert store.create({}, key="wish 1", fingerprint="f1", window=1e12) == (done, False), "keys are still known"
    assert store.sweep() == 1, "the worker of then is gone"
    assert store.claim("other", systems=("other",)) is None
    claim = store.claim("two", kinds=("video",), systems=("worlds-64",))
    assert claim is not None
    assert (claim.job.id, claim.attempt) == (running.id, 2)
    assert (claim.job.request_id, claim.job.traceparent) == (None, None)
    assert (store.totals()["attempts"], store.totals()["leases_lost"]) == (1, 1), "they begin with this version"
    assert store.finish(claim, [FILM], {})
    store.close()


def test_many_may_update_an_older_database_at_once(url: str) -> None:
    older.write_schema_1(url, more=100)
    opened = at_once(6, lambda n: Jobs.open(url))
    assert [one.counts()["queued"] for one in opened] == [102] * 6
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    "wrong", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "postgresql://nobody@/x?host=/none"]
)
def test_a_wrong_address_is_told_in_a_sentence(wrong: str) -> None:
    with pytest.raises(UserError, match="; "):
        Jobs.open(wrong)


def test_what_is_no_database_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="not a database"):
        Jobs.open(f"sqlite:///{tmp_path / 'film.mp4'}")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make"):
        Jobs.open(f"sqlite:///{tmp_path / 'file' / 'tubelet.db'}")


def test_only_its_owner_may_read_the_file(sqlite_url: str, tmp_path: Path) -> None:
    store = Jobs.open(sqlite_url)
    new(store)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 3
    store.close()


def test_sqlite_syncs_every_commit(sqlite_url: str) -> None:
    store = Jobs.open(sqlite_url)
    with store._database.read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_sqlite_opens_all_that_it_holds_at_once_and_keeps_few_pages(sqlite_url: str) -> None:
    """What is opened and cached later looks like a leak for hours."""

    def files() -> int:
        return sum(name.startswith(sqlite_url.removeprefix("sqlite:///")) for name in map(_target, os.listdir("/proc/self/fd")))

    store = Jobs.open(sqlite_url)
    begun, together = files(), threading.Barrier(HELD)

    def read() -> int:
        with store._database.read() as db:
            db.exec_driver_sql("SELECT count(*) FROM sqlite_master")
            together.wait(10)
            return db.exec_driver_sql("PRAGMA cache_size").scalar()

    with ThreadPoolExecutor(HELD) as pool:
        assert [found.result() for found in [pool.submit(read) for _ in range(HELD)]] == [-256] * HELD
    assert begun >= HELD
    assert files() == begun
    store.close()
    assert files() == 0


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # closed meanwhile
        return ""


def test_a_read_only_sqlite_reads_and_refuses_to_write(sqlite_url: str, tmp_path: Path) -> None:
    writable = Jobs.open(sqlite_url)
    job = new(writable)
    store = Jobs.open(f"sqlite:///file:{tmp_path / 'tubelet.db'}?mode=ro&uri=true")
    assert store.get(job.id, None) == job
    for call in (lambda: store.create({}), lambda: store.claim("one"), lambda: store.delete(job.id, None), store.probe):
        with pytest.raises(StorageFull, match="readonly"):
            call()
    assert now(writable, job) == job
    store.close()
    writable.close()


def test_a_read_only_postgres_refuses_until_it_is_writable(postgres: str, postgres_database: str) -> None:
    name, url = postgres_database, address(postgres, postgres_database)
    Jobs.open(url).close()
    as_operator(postgres, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store = Jobs.open(url)
    with pytest.raises(StorageFull, match="read-only"):
        new(store)
    as_operator(postgres, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    as_operator(postgres, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    new(store)  # on a new connection: the lost ones are noticed
    assert store.counts()["queued"] == 1
    store.close()


def test_a_postgres_that_takes_no_connections_is_no_defect_of_ours(postgres: str, postgres_database: str) -> None:
    store = Jobs.open(address(postgres, postgres_database))
    job, name = new(store), postgres_database
    as_operator(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    as_operator(postgres, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    with pytest.raises(StorageFull):
        store.get(job.id, None)
    as_operator(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert store.get(job.id, None) == job
    store.close()


def test_a_lock_that_is_never_given_back_ends_as_an_answer(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    store = Jobs.open(sqlite_url)
    hog = sqlite3.connect(tmp_path / "tubelet.db", isolation_level=None)
    hog.execute("BEGIN IMMEDIATE")
    refused = at_once(6, lambda n: store.create({}))
    assert {type(answer) for answer in refused} == {StorageFull}
    assert any("locked" in str(answer) for answer in refused)
    assert any("keep up" in str(answer) for answer in refused), "those behind it do not wait longer than their patience"
    assert store.counts()["queued"] == 0, "readers do not wait for a writer"
    hog.execute("ROLLBACK")
    new(store)
    hog.close()
    store.close()


def test_a_full_disk_refuses_whole_writes_and_recovers_by_itself(tmp_path: Path) -> None:
    try:
        refused = full_disk.on_a_small_disk(tmp_path)
    except full_disk.NoSmallDisk as none:
        pytest.skip(str(none))
    assert set(refused) == {"create", "claim", "heartbeat", "put", "finish"}, "each step was once the one to fail"
