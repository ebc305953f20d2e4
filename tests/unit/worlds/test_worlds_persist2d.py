"""persist2d: what is painted stays, what is eaten stays gone, and the state says which pixels are which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import COLORS, FOODS, HELD_OUT_FOOD, PALETTE, STROKES, held_out_pair

WORLD = WORLDS["persist2d"]


def test_strokes_grow_and_stay() -> None:
    for seed in range(40):
        e = WORLD.sample(seed, 48, 48, kind="paint")
        canvas = e.state["canvas"]
        assert not canvas[0].any()
        painted = canvas > 0
        assert (painted[1:] >= painted[:-1]).all()
        # A later stroke may lie over an earlier one, never the other way round.
        assert (canvas[1:] >= canvas[:-1]).all()
        assert set(np.unique(canvas[-1])) - {0} == set(range(1, len(e.tags["objects"]) + 1))


def test_a_visible_stroke_pixel_has_the_strokes_colour() -> None:
    for seed in range(20):
        e = WORLD.sample(seed, 64, 64, kind="paint")
        for k, color in enumerate(e.state["stroke_color"]):
            mine = (e.state["canvas"] == k + 1) & (e.state["cover"] == 0)
            gap = np.abs(e.video[mine].astype(int) - PALETTE[COLORS[color]]).sum(1)
            assert np.median(gap) <= 3
            assert (gap < 150).mean() > 0.5


def test_paint_is_done_and_the_brush_gone_at_the_end() -> None:
    for seed in range(60):
        e = WORLD.sample(seed, 32, 32, kind="paint")
        assert e.state["stroke_end"].max() <= 1.75
        assert not e.state["cover"][-1].any()
        assert e.state["cover"][2:].any()
        assert [k for _, k, _ in e.events].count("stroke_end") == len(e.state["stroke_kind"])


def test_the_brush_follows_the_stroke() -> None:
    e = WORLD.sample(
        3, 64, 64, frames=201, fps=100.0, kind="paint", wish={"strokes": [{"stroke": "horizontal", "direction": "right"}]}
    )
    s = e.state["seconds"]
    on = (s >= e.state["stroke_start"][0]) & (s <= e.state["stroke_end"][0])
    x, y = e.state["x"][on, 0], e.state["y"][on, 0]
    assert (np.diff(x) > 0).all()
    np.testing.assert_allclose(y, e.state["stroke_path"][0, 1], atol=1e-9)


def test_food_shrinks_by_one_step_for_each_bite() -> None:
    for seed in range(60):
        e = WORLD.sample(seed, 48, 48, kind="eat")
        area = e.state["food_area"]
        steps = np.diff(area)
        assert (steps <= 1e-9).all()
        assert (steps < -0.008).sum() == e.tags["scene"]["count"] == len(e.state["bite_time"])
        assert not e.state["cover"][-1].any()
        assert (e.state["canvas"][1:] <= e.state["canvas"][:-1]).all()


def test_train_and_held_out() -> None:
    seen = set()
    for seed in range(150):
        e = WORLD.sample(seed, 16, 16, frames=1)
        other = WORLD.sample(seed, 16, 16, frames=1, split="held_out")
        assert not e.tags["held_out_pair"]
        assert other.tags["held_out_pair"]
        seen.add(other.tags["kind"])
        if e.tags["kind"] == "paint":
            both = zip(e.state["stroke_color"], e.state["stroke_kind"], strict=True)
            assert not any(held_out_pair(int(c), int(k)) for c, k in both)
        else:
            assert (e.tags["scene"]["food"], e.tags["scene"]["count"]) != HELD_OUT_FOOD
    assert seen == {"paint", "eat"}


def test_a_wish_is_granted() -> None:
    wish = {"kind": "eat", "food": "bread", "count": 3, "side": "right"}
    assert WORLD.sample(0, 16, 16, wish=wish).short == "A mouth takes three bites out of a slice of bread from the right."
    for stroke in STROKES:
        wish = {"kind": "paint", "strokes": [{"color": "red", "stroke": stroke}, {"color": "blue", "stroke": "circle"}]}
        scene = WORLD.sample(1, 16, 16, wish=wish).tags["scene"]
        assert scene["strokes"][0].items() >= wish["strokes"][0].items()
        assert scene["strokes"][1] == wish["strokes"][1]


def test_the_scene_does_not_depend_on_frames() -> None:
    for kind in WORLD.kinds:
        whole = WORLD.sample(9, 32, 48, 17, kind=kind)
        assert (WORLD.sample(9, 32, 48, 5, kind=kind).video == whole.video[:5]).all()
        assert (WORLD.sample(9, 32, 48, 33, 16.0, kind=kind).video[::2] == whole.video).all()


@pytest.mark.parametrize("food", FOODS)
def test_every_food_is_drawn(food: str) -> None:
    e = WORLD.sample(2, 64, 64, wish={"kind": "eat", "food": food})
    assert 0.12 < e.state["food_area"][0] < 0.25


@pytest.mark.parametrize("wrong", [{"kind": "fall"}, {"split": "hole"}, {"frames": -1}, {"wish": {"kind": "slide"}}])
def test_wrong_requests_are_explained(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(choose|give)"):
        WORLD.sample(1, **({"height": 16, "width": 16} | wrong))


def test_more_strokes_than_a_painting_has_are_refused() -> None:
    with pytest.raises(UserError, match="at most 3 strokes, got 9"):
        WORLD.sample(0, kind="paint", wish={"strokes": [{"color": color} for color in (*COLORS, "red")]})
