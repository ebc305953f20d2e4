"""What moves in `phys2d`: bodies made of pieces of motion, and the draws from which a scene is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tubelet.worlds.base import Array, Event
from tubelet.worlds.constants import (
    ABOVE,
    AREA,
    BELOW,
    COLORS,
    FAST_ABOVE,
    FLOOR_Y,
    GRAVITY,
    HALF_WIDTH,
    MOON_GRAVITY,
    PHYS2D_KINDS,
    RADIUS,
    SHAPES,
    SHELL,
    SIZES,
    SLOW_BELOW,
    SPEED_HOLE,
    SPEED_HULL,
    SPEEDS,
    held_out_pair,
    held_out_size,
)

WORLD_SALT = 1
MARGIN = 0.01
MOON_SHARE = 0.12
NEIGHBOUR_SHARE = 0.12
SPIN_SHARE = 0.25
VISIBLE_HOP = 0.02
"""A bounce counts when the object comes back up by at least this much."""
CANDIDATES = 96
SPLITS = (
    "train",
    "held_out",
    "held_out_pair",
    "held_out_size",
    "hole",
    "shell",
    "compose",
    "correlated_velocity",
    "correlated_size",
)
HELD_OUT_SIZE_KINDS = tuple(k for k in PHYS2D_KINDS if any(held_out_size(z, k) for z in range(len(SIZES))))
HOLE_KINDS = ("slide", "collision", "occlude")
SHELL_KINDS = ("slide", "collision")


@dataclass
class Body:
    """One object and its motion: pieces (start, x, y, vx, vy, ay, angle, omega), each valid until the next one starts."""

    color: int
    shape: int
    size: int
    r: float
    e: float = 1.0
    motion: str | None = None
    pieces: list[tuple[float, float, float, float, float, float, float, float]] = field(default_factory=list)

    @property
    def word(self) -> str:
        """The name of the shape."""
        return SHAPES[self.shape]

    @property
    def half(self) -> float:
        """Half of the horizontal extent."""
        return HALF_WIDTH[self.word] * self.r

    @property
    def above(self) -> float:
        """Extent above the centre."""
        return ABOVE[self.word] * self.r

    @property
    def below(self) -> float:
        """Extent below the centre."""
        return BELOW[self.word] * self.r

    @property
    def mass(self) -> float:
        """Its area."""
        return AREA[self.word] * self.r**2

    def go(
        self,
        t: float,
        x: float,
        y: float,
        vx: float = 0.0,
        vy: float = 0.0,
        ay: float = 0.0,
        angle: float = 0.0,
        omega: float = 0.0,
    ) -> None:
        """From time t on: this position, velocity, downward acceleration and turning."""
        self.pieces.append((t, x, y, vx, vy, ay, angle, omega))

    def at(self, seconds: Array) -> tuple[Array, ...]:
        """x, y, angle, vx, vy, omega at times (T,), each (T,)."""
        table = np.array(self.pieces)
        table = table[np.clip(np.searchsorted(table[:, 0], seconds, side="right") - 1, 0, None)]
        start, x, y, vx, vy, ay, angle, omega = table.T
        dt = seconds - start
        return x + vx * dt, y + vy * dt + 0.5 * ay * dt * dt, angle + omega * dt, vx, vy + ay * dt, omega

    def words(self) -> dict[str, str]:
        """Its attributes for the grammar."""
        thing = {"size": SIZES[self.size], "color": COLORS[self.color], "shape": self.word}
        return thing if self.motion is None else {**thing, "motion": self.motion}


@dataclass
class Plan:
    """A scene before it is sampled in time: bodies with their motions, and the caption's attributes."""

    kind: str
    width: float
    height: float
    g: float
    bodies: list[Body]
    scene: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    panel: tuple[float, float, float, float] | None = None
    spin: bool = False

    @property
    def floor(self) -> float:
        """The y of the floor line."""
        return FLOOR_Y * self.height


class Draw:
    """The draws of one scene: what the split allows, overruled by what is wished for."""

    def __init__(
        self,
        random: np.random.RandomState,
        kind: str,
        split: str,
        wish: Mapping[str, Any],
        width: float,
        height: float,
        horizon: float,
    ):
        self.random, self.kind, self.split, self.wish = random, kind, split, wish
        self.width, self.height, self.horizon = width, height, horizon
        self.moon = self._wished("moon", bool(random.rand() < MOON_SHARE)) and kind in ("fall", "bounce", "parabola")
        self.g = MOON_GRAVITY if self.moon else GRAVITY
        goals = ["pair"] + ["size"] * (kind in HELD_OUT_SIZE_KINDS)
        drawn = goals[random.randint(len(goals))]
        self.goal = {"held_out": drawn, "held_out_pair": "pair", "held_out_size": "size"}.get(split, "in")
        self.shell = ("speed", "radius", "both")[random.randint(3)] if split == "shell" else ""

    def _wished(self, key: str, drawn: Any) -> Any:
        return self.wish.get(key, drawn)

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        """Uniform draws; an empty range gives its lower end."""
        return low + max(high - low, 0.0) * self.random.random_sample(size)

    def body(self, index: int, taken: list[Body]) -> Body:
        """The index-th object: the main one carries the split's composition, the others never show a held-out one."""
        goal = self.goal if index == 0 else "in"
        wishes = self.wish.get("objects", [])
        wished = wishes[index] if index < len(wishes) else {}
        while True:
            color, shape, size = (int(self.random.randint(n)) for n in (len(COLORS), len(SHAPES), len(SIZES)))
            if self.kind == "billiard":
                shape = 0
            if self.split == "hole" and index == 0:
                size = SIZES.index("medium")
            if self.shell in ("radius", "both") and index == 0:
                size = 0 if self.kind == "collision" or size < 2 else 2
            if self.split == "correlated_size":
                size = (color * len(SIZES)) // len(COLORS)
            pair, big = held_out_pair(color, shape), held_out_size(size, self.kind)
            if any(other.color == color for other in taken) or (pair, big) != (goal == "pair", goal == "size"):
                continue
            break
        color = COLORS.index(wished["color"]) if "color" in wished else color
        shape = SHAPES.index(wished["shape"]) if "shape" in wished and self.kind != "billiard" else shape
        size = SIZES.index(wished["size"]) if "size" in wished else size
        r = RADIUS[SIZES[size]]
        if self.shell in ("radius", "both") and index == 0:
            r = (
                self.uniform(RADIUS["small"] * (1 - SHELL), RADIUS["small"])
                if size == 0
                else self.uniform(r * 1.03, r * (1 + SHELL))
            )
        return Body(color, shape, size, float(r))

    def direction(self) -> float:
        """1.0 for right, -1.0 for left."""
        drawn = "right" if self.random.rand() < 0.5 else "left"
        return -1.0 if self._wished("direction", drawn) == "left" else 1.0

    def place(self, half: float) -> tuple[str, float]:
        """A third of the frame and an x in it, the object wholly inside the frame."""
        drawn = ("left", "center", "right")[self.random.randint(3)]
        third = ("left", "center", "right").index(place := self._wished("place", drawn))
        low = max(third / 3 * self.width + 0.02, half + MARGIN)
        high = min((third + 1) / 3 * self.width - 0.02, self.width - half - MARGIN)
        x = self.uniform(low, high)
        return place, float(x if low <= high else (low if third == 0 else high if third == 2 else self.width / 2))

    def speeds(self, body: Body, low: float = SPEED_HULL[0], high: float = SPEED_HULL[1]) -> Array:
        """Candidate speeds (CANDIDATES,) in frame widths per second, as the split allows, off the words' borders."""
        random = self.random
        if self.split == "hole":
            return self.uniform(*SPEED_HOLE, CANDIDATES)
        if self.shell in ("speed", "both"):
            slow = self.uniform(SPEED_HULL[0] * (1 - SHELL), SPEED_HULL[0] - MARGIN, CANDIDATES)
            fast = self.uniform(SPEED_HULL[1] + MARGIN, SPEED_HULL[1] * (1 + SHELL), CANDIDATES)
            return np.where(random.random_sample(CANDIDATES) < 0.5, slow, fast)
        if "speed" in self.wish:
            low, high = SPEED_HULL
        bands = {
            "slowly": (low, SLOW_BELOW - 0.02),
            "steadily": (max(low, SLOW_BELOW + 0.02), FAST_ABOVE - 0.04),
            "fast": (FAST_ABOVE + 0.02, high),
        }
        if self.split == "correlated_velocity":
            words = ("slowly",) if body.color < len(COLORS) // 2 else ("steadily", "fast")
        else:
            words = SPEEDS
        words = tuple(w for w in words if bands[w][0] < min(bands[w][1], high)) or words
        # One word per scene, so that a word that is hard to place is not crowded out by an easy one.
        drawn = words[random.randint(len(words))]
        first = bands[self._wished("speed", drawn)]
        speeds = self.uniform(first[0], min(first[1], max(high, first[0])), CANDIDATES)
        if "speed" not in self.wish:
            spare = [bands[w] for w in words]
            for i in range(CANDIDATES // 2, CANDIDATES):
                band = spare[i % len(spare)]
                speeds[i] = band[0] + (min(band[1], max(high, band[0])) - band[0]) * random.random_sample()
        if body.size == SIZES.index("medium") and self.split != "hole" and not self.wish:
            low_hole, high_hole = SPEED_HOLE
            inside = (speeds > low_hole - MARGIN) & (speeds < high_hole + MARGIN)
            speeds = np.where(inside, speeds + (high_hole - low_hole) + 2 * MARGIN, speeds)
        return speeds

    def neighbour(self, main: Body, x: float) -> Body | None:
        """Sometimes a second object that lies on the floor, clear of the main one."""
        wanted = len(self.wish.get("objects", [])) > 1 if self.wish else self.random.rand() < NEIGHBOUR_SHARE
        other = self.body(1, [main])
        gap = main.half + other.half + 0.05
        spots = self.uniform(other.half + MARGIN, self.width - other.half - MARGIN, CANDIDATES)
        spots = spots[np.abs(spots - x) > gap]
        if not wanted or not len(spots):
            return None
        other.motion = "resting"
        other.go(0.0, float(spots[0]), FLOOR_Y * self.height - other.below)
        return other

    def plan(self, bodies: list[Body], **scene: Any) -> Plan:
        """The plan with its caption attributes, in the grammar's order."""
        attributes = {"kind": self.kind, "objects": [b.words() for b in bodies], **scene}
        if self.moon:
            attributes["moon"] = True
        return Plan(self.kind, self.width, self.height, self.g, bodies, attributes)


def first_true(mask: Array) -> int | None:
    """Index of the first true candidate."""
    return int(np.argmax(mask)) if mask.any() else None


def heading(direction: float) -> str:
    """The word for a sign."""
    return "right" if direction > 0 else "left"
