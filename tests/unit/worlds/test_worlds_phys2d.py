"""phys2d: the laws hold in the state to rounding, the scenes can be judged, and each split shows what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.worlds import WORLDS, Episode
from tubelet.worlds.bodies import HOLE_KINDS, SHELL_KINDS, SPLITS
from tubelet.worlds.constants import (
    BELOW,
    COLORS,
    COMPOSED_KINDS,
    FLOOR_Y,
    GRAVITY,
    MOON_GRAVITY,
    PANEL_HALF,
    PHYS2D_KINDS,
    RADIUS,
    SHAPES,
    SIZES,
    SPEED_HOLE,
    SPEED_HULL,
    held_out_pair,
    held_out_size,
    speed_word,
)
from tubelet.worlds.plans import contact_distance, make_plan

WORLD = WORLDS["phys2d"]
SEEDS = range(40)


def clip(seed: int, kind: str | None = None, **options: object) -> Episode:
    """A clip at the smallest size, since only its state matters."""
    settings: dict[str, Any] = {"height": 16, "width": 16} | options
    return WORLD.sample(seed, kind=kind, **settings)


def first(episode: Episode, kind: str) -> float | None:
    return next((t for t, k, _ in episode.events if k == kind), None)


@pytest.mark.parametrize("kind", ["fall", "bounce", "parabola"])
def test_in_flight_the_acceleration_is_g(kind: str) -> None:
    found = set()
    for seed in SEEDS:
        e = clip(seed, kind, frames=201, fps=100.0)
        lands = [t for t, k, _ in e.events if k == "floor"]
        y, s = e.state["y"][:, 0], e.state["seconds"]
        flight = s < (lands[0] if lands else 2.0) - 0.011
        acceleration = np.diff(y, 2)[flight[:-2] & flight[2:]] * 100.0**2
        expected = MOON_GRAVITY if e.tags["moon"] else GRAVITY
        found.add(expected)
        np.testing.assert_allclose(acceleration, expected, rtol=1e-6)
        assert ("on the moon" in e.short) == e.tags["moon"] == (float(e.state["g"]) == MOON_GRAVITY)
    assert found == {GRAVITY, MOON_GRAVITY}


def test_a_bounce_keeps_the_stated_share_of_the_speed() -> None:
    for seed in SEEDS:
        e = clip(seed, "bounce", frames=2001, fps=1000.0)
        vy = e.state["vy"][:, 0]
        for t in [t for t, k, _ in e.events if k == "floor"][: e.tags["scene"]["count"]]:
            i = int(t * 1000)
            if 2 <= i < 1997:
                before, after = vy[i - 1] + float(e.state["g"]) * (t - (i - 1) / 1000), vy[i + 2]
                assert -after / before == pytest.approx(float(e.state["e"][0]), abs=0.02)


@pytest.mark.parametrize("kind", [kind for kind in PHYS2D_KINDS if kind != "billiard"])
def test_objects_never_sink_into_the_floor(kind: str) -> None:
    for seed in SEEDS:
        e = clip(seed, kind, frames=81, fps=40.0)
        below = np.array([BELOW[SHAPES[s]] for s in e.state["shape"]]) * e.state["r"]
        still = ~e.state["angle"].any(0)
        assert (e.state["y"] + below <= float(e.state["floor"]) + 1e-9)[:, still].all()


@pytest.mark.parametrize("kind", ["collision", "billiard"])
def test_momentum_and_energy_are_kept_by_impacts(kind: str) -> None:
    for seed in SEEDS:
        e = clip(seed, kind, frames=161, fps=80.0)
        m = e.state["mass"]
        energy = (m * (e.state["vx"] ** 2 + e.state["vy"] ** 2)).sum(1)
        np.testing.assert_allclose(energy, energy[0], rtol=1e-9)
        if kind == "collision":
            momentum = (m * e.state["vx"]).sum(1)
            np.testing.assert_allclose(momentum, momentum[0], rtol=1e-9)


def test_billiard_balls_stay_apart_and_on_the_table() -> None:
    for seed in SEEDS:
        e = clip(seed, "billiard", frames=241, fps=80.0)
        x, y, r = e.state["x"], e.state["y"], e.state["r"]
        for i in range(len(r)):
            for j in range(i):
                assert (np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j]) >= r[i] + r[j] - 1e-9).all()
        assert (x - r >= 0.04 - 1e-9).all()
        assert (x + r <= 0.96 + 1e-9).all()
        assert (y - r >= 0.04 - 1e-9).all()
        assert (y + r <= 0.96 + 1e-9).all()
        assert set(e.state["shape"]) == {0}
        assert len(set(e.state["color"])) == len(r)
        assert first(e, "collide") is not None


def test_slides_keep_their_velocity() -> None:
    for kind in ("slide", "occlude"):
        for seed in SEEDS:
            e = clip(seed, kind, frames=33)
            x, vx = e.state["x"][:, 0], e.state["vx"][0, 0]
            np.testing.assert_allclose(np.diff(x), vx / 8, rtol=1e-9)
            scene = e.tags["scene"]
            assert scene["direction"] == ("right" if vx > 0 else "left")
            assert scene["speed"] == speed_word(abs(vx))


def test_collisions_touch_exactly_when_they_say() -> None:
    for seed in SEEDS:
        plan = make_plan(seed, 64, 64, 17, 8.0, "collision", "train", None)
        a, b = plan.bodies
        t = next(t for t, k, _ in plan.events if k == "collide")
        moment = np.array([t, t - 0.05, t + 0.05])
        gap = np.abs(a.at(moment)[0] - b.at(moment)[0]) - contact_distance(a, b)
        assert gap[0] == pytest.approx(0, abs=1e-9)
        assert (gap[1:] > 0).all()


def test_every_scene_can_be_judged_at_17_frames() -> None:
    size = {"height": 64, "width": 64}
    for seed in range(120):
        e = clip(seed, "collision", **size)
        whole, s = (e.state["visible"] > 0.97).all(1), e.state["seconds"]
        contact = first(e, "collide")
        assert contact is not None
        assert (whole & (s < contact)).sum() >= 3
        assert (whole & (s > contact)).sum() >= 3
        e = clip(seed, "occlude", **size)
        x, panel, seen = e.state["x"][:, 0], e.state["panel"], e.state["visible"][:, 0] > 0.6
        before = (x < panel.mean(where=[True, False, True, False])) == (e.state["vx"][0, 0] > 0)
        assert (seen & before).sum() >= 3
        assert (seen & ~before).sum() >= 2
        assert (e.state["visible"][:, 0] < 0.02).any()
        assert panel[2] - panel[0] == pytest.approx(2 * PANEL_HALF)
        for kind in ("fall", "parabola", "bounce"):
            e = clip(seed, kind, **size)
            flight = e.state["seconds"] < (first(e, "floor") or 9.9)
            assert flight.sum() >= 5 - (kind == "bounce")
            assert (e.state["visible"][:, 0] > 0.97).all()
        e = clip(seed, "slide", **size)
        assert (e.state["visible"][:, 0] > 0.97).sum() >= 5


def test_leaving_the_frame_is_recorded() -> None:
    left = 0
    for seed in SEEDS:
        e = clip(seed, "slide")
        gone = first(e, "leave")
        out = e.state["visible"][-1, 0] == 0
        assert (gone is not None) == out
        left += out
    assert left > 5


def test_the_scene_does_not_depend_on_frames_fps_or_pixels() -> None:
    for kind in PHYS2D_KINDS:
        whole = WORLD.sample(5, 32, 32, 17, 8.0, kind=kind)
        part = WORLD.sample(5, 32, 32, 6, 8.0, kind=kind)
        assert (whole.video[:6] == part.video).all()
        assert (WORLD.sample(5, 32, 32, 1, 8.0, kind=kind).video[0] == whole.video[0]).all()
        fine = WORLD.sample(5, 64, 64, 49, 24.0, kind=kind)
        for name in ("x", "y", "vx", "vy", "angle"):
            np.testing.assert_allclose(fine.state[name][::3], whole.state[name], atol=1e-9)
        assert whole.short == part.short == fine.short
        assert whole.dense == fine.dense


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 112), (112, 64), (48, 72)])
def test_any_aspect_keeps_objects_round_and_in_the_frame(height: int, width: int) -> None:
    for kind in PHYS2D_KINDS:
        for seed in range(6):
            e = WORLD.sample(seed, height, width, kind=kind)
            assert e.video.shape == (17, height, width, 3)
            np.testing.assert_allclose(e.state["frame"], np.array([width, height]) / min(height, width))
            assert float(e.state["floor"]) == pytest.approx(FLOOR_Y * height / min(height, width))
            assert (e.state["visible"][0] > 0.6).all()


def composition(e: Episode) -> tuple[list[bool], list[bool]]:
    s = e.state
    pairs = [held_out_pair(int(c), int(h)) for c, h in zip(s["color"], s["shape"], strict=True)]
    return pairs, [held_out_size(int(z), e.tags["kind"]) for z in s["size"]]


def test_train_shows_no_held_out_composition() -> None:
    for seed in range(700):
        e = clip(seed, frames=1)
        pairs, sizes = composition(e)
        assert not any(pairs)
        assert not any(sizes)
        v = abs(e.state["vx"][0, 0])
        if e.tags["kind"] in HOLE_KINDS:
            assert SPEED_HULL[0] - 1e-9 <= v <= SPEED_HULL[1] + 1e-9
            assert not (e.state["size"][0] == 1 and SPEED_HOLE[0] <= v <= SPEED_HOLE[1])
        assert set(np.round(e.state["r"], 9)) <= set(RADIUS.values())


def test_train_shows_every_allowed_pair() -> None:
    seen = {(int(e.state["color"][0]), int(e.state["shape"][0])) for e in (clip(s, "slide", frames=1) for s in range(600))}
    assert len(seen) == 24


def test_the_held_out_splits_hold_what_they_say() -> None:
    for seed in range(80):
        pairs, sizes = composition(clip(seed, frames=1, split="held_out_pair"))
        assert pairs[0]
        assert not any(pairs[1:])
        assert not any(sizes)
        pairs, sizes = composition(clip(seed, frames=1, split="held_out_size"))
        assert sizes[0]
        assert not any(sizes[1:])
        assert not any(pairs)
        e = clip(seed, frames=1, split="held_out")
        pairs, sizes = composition(e)
        assert pairs[0] != sizes[0]
        assert e.tags["held_out_pair"] == pairs[0]
        assert e.tags["held_out_size"] == sizes[0]


def test_hole_shell_and_composed_splits() -> None:
    outside = set()
    for seed in range(80):
        e = clip(seed, frames=1, split="hole")
        assert e.tags["kind"] in HOLE_KINDS
        assert e.state["size"][0] == SIZES.index("medium")
        assert SPEED_HOLE[0] <= abs(e.state["vx"][0, 0]) <= SPEED_HOLE[1]
        e = clip(seed, frames=1, split="shell")
        assert e.tags["kind"] in SHELL_KINDS
        v, r = abs(e.state["vx"][0, 0]), e.state["r"][0]
        fast = not SPEED_HULL[0] <= v <= SPEED_HULL[1]
        wide = not min(RADIUS.values()) <= r <= max(RADIUS.values())
        assert fast or wide
        outside.add((fast, wide))
        assert clip(seed, frames=1, split="compose").tags["kind"] in COMPOSED_KINDS
    assert outside == {(True, False), (False, True), (True, True)}


def test_correlated_splits() -> None:
    for seed in range(150):
        e = clip(seed, frames=1, split="correlated_size")
        assert (e.state["size"] == e.state["color"] * 3 // 8).all()
        e = clip(seed, "slide", frames=1, split="correlated_velocity")
        assert (e.tags["scene"]["speed"] == "slowly") == (e.state["color"][0] < len(COLORS) // 2)


def test_composed_scenes_show_both_laws() -> None:
    for seed in range(20):
        e = clip(seed, "bounce+occlude", split="compose")
        kinds = [k for _, k, _ in e.events]
        assert "floor" in kinds
        assert "enter" in kinds
        e = clip(seed, "collision+parabola", split="compose", frames=161, fps=80.0)
        momentum = (e.state["mass"] * e.state["vx"]).sum(1)
        contact, land = first(e, "collide"), first(e, "floor")
        assert contact is not None
        assert land is not None
        assert contact < land
        np.testing.assert_allclose(momentum[e.state["seconds"] < land - 0.02], momentum[0], rtol=1e-9)


def test_a_wish_is_granted() -> None:
    wish = {"objects": [{"color": "red", "shape": "ball", "size": "large"}], "direction": "left", "speed": "slowly"}
    for seed in range(10):
        e = WORLD.sample(seed, 16, 16, kind="slide", wish=wish)
        assert e.short == "A large red ball slides slowly to the left along the floor."
    two = {"kind": "collision", "objects": [{"color": "green"}, {"shape": "square", "color": "pink", "motion": "resting"}]}
    e = WORLD.sample(1, 16, 16, wish=two)
    assert e.tags["objects"][0]["color"] == "green"
    assert e.tags["objects"][1].items() >= two["objects"][1].items()
    assert float(WORLD.sample(3, 16, 16, wish={"kind": "fall", "moon": True}).state["g"]) == MOON_GRAVITY


@pytest.mark.parametrize("kind", [*PHYS2D_KINDS, *COMPOSED_KINDS])
@pytest.mark.parametrize("speed", ["slowly", "steadily", "fast"])
def test_no_wish_breaks_a_scene(kind: str, speed: str) -> None:
    for seed in range(12):
        wish = {"kind": kind, "speed": speed, "direction": "right", "place": "right", "count": 2, "moon": True}
        wish["objects"] = [{"size": "large", "color": "red", "shape": "triangle"}] * (1 + seed % 4)
        e = WORLD.sample(seed, 16, 16, wish=wish)
        assert e.tags["kind"] == kind
        assert np.isfinite(e.state["x"]).all()
        assert e.tags["objects"][0]["color"] == "red"


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 8},
        {"width": 15},
        {"frames": 0},
        {"fps": 0.0},
        {"fps": -2.0},
        {"kind": "explode"},
        {"split": "validation"},
        {"kind": "fall", "split": "held_out_size"},
        {"kind": "bounce+occlude", "split": "train"},
    ],
)
def test_wrong_requests_are_explained(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(choose|give)"):
        WORLD.sample(1, **({"height": 16, "width": 16} | wrong))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_wrong_seeds_are_explained(seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        WORLD.sample(seed)


def test_the_splits_are_listed() -> None:
    assert WORLD.splits == SPLITS
    assert {"train", "held_out", "held_out_pair", "held_out_size", "hole", "shell", "compose"} <= set(SPLITS)
