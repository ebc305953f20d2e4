"""Drawing: areas, centroids and colours are exact enough to measure laws from pixels."""

from __future__ import annotations

import numpy as np
import pytest

from tubelet.worlds.constants import AREA, COLORS, PALETTE, SHAPES, TRIANGLE_CIRCUM, WALL
from tubelet.worlds.draw import Canvas, plain, rectangle_coverage


def share(video: np.ndarray, background: tuple[int, int, int], color: tuple[int, int, int]) -> np.ndarray:
    """Coverage (T, H, W) that turns the background into the colour, by projection."""
    line = np.subtract(color, background, dtype=np.float64)
    return ((video.astype(np.float64) - background) @ line) / (line @ line)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [0.07, 0.10, 0.14])
def test_area_and_centroid_at_any_subpixel_place(shape: str, r: float) -> None:
    size = 64
    random = np.random.RandomState(0)
    x, y = random.uniform(0.3, 0.7, (2, 40))
    canvas = Canvas(plain(size, size, WALL), 40)
    returned = canvas.shape(shape, x, y, r, PALETTE["blue"])
    cover = share(canvas.video(), WALL, PALETTE["blue"])
    area = cover.sum((1, 2)) / size**2
    np.testing.assert_allclose(area, AREA[shape] * r * r, rtol=0.03)
    np.testing.assert_allclose(returned / size**2, AREA[shape] * r * r, rtol=0.03)
    grid = (np.arange(size) + 0.5) / size
    cx = (cover * grid).sum((1, 2)) / cover.sum((1, 2))
    cy = (cover * grid[:, None]).sum((1, 2)) / cover.sum((1, 2))
    assert np.abs(cx - x).max() < 0.02 / size * 3
    assert np.abs(cy - y).max() < 0.1 / size


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", ["ball", "square", "triangle"])
def test_the_middle_has_the_palette_colour_exactly(color: str, shape: str) -> None:
    canvas = Canvas(plain(64, 64, WALL), 1)
    canvas.shape(shape, np.array([0.5]), np.array([0.5]), 0.14, PALETTE[color])
    assert tuple(canvas.video()[0, 32, 32]) == PALETTE[color]
    assert tuple(canvas.video()[0, 2, 2]) == WALL


def test_turning_keeps_the_area_and_a_symmetric_turn_keeps_the_picture() -> None:
    angles = np.linspace(0, 2 * np.pi / 3, 7)
    canvas = Canvas(plain(96, 96, WALL), 7)
    area = canvas.shape("triangle", np.full(7, 0.5), np.full(7, 0.5), 0.2, PALETTE["red"], angles)
    np.testing.assert_allclose(area / 96**2, AREA["triangle"] * 0.04, rtol=0.01)
    frames = canvas.video().astype(int)
    # Only the three corner pixels may differ, where the product of two edges stands for the exact share.
    assert (np.abs(frames[0] - frames[-1]).max(-1) > 2).sum() <= 8
    assert np.abs(frames[0] - frames[-1]).max() <= 16
    assert np.abs(frames[0] - frames[3]).max() > 50


def test_a_quarter_turn_of_a_square_is_the_square() -> None:
    canvas = Canvas(plain(64, 64, WALL), 3)
    canvas.shape("square", np.full(3, 0.5), np.full(3, 0.5), 0.2, PALETTE["red"], np.array([0.0, np.pi / 4, np.pi / 2]))
    frames = canvas.video().astype(int)
    assert np.abs(frames[0] - frames[2]).max() <= 1
    assert np.abs(frames[0] - frames[1]).max() > 50


def test_a_triangle_points_up() -> None:
    canvas = Canvas(plain(64, 64, WALL), 1)
    canvas.shape("triangle", np.array([0.5]), np.array([0.5]), 0.2, PALETTE["red"])
    rows = (canvas.video()[0, ..., 2] < 150).any(1).nonzero()[0]
    assert rows[0] == pytest.approx(64 * (0.5 - 0.2 * TRIANGLE_CIRCUM), abs=1.6)
    assert rows[-1] == pytest.approx(64 * (0.5 + 0.2 * TRIANGLE_CIRCUM / 2), abs=1.1)


def test_outside_and_on_the_border() -> None:
    canvas = Canvas(plain(32, 32, WALL), 3)
    area = canvas.shape("ball", np.array([-0.5, 0.0, 1.4]), np.array([0.5, 0.5, 0.5]), 0.1, PALETTE["red"])
    assert area[0] == 0
    assert area[2] == 0
    assert area[1] / 32**2 == pytest.approx(AREA["ball"] * 0.01 / 2, rel=0.03)


def test_what_is_hidden_is_neither_painted_nor_counted() -> None:
    clear = np.ones((64, 64), np.float32)
    clear[:, 32:] = 0
    canvas = Canvas(plain(64, 64, WALL), 1)
    area = canvas.shape("ball", np.array([0.5]), np.array([0.5]), 0.14, PALETTE["red"], None, clear)
    assert area[0] / 64**2 == pytest.approx(AREA["ball"] * 0.14**2 / 2, rel=0.02)
    assert (canvas.video()[0, :, 32:] == WALL).all()


def test_an_object_larger_than_the_frame_fills_it() -> None:
    canvas = Canvas(plain(16, 24, WALL), 1)
    canvas.shape("ball", np.array([0.75]), np.array([0.5]), 3.0, PALETTE["green"])
    assert (canvas.video() == PALETTE["green"]).all()


def test_rectangles_are_exact() -> None:
    cover = rectangle_coverage(40, 60, 0.3, 0.21, 0.99, 0.8)
    assert cover.sum() / 40**2 == pytest.approx(0.69 * 0.59, rel=1e-5)
