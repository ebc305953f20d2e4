"""The numbers that shipped weights were trained with and that judges rely on: to change one is to make another world."""

from __future__ import annotations

from tubelet.worlds import constants
from tubelet.worlds.constants import COLORS, KINDS, SHAPES, SIZES, held_out_pair, held_out_size


def test_what_training_never_shows() -> None:
    pairs = {f"{c} {s}" for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if held_out_pair(i, j)}
    assert pairs == {
        "red ball", "cyan ball", "green square", "pink square", "yellow triangle", "purple triangle", "orange ring", "blue ring"
    }  # fmt: skip
    sizes = {f"{s} {kind}" for i, s in enumerate(SIZES) for kind in KINDS if held_out_size(i, kind)}
    assert sizes == {"small slide", "small occlude", "medium billiard", "large collision"}
    assert (constants.HELD_OUT_FOOD, constants.SPEED_HOLE, constants.SPEED_HULL) == (("apple", 3), (0.42, 0.49), (0.245, 0.95))
    assert constants.COMPOSED_KINDS == ("bounce+occlude", "collision+parabola")


def test_seeds_of_training_validation_and_test_share_none() -> None:
    ranges = (constants.TRAIN_SEEDS, constants.VALIDATION_SEEDS, constants.TEST_SEEDS)
    assert [(r.start, r.stop) for r in ranges] == [(0, 2**31), (2**31, 2**31 + 2**29), (2**31 + 2**29, 2**32)]


def test_the_worlds_are_the_ones_that_the_weights_know() -> None:
    assert constants.PALETTE == {
        "red": (214, 48, 49), "orange": (232, 126, 20), "yellow": (240, 200, 20), "green": (39, 158, 72),
        "cyan": (0, 178, 190), "blue": (40, 90, 215), "purple": (132, 60, 190), "pink": (236, 100, 170),
    }  # fmt: skip
    assert constants.RADIUS == {"small": 0.07, "medium": 0.10, "large": 0.14}
    assert (constants.GRAVITY, constants.MOON_GRAVITY, constants.RESTITUTIONS) == (2.2, 0.7, (0.5, 0.7, 0.9))
    assert (constants.SQUARE_HALF, constants.RING_INNER, constants.TRIANGLE_CIRCUM) == (0.86, 0.44, 1.2)
    assert (constants.FLOOR_Y, constants.PANEL_HALF, constants.PANEL_HEIGHT) == (0.86, 0.20, 0.46)
    assert (constants.SLOW_BELOW, constants.FAST_ABOVE, constants.NOMINAL_SECONDS) == (0.35, 0.75, 2.0)
