"""The figures of tasks: truth scores what it should, doing nothing and wrong films worse, and every task gives its own."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.evaluate.laws import LAWS
from tubelet.evaluate.tasks import (
    LONG,
    STRENGTHS,
    TASKS,
    Bench,
    changes,
    evaluate_sizes,
    evaluate_tasks,
    joined,
    motion,
    overlap,
)
from tubelet.generate.system import System


def test_every_task_gives_its_figures(system: System) -> None:
    shown: dict[str, np.ndarray] = {}
    figures = evaluate_tasks(system, 1, show=lambda film, text: shown.update({text: film}), progress=False)
    assert list(shown) == [name.replace("_", " ") for name in TASKS]
    assert all(film.dtype == np.uint8 and film.ndim == 4 for film in shown.values())
    for name in TASKS:
        assert figures[f"task/{name}/n"] == 1
    for name in ("image_to_video", "first_and_last", "extend", "extend_backward", "connect", "inpaint", "outpaint"):
        assert figures[f"task/{name}/kept"] == 100, f"{name} changed what it was given"
        assert figures[f"task/{name}/caption/floor"] > 0.9
    for name in ("text_to_image", "image_to_video", "outpaint", "refine"):
        assert figures[f"task/{name}/caption"] < 0.5, "noise follows no caption"
    assert figures["task/image_to_video/caption/chance"] < 0.9, "a picture that stands still does not"
    for name in ("first_and_last", "extend", "extend_backward", "connect"):
        assert figures[f"task/{name}/found"] < 0.5, "noise shows nothing"
    for name in ("image_to_video", "first_and_last", "extend", "extend_backward", "connect"):
        assert figures[f"task/{name}/seam/floor"] < 1.6
        assert figures[f"task/{name}/seam/control"] > 1.1 * figures[f"task/{name}/seam/floor"]
    for name in ("text_to_image", "image_to_video", "connect", "inpaint", "outpaint", "storyboard", "refine"):
        assert 0 <= figures[f"task/{name}/caption/ceiling"] <= 1
    for name in ("first_and_last", "extend", "extend_backward", "connect"):
        assert figures[f"task/{name}/within/floor"] == 1 > figures[f"task/{name}/within/control"]
        assert figures[f"task/{name}/seam/ceiling"] > figures[f"task/{name}/seam/floor"], "an untrained codec leaves a seam"
        assert f"task/{name}/found/ceiling" in figures
    assert figures["task/connect/jump/two"] > 0
    assert 0 <= figures["task/loop/place"] <= 1
    assert figures["task/storyboard/caption/going_on/second"] < 0.5
    assert 0 <= figures["task/refine/structure"] <= 1
    assert figures["task/loop/within"] in (0, 1)
    assert figures["task/edit/structure/0.0"] == 1, "the film itself"
    assert figures["task/edit/caption/0.0"] < 0.5, "which is not what the words say"
    for strength in STRENGTHS:
        assert 0 <= figures[f"task/edit/structure/{strength}"] <= 1
        for end in ("first", "last", "caption", "one"):
            assert 0 <= figures[f"task/blend/{end}/{strength}"] <= 1
    assert figures["task/blend/first/fade"] > 0.5 < figures["task/blend/last/fade"], "it begins as one and ends as the other"
    assert figures["task/blend/first/1.0"] < 0.5, "noise keeps nothing"
    for window in range(LONG):
        assert figures[f"task/long/caption/{window}/floor"] > 0.5
        assert figures[f"task/long/one_of_each/{window}/floor"] > 0.5 > figures[f"task/long/one_of_each/{window}"]


def test_the_truth_moves_as_it_does_and_standing_still_does_not(system: System) -> None:
    bench, values = Bench(system), defaultdict(list)
    for number in range(4):
        episode = bench.episode(number)
        for made, step in ((range(5, 9), 1), (range(4), -1)):
            motion(lambda figure, value: values[figure].append(value), episode.video, episode, made, step)
    assert np.mean(values["found"]) > 0.95
    assert np.mean(values["velocity"]) < 0.1
    assert np.mean(values["velocity/copy"]) > 3 * np.mean(values["velocity"])
    assert np.mean(values["velocity/constant"]) > np.mean(values["velocity"]), "falling things do not keep their velocity"


def test_another_velocity_may_stand_for_the_one_that_is_kept(system: System) -> None:
    episode = Bench(system).episode(0, ("slide",))
    x = np.stack([episode.state["x"][:, 0], episode.state["y"][:, 0]], 1)
    line = (x[4] - x[0]) / 4
    for constant in (None, line, 0 * line):
        values = defaultdict(list)
        motion(lambda figure, value: values[figure].append(value), episode.video, episode, range(1, 4), 1, constant)  # noqa: B023
        kept, copied = np.mean(values["velocity/constant"]), np.mean(values["velocity/copy"])
        if constant is line:
            assert kept < 0.02 < copied, "what slides goes straight on"
        else:
            assert kept == copied, "one known frame has no velocity"


def test_a_seam_is_seen_where_it_is() -> None:
    ramp = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 4, 3), 10, np.uint8)
    assert joined(ramp, [4]) == {"seam": pytest.approx(1), "within": 1}
    broken = ramp.copy()
    broken[4:] += 100
    assert joined(broken, [4])["seam"] > 3
    assert joined(broken, [4])["within"] == 0, "no other change is as large"
    assert joined(broken, [2, 4])["within"] == 0, "one of two joins is enough"
    assert joined(broken, [3]) == {"seam": pytest.approx(7 / 17), "within": 1}
    assert joined(ramp * 0, [2]) == {"seam": 1, "within": 1}
    assert changes(ramp).tolist() == [10] * 7


def test_sizes_and_lengths(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tubelet.evaluate.tasks.SIZES", ((64, 96),))
    monkeypatch.setattr("tubelet.evaluate.tasks.LENGTHS", (1, 5))
    figures = evaluate_sizes(system, 4, progress=False)
    names = ("size/64x96", "length/1", "length/5")
    assert {key for key in figures if "/law/" not in key} == {
        f"{name}/caption{beside}" for name in names for beside in ("", "/floor", "/ceiling")
    }
    for name in names:
        assert figures[f"{name}/caption/floor"] > 0.9
    laws = {key.split("/")[3] for key in figures if "/law/" in key}
    assert laws == {law for law in LAWS if law not in ("paint", "bites")}
    assert not any(key.startswith("length/1/law") for key in figures), "a picture obeys nothing"
    for law, count in (("gravity", 3), ("inertia", 1), ("steady", 4), ("momentum", 2), ("permanence", 2)):
        name = f"size/64x96/law/{law}"
        assert figures[f"{name}/n"] == count
        assert figures[f"{name}/floor"] >= 0.66 or law == "permanence", "nothing comes out again within nine frames"
        assert figures[name] == 0, "noise obeys nothing"
        assert figures[f"{name}/ceiling"] <= figures[f"{name}/floor"]
        assert 0 <= figures[f"{name}/floor/evaluable"] <= 1


def test_overlap() -> None:
    one, other = np.arange(6) < 4, np.arange(6) > 1
    assert overlap(one, other) == pytest.approx(2 / 6)
    assert overlap(one, one) == 1
    assert overlap(one, ~one) == 0
    assert overlap(one & False, one & False) == 1


def test_what_cannot_be_tried_is_refused(system: System) -> None:
    with pytest.raises(UserError, match="n must be at least 1"):
        evaluate_tasks(system, 0)
    with pytest.raises(UserError, match="no task 'fly'; choose among text_to_image"):
        evaluate_tasks(system, 1, names=["fly"])
