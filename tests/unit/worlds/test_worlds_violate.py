"""Controls: same captions, same start, broken law."""

from __future__ import annotations

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.worlds import WORLDS, Episode
from tubelet.worlds.constants import GRAVITY
from tubelet.worlds.violate import EXIT_OFFSET, VIOLATIONS, violate

CASES = [(law, control) for law, controls in VIOLATIONS.items() for control in controls]


def pair(law: str, control: str, seed: int, kind: str | None = None, **options: float) -> tuple[Episode, Episode]:
    """(true clip, violated clip)."""
    violation = VIOLATIONS[law][control]
    kind = kind or violation.kinds[seed % len(violation.kinds)]
    settings: dict = {"height": 32, "width": 32} | options
    true = WORLDS[violation.world].sample(seed, kind=kind, **settings)
    return true, violate(violation.world, law, control, seed, kind=kind, **settings)


@pytest.mark.parametrize(("law", "control"), CASES)
def test_the_words_stay_and_the_film_changes(law: str, control: str) -> None:
    for seed in range(12):
        true, false = pair(law, control, seed)
        assert (true.short, true.dense, true.human) == (false.short, false.dense, false.human)
        assert true.events == false.events
        assert false.tags == {**true.tags, "violated": [law, control]}
        assert true.video.shape == false.video.shape
        changed = (true.video != false.video).reshape(17, -1).any(1)
        assert changed.sum() >= 2
        if "flicker" not in control:
            assert not changed[0]
        assert (
            false.video == violate(VIOLATIONS[law][control].world, law, control, seed, 32, 32, kind=true.tags["kind"]).video
        ).all()


def acceleration(e: Episode, frames: int) -> np.ndarray:
    return np.diff(e.state["y"][:frames, 0], 2) * 100.0**2


def test_gravity_controls() -> None:
    for seed in range(20):
        for kind in ("fall", "parabola"):
            options = {"frames": 40, "fps": 100.0}
            true, linear = pair("gravity", "linear_fall", seed, kind, **options)
            g = float(true.state["g"])
            np.testing.assert_allclose(acceleration(true, 35), g, rtol=1e-6)
            assert np.median(np.abs(acceleration(linear, 35))) < 1e-6
            assert np.abs(acceleration(pair("gravity", "no_gravity", seed, kind, **options)[1], 35)).max() < 1e-6
            double = pair("gravity", "double_gravity", seed, kind, **options)[1]
            np.testing.assert_allclose(acceleration(double, 20), 2 * g, rtol=1e-6)
            assert g <= GRAVITY
            end = {"frames": 41, "fps": 20.0}
            true, linear = pair("gravity", "linear_fall", seed, kind, **end)
            if any(k == "floor" for _, k, _ in true.events):
                np.testing.assert_allclose(linear.state["y"][-1], true.state["y"][-1], atol=1e-9)


def test_inertia_controls() -> None:
    for seed in range(20):
        true, slow = pair("inertia", "slow_down", seed)
        assert np.ptp(true.state["vx"]) == 0
        speed = np.abs(slow.state["vx"][:, 0])
        assert (np.diff(speed) <= 1e-12).all()
        assert speed[-1] < 0.2 * speed[0]
        steps = np.diff(pair("inertia", "teleport", seed)[1].state["x"][:, 0])
        assert np.abs(steps - np.median(steps)).max() == pytest.approx(0.22, abs=1e-9)


def test_collision_controls_go_through_each_other() -> None:
    for seed in range(20):
        for control in ("pass_through", "swapped_roles"):
            true, false = pair("impenetrability", control, seed)
            order = np.sign(true.state["x"][0, 0] - true.state["x"][0, 1])
            assert (np.sign(true.state["x"][:, 0] - true.state["x"][:, 1]) == order).all()
            far = violate("phys2d", "impenetrability", control, seed, 32, 32, 97)
            assert np.sign(far.state["x"][-1, 0] - far.state["x"][-1, 1]) == -order
            assert (true.state["vx"][0] == false.state["vx"][0]).all()


def test_permanence_controls() -> None:
    for seed in range(20):
        true, gone = pair("permanence", "vanish", seed)
        assert (gone.state["visible"][-2:] == 0).all()
        assert true.state["visible"][:, 0].argmin() > 2
        off = pair("permanence", "wrong_exit", seed)[1]
        assert true.state["y"][-1, 0] - off.state["y"][-1, 0] == pytest.approx(EXIT_OFFSET)
        np.testing.assert_allclose(true.state["x"], off.state["x"], atol=1e-9)


def test_persistence_controls() -> None:
    for seed in range(20):
        assert not pair("paint", "erased", seed)[1].state["canvas"][-1].any()
        area = pair("bites", "erased", seed)[1].state["food_area"]
        assert area[-1] == area[0]
        assert area.min() < area[0]
        true, flicker = pair("steady", "flicker", seed)
        shares = (flicker.video != true.video).reshape(17, -1).any(1)
        assert shares[:4].all()


@pytest.mark.parametrize(
    ("world", "law", "control", "kind"),
    [
        ("phys2d", "magic", "vanish", None),
        ("phys2d", "gravity", "vanish", None),
        ("persist2d", "gravity", "no_gravity", None),
        ("phys2d", "gravity", "no_gravity", "slide"),
    ],
)
def test_wrong_requests_are_explained(world: str, law: str, control: str, kind: str | None) -> None:
    with pytest.raises(UserError, match=r"(choose|ask)"):
        violate(world, law, control, 0, kind=kind)
