"""One clip as the judges see it: tracks, backdrop, panel and motion, each worked out once.

Nothing here knows the true state. What is used is the pixels, the frame rate, the worlds' constants and, where a caller
gives them, the attributes that the caption names (`tubelet.worlds.grammar.parse`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.evaluate.tracker import MOST_GONE, Chroma, Track, chroma, gone, trackable, tracks
from tubelet.worlds.constants import DESK, FLOOR_Y, GROUND, PANEL, PANEL_HALF, PANEL_HEIGHT, PAPER, WALL

Scene = Mapping[str, Any]

STILL = 0.035
"""Short sides: an object whose centre stays within this has not moved."""


class Reading:
    """Lazy, cached measurements of a uint8 clip `(T, H, W, 3)` at `fps` frames per second. Raises UserError on a bad clip
    or rate."""

    def __init__(self, clip: np.ndarray, fps: float):
        if not fps > 0:
            raise UserError(f"frames per second must be positive, got {fps}; give the clip's rate")
        self.chroma: Chroma = chroma(clip)
        self.clip = clip
        self.fps = float(fps)
        self.frames, self.height, self.width = clip.shape[:3]
        self.short = min(self.height, self.width)

    @cached_property
    def tracks(self) -> dict[str, Track]:
        """Every palette colour that is seen long enough to be an object, by name.

        Beside a panel, an object counts as inside only where it is clear of the panel: half hidden, its centroid and area lie.
        """
        found = {k: v for k, v in tracks(self.chroma).items() if v.present.sum() >= min(2, self.frames)}
        if self.panel is None or not found:
            return found
        near, far = self.panel[0] - 1.5 / self.short, self.panel[1] + 1.5 / self.short
        return {k: replace(v, inside=v.inside & ((v.right < near) | (v.left > far))) for k, v in found.items()}

    @property
    def floor(self) -> float:
        """The floor line, short sides from the top."""
        return FLOOR_Y * self.height / self.short

    @cached_property
    def backdrop(self) -> str | None:
        """Which plain backdrop fills the clip: "wall", "table" (billiard), "paper" or "desk"; None when none of them does."""
        sample = self.clip[:: max(1, self.frames // 4), :: max(1, self.height // 24), :: max(1, self.width // 24)]
        sample = sample.reshape(-1, 3).astype(np.int16)
        known = np.array([WALL, GROUND, PAPER, DESK], np.int16)
        gap = np.abs(sample[:, None] - known).max(-1)  # (pixels, 4)
        nearest = np.where(gap.min(1) <= 16, gap.argmin(1), 4)
        share = np.bincount(nearest, minlength=5)[:4] / len(nearest)
        best = int(share.argmax())
        return ("wall", "table", "paper", "desk")[best] if share[best] >= 0.35 else None

    @cached_property
    def panel(self) -> tuple[float, float] | None:
        """Left and right edge of the gray panel in short sides; None when there is none."""
        still = np.median(self.clip[:: max(1, self.frames // 8)], axis=0)
        low, high = int((self.floor - 0.8 * PANEL_HEIGHT) * self.short), int((self.floor - 0.15 * PANEL_HEIGHT) * self.short)
        gray = (np.abs(still[low:high] - np.array(PANEL)).max(-1) <= 32).mean(0) > 0.6  # (W,)
        if gray.sum() < 2 * PANEL_HALF * self.short * 0.6:
            return None
        columns = np.flatnonzero(gray)
        return float(columns[0]) / self.short, float(columns[-1] + 1) / self.short

    def objects(self, wanted: Sequence[Mapping[str, str]]) -> list[Track | None]:
        """The track of each named object: by its colour, else the largest colour that nobody names. None where nothing fits."""
        named = {o["color"] for o in wanted if "color" in o}
        free = sorted((t for name, t in self.tracks.items() if name not in named), key=lambda t: -float(t.area.mean()))
        return [self.tracks.get(o["color"]) if "color" in o else (free.pop(0) if free else None) for o in wanted]

    def trackable(self, found: Track, shape: str | None = None, size: str | None = None) -> bool:
        """The gate `tracker.trackable`, and an object neither vanishes nor comes from nowhere. A panel may hide it: one valid
        frame is enough there."""
        if self.panel is not None:
            return trackable(found, shape, size, least=1)
        return trackable(found, shape, size) and int(gone(found).sum()) <= MOST_GONE

    def gated(self, wanted: Sequence[Mapping[str, str]]) -> list[Track] | None:
        """The tracks of all named objects if every one passes the trackable gate, area included; else None."""
        found = self.objects(wanted)
        whole = [t for t, o in zip(found, wanted, strict=True) if t and self.trackable(t, o.get("shape"), o.get("size"))]
        return whole if len(whole) == len(found) and whole else None


def moved(found: Track) -> bool:
    """Whether the object's centre travels farther than `STILL` while it is wholly in view."""
    frames = found.valid
    if frames.sum() < 2:
        return False
    return max(float(np.ptp(found.x[frames])), float(np.ptp(found.y[frames]))) > STILL


def line(t: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares `(slope, value at t = 0)`."""
    centre = t.mean()
    slope = float(((t - centre) * values).sum() / max(float(np.square(t - centre).sum()), 1e-12))
    return slope, float(values.mean() - slope * centre)


def bounces(y: np.ndarray, rise: float = 0.02) -> list[int]:
    """Frames of the lowest points between a descent and a rise of more than `rise` short sides. `y (T,)` may hold gaps
    (nan)."""
    known = np.flatnonzero(np.isfinite(y))
    low: list[int] = []
    deepest, highest, falling = -np.inf, np.inf, False
    at = 0
    for t in known:
        if falling:
            if y[t] > deepest:
                deepest, at = y[t], int(t)
            elif deepest - y[t] > rise:
                low.append(at)
                falling, highest = False, y[t]
        elif y[t] < highest:
            highest = y[t]
        elif y[t] - highest > rise:
            falling, deepest, at = True, y[t], int(t)
    return low


def flights(y: np.ndarray, usable: np.ndarray, kick: float) -> list[np.ndarray]:
    """Runs of consecutive usable frames without a push from below: split wherever the second difference of `y` is below
    `-kick`."""
    broken = np.zeros(len(y), bool)
    # broken[t]: something happened between frame t and t + 1.
    for t in range(1, len(y) - 1):
        if usable[t - 1] and usable[t] and usable[t + 1] and y[t + 1] - 2 * y[t] + y[t - 1] < -kick:
            broken[t - 1] = broken[t] = True
    runs: list[list[int]] = []
    for t in np.flatnonzero(usable):
        if runs and runs[-1][-1] == t - 1 and not broken[t - 1]:
            runs[-1].append(int(t))
        else:
            runs.append([int(t)])
    return [np.array(run) for run in runs]
