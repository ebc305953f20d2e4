"""Anti-aliased drawing in numpy: signed distances inside bounding boxes, all frames of a clip at once.

Coverage of a pixel is clip(1/2 - d, 0, 1) with d the signed distance of its centre to the outline in pixels (exact for
straight, axis-aligned edges, within 1 % of a pixel for curved ones of radius >= 2 pixels). Pixel (i, j) has its centre at (j +
1/2, i + 1/2); coordinates given to this module are in short sides and are multiplied by `Canvas.scale`, the short side in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tubelet.worlds.constants import RING_INNER, SQUARE_HALF, TRIANGLE_CIRCUM

Array = np.ndarray[Any, Any]
Color = tuple[int, int, int]


def span(x: Array, half: float) -> Array:
    """Share of each unit cell centred at x that lies within [-half, half]."""
    return np.clip(np.minimum(x + 0.5, half) - np.maximum(x - 0.5, -half), 0.0, 1.0)


def shape_coverage(shape: str, x: Array, y: Array, r: float, angle: Array | None) -> Array:
    """Coverage (T, P, Q) of a shape.

    x (T, 1, Q) and y (T, P, 1): pixel centres relative to the object's centre; r: radius, all in pixels; angle (T, 1, 1):
    radians, clockwise as seen.
    """
    if shape in ("ball", "ring"):
        distance = np.sqrt(x * x + y * y)
        cover = np.clip(r + 0.5 - distance, 0.0, 1.0)
        if shape == "ring":
            cover -= np.clip(r * RING_INNER + 0.5 - distance, 0.0, 1.0)
        return cover
    if angle is not None:
        c, s = np.cos(angle), np.sin(angle)
        x, y = c * x + s * y, c * y - s * x
    if shape == "square":
        return span(x, SQUARE_HALF * r) * span(y, SQUARE_HALF * r)
    if shape == "triangle":
        inner = TRIANGLE_CIRCUM * r / 2
        bottom = np.clip(inner + 0.5 - y, 0.0, 1.0)
        # The two slanted edges are mirror images, so |x| serves both.
        slanted = np.clip(inner + 0.5 - (0.75**0.5 * np.abs(x) - 0.5 * y), 0.0, 1.0)
        return bottom * slanted
    raise AssertionError(f"unknown shape {shape!r}")


class Canvas:
    """All frames of one clip, float32 (T, H, W, 3) in 0..255, painted over from back to front."""

    def __init__(self, background: Array, frames: int):
        """background (H, W, 3) float32 or anything that converts to it."""
        self.height, self.width = background.shape[:2]
        self.scale = float(min(self.height, self.width))
        self.frames = frames
        self.pixels = np.repeat(np.asarray(background, np.float32)[None], frames, 0)  # (T, H, W, 3)
        self._t = np.arange(frames)[:, None, None]

    def stamp(
        self,
        cover: Callable[[Array, Array], Array],
        x: Array,
        y: Array,
        half: tuple[float, float],
        color: Color,
        clear: Array | None = None,
        mark: Array | None = None,
    ) -> Array:
        """Paints one colour with a coverage function that moves along.

        cover: (x (T, 1, Q), y (T, P, 1)) in pixels relative to the centre -> (T, P, Q); x, y (T,): centre in short sides;
        half: half extents (x, y) of a box around it, in short sides, outside which the coverage is 0; clear (H, W): share of
        each pixel that nothing in front hides; mark (T, H, W): set to 1 wherever more than a tenth of a pixel is painted.
        Returns the area that is seen, in pixels, (T,).
        """
        wide = min(self.width, int(2 * half[0] * self.scale) + 4)
        high = min(self.height, int(2 * half[1] * self.scale) + 4)
        px = np.broadcast_to(np.asarray(x, np.float64) * self.scale, (self.frames,))
        py = np.broadcast_to(np.asarray(y, np.float64) * self.scale, (self.frames,))
        # A box pushed back into the frame still covers everything of the object that is inside the frame.
        left = np.clip(np.floor(px - wide / 2), 0, self.width - wide).astype(np.int64)
        top = np.clip(np.floor(py - high / 2), 0, self.height - high).astype(np.int64)
        columns = left[:, None, None] + np.arange(wide)[None, None, :]  # (T, 1, Q)
        rows = top[:, None, None] + np.arange(high)[None, :, None]  # (T, P, 1)
        alpha = cover(
            (columns + 0.5 - px[:, None, None]).astype(np.float32), (rows + 0.5 - py[:, None, None]).astype(np.float32)
        )  # (T, P, Q)
        if clear is not None:
            alpha = alpha * clear[rows, columns]
        if mark is not None:
            mark[self._t, rows, columns] |= alpha > 0.1
        region = self.pixels[self._t, rows, columns]  # (T, P, Q, 3)
        region += alpha[..., None] * (np.asarray(color, np.float32) - region)
        self.pixels[self._t, rows, columns] = region
        return alpha.sum((1, 2))

    def shape(
        self, shape: str, x: Array, y: Array, r: float, color: Color, angle: Array | None = None, clear: Array | None = None
    ) -> Array:
        """Paints one object of radius r; x, y, angle (T,); clear as in `stamp`. Returns the area that is seen in pixels,
        (T,)."""
        turned = None if angle is None or not np.any(angle) else np.asarray(angle, np.float32)[:, None, None]
        reach = r * TRIANGLE_CIRCUM

        def cover(dx: Array, dy: Array) -> Array:
            return shape_coverage(shape, dx, dy, r * self.scale, turned)

        return self.stamp(cover, x, y, (reach, reach), color, clear)

    def layer(self, alpha: Array, top: int, left: int, color: Color) -> None:
        """Paints a colour through coverage (T, P, Q) or (P, Q) whose upper left pixel is (top, left)."""
        p, q = alpha.shape[-2:]
        region = self.pixels[:, top : top + p, left : left + q]
        region += alpha[..., None] * (np.asarray(color, np.float32) - region)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """Paints a standing, axis-aligned rectangle (short sides) with exact coverage."""
        alpha = rectangle_coverage(self.height, self.width, x0, y0, x1, y1)
        self.layer(alpha, 0, 0, color)

    def video(self) -> Array:
        """uint8 (T, H, W, 3)."""
        return (self.pixels + 0.5).astype(np.uint8)


def rectangle_coverage(height: int, width: int, x0: float, y0: float, x1: float, y1: float) -> Array:
    """Exact coverage (H, W) of an axis-aligned rectangle given in short sides."""
    scale = float(min(height, width))
    across = span(np.arange(width) + 0.5 - (x0 + x1) * scale / 2, (x1 - x0) * scale / 2)
    down = span(np.arange(height) + 0.5 - (y0 + y1) * scale / 2, (y1 - y0) * scale / 2)
    return (down[:, None] * across[None, :]).astype(np.float32)


def plain(height: int, width: int, color: Color) -> Array:
    """A one-colour background (H, W, 3)."""
    return np.broadcast_to(np.asarray(color, np.float32), (height, width, 3)).copy()


def over(background: Array, alpha: Array, color: Color) -> Array:
    """Background (H, W, 3) with a colour painted through coverage (H, W)."""
    return background + alpha[..., None] * (np.asarray(color, np.float32) - background)


def capsule_coverage(x: Array, y: Array, to: tuple[float, float], radius: float) -> Array:
    """Coverage of a thick line from (0, 0) to `to`; all in pixels."""
    length2 = to[0] ** 2 + to[1] ** 2
    along = np.clip((x * to[0] + y * to[1]) / max(length2, 1e-9), 0.0, 1.0)
    return np.clip(radius + 0.5 - np.hypot(x - along * to[0], y - along * to[1]), 0.0, 1.0)
