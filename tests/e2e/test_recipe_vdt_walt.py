"""VDT's tasks and W.A.L.T's long films in small: one network each, trained, sampled in every way, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tubelet.evaluate.report import make_cases
from tubelet.recipes.vdt_tasks import TASKS, filled, moving
from tubelet.recipes.walt_long import judged
from tubelet.train.lineage import FilmObjective
from tubelet.worlds import WORLDS

SMALL = [
    word
    for setting in (
        "train.steps=3",
        "train.batch=2",
        "train.warmup=0",
        "train.precision=fp32",
        "train.progress=false",
        "sampling.steps=2",
    )
    for word in ("--set", setting)
]
CODED = "truth through the codec"


def table_of(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "table.json").read_text())


def test_vdt_tasks(whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "vdt-tasks", "--out", tmp_path, "--set", f"whole={whole}", *SMALL, "--set", "n=5")
    words += ("--set", "vdt.width=32", "--set", "vdt.heads=2", "--set", "vdt.depth=1", "--set", "every=1")
    assert tubelet(*words, "--set", 'rows=["interpolate"]').code == 0
    assert list(table_of(tmp_path)) == ["interpolate", "interpolate, frame before held", f"interpolate, {CODED}"]
    weights = sorted((tmp_path / "VDT" / "checkpoints").iterdir())
    assert tubelet(*words).code == 0, "more rows of the same network"
    assert sorted((tmp_path / "VDT" / "checkpoints").iterdir()) == weights

    table = table_of(tmp_path)
    rows = [row for name, task in TASKS.items() for row in (name, f"{name}, {task.simplest}", f"{name}, {CODED}")]
    assert list(table) == [*rows, "unconditional, truth"]
    for name, task in TASKS.items():
        own, simple, coded = table[name], table[f"{name}, {task.simplest}"], table[f"{name}, {CODED}"]
        assert own["seconds"] > 0
        assert own["steps"] == 3
        assert np.isfinite(own["loss"])
        for row in (own, simple, coded):
            assert ("found" in row) == task.moves
            assert ("psnr" in row) == (name != "unconditional") != ("frechet" in row)
            assert ("trackable" in row) == (name == "unconditional")
        if task.moves:
            assert own["velocity/truth"] < simple["velocity/copy"]
        if name not in ("unconditional", "completion"):
            assert simple["psnr"] > own["psnr"], "this network is random"
        assert 0 <= simple.get("law/gravity", 0) <= 1
    assert len({table[name]["loss"] for name in TASKS}) == len(TASKS), "each with its own mask"
    assert table["unconditional, truth"]["trackable"] > 0.7
    assert table["unconditional, truth"]["frechet"] < table["unconditional"]["frechet"]
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n") == 2 + len(table)

    assert "begun with other settings of 'train'" in refused(*words, "--set", "train.steps=7")
    assert "no row 'edit'" in refused(*words, "--set", 'rows=["edit"]')
    assert "no mask 'middle'" in refused(*words, "--set", 'masks={"middle": 1}')
    assert "no finished run" in refused("train", "vdt-tasks", "--out", tmp_path / "no", "--set", f"whole={tmp_path}")


def test_walt_long_stopped_and_resumed(
    whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "walt-long", "--out", tmp_path, "--set", f"whole={whole}", *SMALL, "--set", "n=2")
    words += ("--set", "width=32", "--set", "heads=2", "--set", "depth=2")
    calls, loss = 0, FilmObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FilmObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    assert tubelet(*words).code == 0

    table = table_of(tmp_path)
    ways = ["last frames known", "no guidance over frames", "each window for itself"]
    assert list(table) == [*ways, "truth", CODED]
    for row in table.values():
        for number in range(1, 5):
            for figure in ("caption", "one_of_each"):
                assert 0 <= row[f"{figure}/{number}"] <= 1
            assert row[f"stray/{number}"] >= 0
        assert row["seam"] > 0
    for name in ways:
        assert table[name]["seconds"] > 0
        assert table[name]["steps"] == 3
        for figure in ("caption", "one_of_each", "stray", "colour"):
            assert table[name][f"{figure}/1"] == table[ways[0]][f"{figure}/1"], "the first window knows nothing in any row"
        assert table[name]["loss"] != table[name]["loss/known"]
    assert table["truth"]["caption/1"] > 0.5
    assert len(table["truth"]) == len(table[CODED])

    assert "at least 2 windows" in refused(*words, "--set", "windows=1")
    assert "know 1 or 2 frames" in refused(*words, "--set", "known=3")
    assert "frame_prediction above 0" in refused(*words, "--set", "objective.frame_prediction=0")
    assert "frames can be left out" in refused(*words, "--set", "every=0")
    assert "adds nothing" in refused(*words, "--set", "every=3")
    assert "no row 'nothing'" in refused(*words, "--set", 'rows=["nothing"]')


def test_the_simplest_thing_in_a_hole_is_a_known_frame_or_the_backdrop() -> None:
    film = WORLDS["phys2d"].sample(3, 64, 64, 9, 8.0, kind="slide").video
    hole = np.zeros(film.shape[:3], bool)
    hole[[0, 1, 4, 5]] = True
    out = filled(film, hole)
    sources = [2, 2, 2, 3, 3, 3, 6, 7, 8]
    assert all(np.array_equal(out[frame], film[source]) for frame, source in enumerate(sources))
    assert all(np.array_equal(frame, film[0]) for frame in filled(film, np.ones_like(hole)))
    part = np.zeros_like(hole)
    part[2:, :, 16:48] = True
    out = filled(film, part)
    assert np.array_equal(out[~part], film[~part])
    assert (out[2:, :, 16:48] == out[2:3, :, 16:17]).all(), "the same in every frame and column"


def test_velocities_are_those_of_frames_that_are_missing_wherever_they_are() -> None:
    episodes = [WORLDS["phys2d"].sample(n, 64, 64, 17, 8.0, kind=kind) for n, kind in enumerate(("slide", "fall", "slide"))]
    truth = np.stack([episode.video for episode in episodes])
    holes = np.zeros(truth.shape[:4], bool)
    between = holes.copy()
    between[:, [1, 2, 3, 5, 6, 7]] = True
    halves = (slice(8, 17), slice(0, 8))
    for missing in (*halves, slice(0, 17)):
        hole = holes.copy()
        hole[:, missing] = True
        assert moving(truth, episodes, hole)["velocity"] < 0.1
        assert moving(truth, episodes, hole)["found"] > 0.9
    figures = moving(truth, episodes, between)
    assert figures["velocity"] < 0.1
    assert figures["velocity/constant"] < 0.5 * figures["velocity/copy"], "a straight line from one known frame to the next"
    still = np.stack([filled(film, hole) for film, hole in zip(truth, between, strict=True)])
    assert moving(still, episodes, between)["velocity"] == pytest.approx(figures["velocity/copy"], abs=0.1)


def test_a_film_that_breaks_off_shows_a_seam_and_other_balls() -> None:
    cases = make_cases(("billiard",), 3, frames=18, fps=4.0)
    parts = [slice(0, 9), slice(9, 18)]
    truth = judged([case.truth for case in cases], cases, parts)
    assert truth["caption/1"] == truth["caption/2"] == truth["one_of_each/2"] == 1
    assert truth["seam"] < 1.5
    swapped = [np.concatenate([a.truth[:9], b.truth[9:]]) for a, b in zip(cases, cases[1:] + cases[:1], strict=True)]
    broken = judged(swapped, cases, parts)
    assert broken["caption/1"] == broken["one_of_each/1"] == 1
    assert broken["one_of_each/2"] < 1
    assert broken["stray/2"] > 0
    assert broken["seam"] > 1.5
    assert judged([case.truth[:1].repeat(18, 0) for case in cases], cases, parts)["seam"] == 1
