"""Jobs outlive what kills their processes: SIGKILL at random points, ends at every step, SIGSTOP for longer than a lease."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

import postgres_server
from job_deaths import check, driven, notes, open_jobs

from tubelet.serve.tables import SCHEMA

ROUNDS = 25
STOPPED = 50
UPGRADES = 20

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: an end of the process, other than an end of the machine, spares the page cache."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared)) if os.access(shared, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)


def test_kills_at_random_points_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    driven("rounds", tmp_path, ROUNDS)
    jobs = check(tmp_path, open_jobs(tmp_path))
    assert {job.state for job in jobs} == {"completed"}
    assert len(jobs) > ROUNDS, "the rounds did some work"
    assert any(job.attempt > 1 for job in jobs), "no kill hit a worker at work: the test tests nothing"
    numbers = sorted(job.request["number"] for job in jobs)
    assert numbers == list(range(len(numbers))), "each wish once, those without an answer too"


def test_a_worker_that_was_stopped_for_too_long_cannot_publish(memory: Path) -> None:
    driven("stops", memory, STOPPED)
    assert notes(memory, "stale") == ["1 0 0"] * STOPPED
    jobs = check(memory, open_jobs(memory))
    assert [(job.state, job.attempt, job.result) for job in jobs] == [("completed", 2, {"attempt": 2})] * STOPPED


def test_the_store_is_consistent_after_an_end_at_any_step(memory: Path) -> None:
    driven("steps", memory)
    opened, lived = (int(line) for line in notes(memory, "steps"))
    assert opened > 20
    assert lived > 100


def test_an_interrupted_update_leaves_the_old_store_whole(memory: Path) -> None:
    driven("upgrades", memory, UPGRADES, 500)
    stepped, killed = (line.split() for line in notes(memory, "upgrades"))
    assert stepped.count("1") > 5, "ends before the commit leave the old one"
    assert set(stepped) == {"1", str(SCHEMA)}
    assert len(killed) == UPGRADES


def test_an_interrupted_update_leaves_the_old_store_whole_on_postgresql(tmp_path: Path) -> None:
    try:
        with postgres_server.running() as server:
            (tmp_path / "server").write_text(server)
            driven("upgrades", tmp_path, 5, 500)  # schemas cost time
    except postgres_server.Absent as absent:
        pytest.skip(str(absent))
    stepped, _ = (line.split() for line in notes(tmp_path, "upgrades"))
    assert stepped.count("1") > 5
    assert set(stepped) == {"1", str(SCHEMA)}
