"""The long trials at toy length: each can be run, gives figures, and says so when a promise is not held."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from tests.soak import __main__ as soak
from tests.soak import faults, fuzz, store
from tests.soak.figures import Figure, Settings, Skipped, at_most, exactly, percentile


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    small = {
        "rounds": 2,
        "stopped": 4,
        "lost": 1,
        "cancels": 2,
        "updates": 1,
        "creates": 1000,  # as many as promised: they take a second or two
        "cap": 100,
        "queued": 30,
        "fills": 1,
        "faults": 1,
        "cuts": 3,
        "paged": 10,
        "hooked": 2,
        "killed": 1,
        "resumes": 1,
        "torn": 3,
        "records": 40,
        "damages": 2,
        "wild": 5,
    }
    return Settings(tmp_path, minutes=0.05, stalled=5, restarts=2, estimated=2, **small)


SERVED = ["overload", "queue", "leaks", "restarts", "estimates", "paging", "faults", "hooks", "pages", "canaries"]


@pytest.mark.parametrize("name", ["kills", *SERVED, "renders", "resumes", "torn", "records", "wild"])
def test_a_trial_gives_figures_that_hold(settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.postgres_server, "_programs", lambda: None)  # the tests of each kind of store use it
    monkeypatch.setattr(faults, "WAYS", {way: faults.WAYS[way] for way in ("memory", "memory,1")})  # no lease has to run out
    try:
        figures = list(soak.TRIALS[name](settings))
    except Skipped as skipped:
        pytest.skip(str(skipped))
    timed = ("p99", "p50", "answers", "ready", "create", "get", "list", "list_100", "queue")  # a busy machine may be slow
    assert [figure for figure in figures if figure.held is False and not figure.name.endswith(timed)] == []
    assert any(figure.held is not None for figure in figures)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_takes_its_seeds_and_what_is_made_of_them(name: str, tmp_path: Path) -> None:
    """Without coverage: seeds are understood, and nothing that nobody foresaw comes of changing them."""
    (tmp_path / "place").mkdir()
    report = fuzz.Report(tmp_path)
    with fuzz.TARGETS[name][0](tmp_path / "place") as (execute, seeds):
        assert len(set(seeds)) > 5
        for seed in seeds:
            report.take(execute, seed)
        understood = len(report.outcomes)
        for number in range(150):
            seed = seeds[number % len(seeds)]
            report.take(execute, fuzz.retold(seed, number) or fuzz.bent(seed, 10**6, number))
    assert report.defects == {}
    assert understood > 1
    assert report.executions == len(seeds) + 150


def test_a_defect_is_noted_once_with_what_led_there(tmp_path: Path) -> None:
    def execute(data: bytes) -> str:
        if data == b"bad":
            raise KeyError("nobody foresaw this")
        return "fine"

    report = fuzz.Report(tmp_path)
    for data in (b"good", b"bad", b"bad"):
        report.take(execute, data)
    report.write()
    said = json.loads(report.path.read_text())
    assert (said["executions"], said["outcomes"]) == (3, {"fine": 1, "defect": 2})
    assert [*said["defects"].values()] == ["'nobody foresaw this'"]
    assert [path.read_bytes() for path in tmp_path.glob("defect-*")] == [b"bad"]


def test_the_trials_can_be_called_by_hand() -> None:
    """Outside of pytest the modules of the tests are found in another order."""
    words = [sys.executable, "-m", "tests.soak", "--help"]
    said = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "restarts" in said.stdout


def test_goals() -> None:
    assert exactly("lost", 0, 0).held
    assert not exactly("lost", 1, 0).held
    assert at_most("p99", 0.5, 0.5).held
    assert not at_most("p99", 0.51, 0.5).held
    assert percentile([float(n) for n in range(100, 0, -1)], 0.99) == 100
    assert percentile([3.0], 0.5) == 3


def test_what_is_not_held_is_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(_: Settings) -> Iterator[Figure]:
        yield exactly("lost", 1, 0, "jobs")
        raise RuntimeError("the disk is gone")

    def absent(_: Settings) -> Iterator[Figure]:
        raise Skipped("no server here")
        yield

    monkeypatch.setattr(soak, "TRIALS", {"kills": bad, "disk": absent})
    out = tmp_path / "deep" / "soak.json"
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0.01", "--out", str(out)])
    assert soak.main() == 1
    said = capsys.readouterr().out
    assert "NOT HELD" in said
    assert "not held: kills/lost, kills/broke off" in said
    trials = json.loads(out.read_text())["trials"]
    assert [figure["name"] for figure in trials["kills"]] == ["lost", "broke off", "took"]
    assert trials["disk"][0]["unit"] == "no server here"
