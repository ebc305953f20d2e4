"""Eight-coloured rigid objects under exact mechanics: slide, fall, bounce, parabola, collision, billiard, occlude.

Every motion is a closed form: pieces of constant acceleration between contacts whose times are computed, so position is exact
at any time and any frame rate. A scene is planned for `NOMINAL_SECONDS` such that its law can be read from 17 frames at 8 fps;
longer clips go on by the same law, shorter ones are its beginning. Horizontal lengths and speeds scale with the frame's width,
everything else with its short side.

State: seconds (T,); x, y, angle, vx, vy, omega, visible (T, N), where visible is the share of the object's area that is in the
frame and not covered; r, mass, e (N,); color, shape, size (N,) int, indices into constants; g, floor () and frame (2,) =
width, height; panel (4,) = x0, y0, x1, y1 when there is one.
Events: floor, collide, wall, apex, enter and exit (the centre passes the panel's edges), leave (wholly out of the frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.worlds import grammar
from tubelet.worlds.base import Array, Episode, Event, check_request, stream
from tubelet.worlds.constants import (
    ABOVE,
    AREA,
    BELOW,
    COLORS,
    COMPOSED_KINDS,
    CUSHION,
    CUSHION_WIDTH,
    FAST_ABOVE,
    FLOOR_Y,
    GRAVITY,
    GROUND,
    HALF_WIDTH,
    KINDS,
    MOON_GRAVITY,
    NOMINAL_SECONDS,
    PALETTE,
    PANEL,
    PANEL_FOOT,
    PANEL_HALF,
    PANEL_HEIGHT,
    PHYS2D_KINDS,
    RADIUS,
    RESTITUTIONS,
    SHAPES,
    SHELL,
    SIZES,
    SLOW_BELOW,
    SPEED_HOLE,
    SPEED_HULL,
    SPEEDS,
    WALL,
    held_out_pair,
    held_out_size,
    speed_word,
)
from tubelet.worlds.draw import Canvas, over, plain, rectangle_coverage

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


def plan_slide(draw: Draw) -> Plan:
    """An object slides along the floor at constant speed."""
    body = draw.body(0, [])
    sign = draw.direction()
    v = float(draw.speeds(body)[0])
    slack = draw.width - 2 * (body.half + MARGIN) - v * draw.width * NOMINAL_SECONDS
    start = body.half + MARGIN + draw.uniform(0.0, max(slack, 0.04))
    x = start if sign > 0 else draw.width - start
    body.go(0.0, x, FLOOR_Y * draw.height - body.below, sign * v * draw.width)
    return draw.plan([body], speed=speed_word(v), direction=heading(sign))


def drop(body: Body, x: float, height: float, rest: float, g: float, vx: float, horizon: float) -> list[Event]:
    """Lets a body go at `height` above its rest position and bounce with its restitution until it lies still."""
    t, speed = math.sqrt(2 * height / g), math.sqrt(2 * height * g)
    body.go(0.0, x, rest - height, vx, 0.0, g)
    events: list[Event] = []
    while t <= horizon and len(events) < 40:
        x_now = x + vx * t
        events.append((t, "floor", (0,)))
        speed *= body.e
        if speed**2 / (2 * g) < 0.002:
            body.go(t, x_now, rest, vx)
            break
        body.go(t, x_now, rest, vx, -speed, g)
        t += 2 * speed / g
    return events


def plan_fall(draw: Draw) -> Plan:
    """An object is let go, falls and stays where it lands."""
    body = draw.body(0, [])
    body.e = 0.0
    place, x = draw.place(body.half)
    rest = FLOOR_Y * draw.height - body.below
    most = min(rest - body.above - MARGIN, 0.5 * draw.g * 1.6**2)
    least = min(0.5 * draw.g * 0.56**2, most)
    height = float(draw.uniform(max(least, 0.55 * most), most))
    events = drop(body, x, height, rest, draw.g, 0.0, draw.horizon)
    other = draw.neighbour(body, x)
    plan = draw.plan([body, *([other] if other else [])], direction="down", place=place)
    plan.events = events
    return plan


def count_bounces(e: float, height: float, g: float, horizon: float) -> tuple[int, bool]:
    """(bounces that can be seen before `horizon`, whether the last of them can be told from none)."""
    t, up, count, clear = math.sqrt(2 * height / g), height, 0, True
    while t <= horizon:
        up *= e * e
        if up < VISIBLE_HOP:
            break
        count += 1
        clear = t <= horizon - 0.2 and not VISIBLE_HOP * 0.85 < up < VISIBLE_HOP * 1.15
        t += 2 * math.sqrt(2 * up / g)
    return count, clear


def plan_bounce(draw: Draw, drift: bool | None = None) -> Plan:
    """An object drops and bounces once or twice, on the spot or drifting sideways."""
    body = draw.body(0, [])
    rest = FLOOR_Y * draw.height - body.below
    most = rest - body.above - MARGIN
    wanted = draw.wish.get("count", 1 + draw.random.randint(2))
    heights = draw.uniform(min(0.27, most), most, CANDIDATES)
    chosen: tuple[float, float] | None = None
    for i in range(CANDIDATES):
        e = RESTITUTIONS[draw.random.randint(len(RESTITUTIONS))]
        count, clear = count_bounces(e, float(heights[i]), draw.g, NOMINAL_SECONDS)
        if clear and count in (1, 2):
            chosen = (e, float(heights[i]))
            if count == wanted:
                break
    e, height = chosen or (0.7, float(heights[0]))
    body.e = e
    drifts = bool(draw.random.rand() < 0.4) if drift is None else drift
    if draw.wish and drift is None:
        drifts = draw.wish.get("direction") in ("left", "right")
    sign = draw.direction()
    place, x = draw.place(body.half)
    room = draw.width - 2 * (body.half + MARGIN)
    v = (
        float(draw.uniform(SPEED_HULL[0], min(0.36, max(room / draw.width / NOMINAL_SECONDS, SPEED_HULL[0]))))
        if drifts
        else 0.0
    )
    if drifts:
        start = body.half + MARGIN + draw.uniform(0.0, max(room - v * draw.width * NOMINAL_SECONDS, 0.02))
        x = start if sign > 0 else draw.width - start
    events = drop(body, x, height, rest, draw.g, sign * v * draw.width, draw.horizon)
    count, _ = count_bounces(e, height, draw.g, max(draw.horizon, NOMINAL_SECONDS))
    other = None if drifts else draw.neighbour(body, x)
    extra = {"direction": heading(sign)} if drifts else {"place": place}
    plan = draw.plan([body, *([other] if other else [])], count=min(max(count, 1), 4), **extra)
    plan.events = events
    return plan


def throw(draw: Draw, body: Body, sign: float) -> tuple[float, float, float, float, float] | None:
    """(x, y, vx, rise speed, landing time) of a throw that is seen from start to end, sign +1 only; None if there is none."""
    rest = FLOOR_Y * draw.height - body.below
    reach = max(body.above, body.half)
    lift = draw.uniform(0.0, 0.3, CANDIDATES) * draw.height
    rise = draw.uniform(0.14, 0.66, CANDIDATES) * draw.height
    y = rest - lift
    up = np.sqrt(2 * draw.g * rise)
    land = (up + np.sqrt(up**2 + 2 * draw.g * lift)) / draw.g
    vx = draw.uniform(SPEED_HULL[0], 0.6, CANDIDATES) * draw.width
    travel = vx * np.minimum(land, NOMINAL_SECONDS)
    room = draw.width - 2 * (body.half + MARGIN)
    if body.size == SIZES.index("medium"):
        hole = (vx / draw.width > SPEED_HOLE[0] - MARGIN) & (vx / draw.width < SPEED_HOLE[1] + MARGIN)
    else:
        hole = np.zeros(CANDIDATES, bool)
    # Every throw but those on the moon comes down within the nominal time, with at least five frames of flight at 8 fps.
    fine = (
        (y - rise - reach > MARGIN)
        & (travel < room)
        & (land > 0.65)
        & ~hole
        & (land < (NOMINAL_SECONDS - 0.15 if draw.g == GRAVITY else 9.0))
    )
    i = first_true(fine)
    if i is None:
        return None
    start = body.half + MARGIN + draw.uniform(0.0, room - float(travel[i]))
    return float(start), float(y[i]), float(vx[i]), float(up[i]), float(land[i])


def plan_parabola(draw: Draw) -> Plan:
    """An object is thrown up to one side and stays where it lands."""
    body = draw.body(0, [])
    body.e = 0.0
    sign = draw.direction()
    thrown = throw(draw, body, sign) or (
        body.half + MARGIN,
        FLOOR_Y * draw.height - body.below,
        0.25 * draw.width,
        1.0,
        2.0 / draw.g,
    )
    start, y, vx, up, land = thrown
    x = start if sign > 0 else draw.width - start
    spin = bool(draw.random.rand() < SPIN_SHARE) and body.word in ("square", "triangle")
    # A turn by one symmetry of the outline during the flight, so that it lands flat.
    omega = sign * (math.pi / 2 if body.word == "square" else 2 * math.pi / 3) / land if spin else 0.0
    body.go(0.0, x, y, sign * vx, -up, draw.g, 0.0, omega)
    body.go(land, x + sign * vx * land, FLOOR_Y * draw.height - body.below)
    plan = draw.plan([body], direction=heading(sign))
    plan.spin = spin
    plan.events = [(up / draw.g, "apex", (0,)), (land, "floor", (0,))]
    return plan


def contact_distance(a: Body, b: Body) -> float:
    """Horizontal distance of the centres at which two objects that stand on the same floor touch."""
    high = min(a.below + a.above, b.below + b.above)
    levels = np.linspace(0.0, high, 129)

    def wide(body: Body) -> Array:
        if body.word == "square":
            return np.full_like(levels, body.half)
        if body.word == "triangle":
            return body.half * (1 - levels / (body.below + body.above))
        return np.sqrt(np.maximum(body.r**2 - (levels - body.r) ** 2, 0.0))

    return float((wide(a) + wide(b)).max())


def exchange(ma: float, mb: float, va: Any, vb: Any) -> tuple[Any, Any]:
    """Velocities after an elastic impact along one line."""
    total = ma + mb
    return ((ma - mb) * va + 2 * mb * vb) / total, ((mb - ma) * vb + 2 * ma * va) / total


def plan_collision(draw: Draw) -> Plan:
    """An object slides along the floor into another one that rests or comes to meet it: elastic, in one dimension, mass =
    area."""
    wished = draw.wish.get("objects", [])
    oncoming = bool(draw.random.rand() < 0.3)
    if len(wished) > 1 and "motion" in wished[1]:
        oncoming = wished[1]["motion"] == "oncoming"
    sign = draw.direction()
    first = draw.body(0, [])
    second = draw.body(1, [first])
    second.motion = "oncoming" if oncoming else "resting"
    W = draw.width
    # Both words of a speed stay inside the hull; the hole of the plane is defined for the main object and avoided by the
    # second one too.
    v = draw.speeds(first)
    u = draw.uniform(SPEED_HULL[0], 0.40, CANDIDATES) if oncoming else np.zeros(CANDIDATES)
    gap = contact_distance(first, second)
    after_first, after_second = exchange(first.mass, second.mass, v * W, -u * W)
    m1, m2 = first.half + MARGIN, second.half + MARGIN
    chosen: tuple[int, float, float] | None = None
    # Three frames before and after the contact; the first half of the candidates has the drawn speed word and is served first.
    drawn_word = np.arange(CANDIDATES) < CANDIDATES // 2
    for before, after, among in (
        (0.5, 0.45, drawn_word),
        (0.27, 0.38, drawn_word),
        (0.27, 0.38, ~drawn_word),
        (0.14, 0.14, drawn_word),
    ):
        when = before + (1.35 - before) * draw.random.random_sample(CANDIDATES) ** 2
        low = np.maximum(m1 + v * W * when, m1 - after_first * after)
        high = np.minimum(W - m2 - gap - u * W * when, W - m2 - gap - after_second * after)
        i = first_true((high > low) & among)
        if i is not None:
            chosen = i, float(when[i]), float(draw.uniform(float(low[i]), float(high[i])))
            break
    if chosen is None:
        i = int(np.argmin(v))
        when = 0.3
        chosen = i, when, m1 + float(v[i]) * W * when
    i, t, x = chosen
    floor = FLOOR_Y * draw.height
    spots = (x, x + gap)
    speeds = ((v[i] * W, after_first[i]), (-u[i] * W, after_second[i]))
    for body, spot, (old, new) in zip((first, second), spots, speeds, strict=True):
        here = spot if sign > 0 else W - spot
        body.go(0.0, here - sign * old * t, floor - body.below, sign * float(old))
        body.go(t, here, floor - body.below, sign * float(new))
    plan = draw.plan([first, second], speed=speed_word(float(v[i])), direction=heading(sign))
    plan.events = [(t, "collide", (0, 1))]
    return plan


def plan_occlude(draw: Draw) -> Plan:
    """An object slides along the floor behind a gray panel: at least three frames are seen before it and two after it."""
    body = draw.body(0, [])
    sign = draw.direction()
    W, frame = draw.width, 1 / 8
    v = draw.speeds(body, low=0.36, high=0.62)
    if draw.split != "hole" and "speed" not in draw.wish:
        # Slow enough that the object is seen almost whole, fast enough that it comes out in time.
        v = draw.uniform(0.375, 0.45 if body.size == SIZES.index("large") else 0.50, CANDIDATES)
        if body.size == SIZES.index("medium"):
            inside = (v > SPEED_HOLE[0] - MARGIN) & (v < SPEED_HOLE[1] + MARGIN)
            v = np.where(inside, v + SPEED_HOLE[1] - SPEED_HOLE[0] + 2 * MARGIN, v)
    if draw.split == "correlated_velocity":
        # The band in which an object passes the panel in time is narrow, so the two groups split there.
        v = draw.uniform(*((0.37, 0.39) if body.color < len(COLORS) // 2 else (0.50, 0.56)), CANDIDATES)
    step = v * W * frame
    # d: how far the centre is outside the panel in the frames that must be seen; wholly outside wherever there is room for it.
    free = W - 2 * (body.half + MARGIN) - 2 * PANEL_HALF
    d = np.minimum(body.half, (free - 3 * step) / 2)
    late = (NOMINAL_SECONDS - frame) * v * W - (2 * d + 2 * PANEL_HALF)
    i = first_true((d > 0.35 * body.half) & (late > 2 * step))
    if i is None:
        i = int(np.argmax(np.where(late > 2 * step, d, -1.0)))
    lead = 2 * step[i] + draw.uniform(0.0, min(free - 3 * step[i] - 2 * d[i], late[i] - 2 * step[i]))
    start = body.half + MARGIN
    edge = start + lead + d[i]
    spare = W - body.half - MARGIN - (edge + 2 * PANEL_HALF + d[i] + step[i])
    shift = draw.uniform(0.0, max(float(spare), 0.0))
    start, edge = start + shift, edge + shift
    x0 = edge if sign > 0 else W - edge - 2 * PANEL_HALF
    x = float(start if sign > 0 else W - start)
    floor = FLOOR_Y * draw.height
    body.go(0.0, x, floor - body.below, sign * float(v[i]) * W)
    plan = draw.plan([body], speed=speed_word(float(v[i])), direction=heading(sign))
    plan.panel = (float(x0), floor - PANEL_HEIGHT, float(x0) + 2 * PANEL_HALF, floor + PANEL_FOOT)
    return plan


def plan_billiard(draw: Draw) -> Plan:
    """Two to four balls on a table seen from above: one is aimed at another, all impacts are elastic, the cushions reflect."""
    wished = draw.wish.get("objects", [])
    count = max(2, min(4, len(wished))) if wished else 2 + draw.random.randint(3)
    bodies: list[Body] = []
    for index in range(count):
        bodies.append(draw.body(index, bodies))
    sign = draw.direction()
    W, H, c = draw.width, draw.height, CUSHION_WIDTH
    v = float(draw.speeds(bodies[0])[0]) * W
    spots: list[tuple[float, float]] = []
    for _ in range(40):
        spots = []
        for body in bodies:
            m = body.r + c + MARGIN
            xs, ys = draw.uniform(m, W - m, 24), draw.uniform(m, H - m, 24)
            if not spots:
                # The main ball starts on the side that it leaves.
                xs = draw.uniform(m, 0.3 * W, 24) if sign > 0 else draw.uniform(0.7 * W, W - m, 24)
                ys = draw.uniform(0.25 * H, 0.75 * H, 24)
            near = np.zeros(24, bool)
            for (ox, oy), other in zip(spots, bodies, strict=False):
                near |= np.hypot(xs - ox, ys - oy) < body.r + other.r + 0.03
            if len(spots) == 1:
                # The second ball is ahead and soon met.
                far = np.hypot(xs - spots[0][0], ys - spots[0][1]) - body.r - bodies[0].r
                near |= ((xs - spots[0][0]) * sign < np.abs(ys - spots[0][1])) | (far > 1.3 * v)
            i = first_true(~near)
            if i is None:
                break
            spots.append((float(xs[i]), float(ys[i])))
        if len(spots) == len(bodies):
            break
    if len(spots) < 2:
        spots = [(0.25 * W, H / 2), (0.75 * W, H / 2)] if sign > 0 else [(0.75 * W, H / 2), (0.25 * W, H / 2)]
    bodies = bodies[: len(spots)]
    dx, dy = spots[1][0] - spots[0][0], spots[1][1] - spots[0][1]
    distance = math.hypot(dx, dy)
    side = draw.uniform(-0.6, 0.6) * (bodies[0].r + bodies[1].r) / distance
    along = math.sqrt(1 - side * side)
    ux, uy = (dx * along - dy * side) / distance, (dy * along + dx * side) / distance
    velocities = np.zeros((len(bodies), 2))
    velocities[0] = v * ux, v * uy
    plan = draw.plan(bodies, speed=speed_word(v / W), direction=heading(sign))
    plan.g = 0.0
    plan.events = roll_table(bodies, np.array(spots), velocities, (c, c, W - c, H - c), max(draw.horizon, NOMINAL_SECONDS))
    return plan


def roll_table(
    bodies: list[Body], xy: Array, velocity: Array, box: tuple[float, float, float, float], horizon: float
) -> list[Event]:
    """Moves balls from impact to impact until `horizon`, writing their pieces; returns the impacts."""
    n, t = len(bodies), 0.0
    events: list[Event] = []
    for body, p, v in zip(bodies, xy, velocity, strict=True):
        body.go(0.0, float(p[0]), float(p[1]), float(v[0]), float(v[1]))
    while t < horizon and len(events) < 400:
        soonest, hit = math.inf, (0, -1, 0)
        for i in range(n):
            for axis in (0, 1):
                speed = float(velocity[i, axis])
                if speed:
                    wall = box[axis + 2] - bodies[i].r if speed > 0 else box[axis] + bodies[i].r
                    wait = max((wall - float(xy[i, axis])) / speed, 0.0)
                    if wait < soonest:
                        soonest, hit = wait, (i, -1, axis)
            for j in range(i):
                px, py = float(xy[i, 0] - xy[j, 0]), float(xy[i, 1] - xy[j, 1])
                ux, uy = float(velocity[i, 0] - velocity[j, 0]), float(velocity[i, 1] - velocity[j, 1])
                b = px * ux + py * uy
                if b < 0:
                    a, c = ux * ux + uy * uy, px * px + py * py - (bodies[i].r + bodies[j].r) ** 2
                    root = b * b - a * c
                    if root >= 0:
                        wait = max((-b - math.sqrt(root)) / a, 0.0)
                        if wait < soonest:
                            soonest, hit = wait, (i, j, 0)
        if soonest == math.inf:
            break
        t += soonest
        xy = xy + velocity * soonest
        i, j, axis = hit
        if j < 0:
            velocity[i, axis] *= -1
            events.append((t, "wall", (i,)))
        else:
            normal = (xy[i] - xy[j]) / np.hypot(*(xy[i] - xy[j]))
            a, b = float(velocity[i] @ normal), float(velocity[j] @ normal)
            after_a, after_b = exchange(bodies[i].mass, bodies[j].mass, a, b)
            velocity[i] += (after_a - a) * normal
            velocity[j] += (after_b - b) * normal
            events.append((t, "collide", (min(i, j), max(i, j))))
        for k in (i,) if j < 0 else (i, j):
            bodies[k].go(t, float(xy[k, 0]), float(xy[k, 1]), float(velocity[k, 0]), float(velocity[k, 1]))
    return events


def plan_bounce_occlude(draw: Draw) -> Plan:
    """Test only: an object bounces sideways and passes behind a panel on its way."""
    plan = plan_bounce(draw, drift=True)
    body = plan.bodies[0]
    x, v = body.pieces[0][1], body.pieces[0][3]
    middle = x + v * 1.0
    half = min(PANEL_HALF, 0.5 * abs(v) * 1.0)
    plan.panel = (middle - half, plan.floor - 0.7 * plan.height, middle + half, plan.floor + PANEL_FOOT)
    return plan


def plan_collision_parabola(draw: Draw) -> Plan:
    """Test only: a thrown object hits a resting one from the side; the impact acts along the floor."""
    sign = draw.direction()
    first = draw.body(0, [])
    second = draw.body(1, [first])
    second.motion = "resting"
    first.e = second.e = 0.0
    floor, W = FLOOR_Y * draw.height, draw.width
    rest = floor - first.below
    rise = float(draw.uniform(0.2, 0.35)) * draw.height
    up = math.sqrt(2 * draw.g * rise)
    # The impact comes shortly before the landing, when the two overlap in height.
    land = 2 * up / draw.g
    hit = land - min(0.35 * (first.r + second.r) / up, 0.1)
    gap = contact_distance(first, second)
    room = W - first.half - second.half - 2 * MARGIN - gap - 0.12 * W
    vx = min(room / hit, 0.5 * W)
    start = first.half + MARGIN
    x_hit = start + vx * hit
    y_hit = rest - up * hit + 0.5 * draw.g * hit**2
    after_first, after_second = exchange(first.mass, second.mass, vx, 0.0)

    def flip(x: float) -> float:
        return x if sign > 0 else W - x

    first.go(0.0, flip(start), rest, sign * vx, -up, draw.g)
    first.go(hit, flip(x_hit), y_hit, sign * after_first, -up + draw.g * hit, draw.g)
    first.go(land, flip(x_hit + after_first * (land - hit)), rest)
    second.go(0.0, flip(x_hit + gap), floor - second.below)
    second.go(hit, flip(x_hit + gap), floor - second.below, sign * after_second)
    plan = draw.plan([first, second], direction=heading(sign))
    plan.events = [(up / draw.g, "apex", (0,)), (hit, "collide", (0, 1)), (land, "floor", (0,))]
    return plan


PLANNERS: dict[str, Callable[[Draw], Plan]] = {
    "slide": plan_slide,
    "fall": plan_fall,
    "bounce": plan_bounce,
    "parabola": plan_parabola,
    "collision": plan_collision,
    "billiard": plan_billiard,
    "occlude": plan_occlude,
    "bounce+occlude": plan_bounce_occlude,
    "collision+parabola": plan_collision_parabola,
}


def passages(plan: Plan, horizon: float) -> list[Event]:
    """When objects leave the frame sideways and when their centres pass the panel's edges, from their pieces."""
    events: list[Event] = []
    for index, body in enumerate(plan.bodies):
        ends = [p[0] for p in body.pieces[1:]] + [horizon]
        for piece, end in zip(body.pieces, ends, strict=True):
            start, x, vx = piece[0], piece[1], piece[3]
            if not vx:
                continue
            marks = [(plan.width + body.half if vx > 0 else -body.half, "leave")]
            if plan.panel is not None:
                near, far = (plan.panel[0], plan.panel[2]) if vx > 0 else (plan.panel[2], plan.panel[0])
                marks += [(near, "enter"), (far, "exit")]
            for mark, kind in marks:
                t = start + (mark - x) / vx
                if start <= t < end and t > 0:
                    events.append((t, kind, (index,)))
    return events


def make_plan(
    seed: int, height: int, width: int, frames: int, fps: float, kind: str | None, split: str, wish: Mapping[str, Any] | None
) -> Plan:
    """The scene of a seed, before it is drawn."""
    wish = dict(wish or {})
    wanted: str | None = kind or wish.get("kind")
    short = min(height, width)
    choice = stream(seed, WORLD_SALT).randint(2**31 - 1)
    allowed = {"held_out_size": HELD_OUT_SIZE_KINDS, "hole": HOLE_KINDS, "shell": SHELL_KINDS, "compose": COMPOSED_KINDS}.get(
        split, PHYS2D_KINDS
    )
    kind = wanted or allowed[choice % len(allowed)]
    if kind not in allowed and not (wish and kind in COMPOSED_KINDS):
        raise UserError(f"the split {split!r} has no kind {kind!r}; choose one of {', '.join(allowed)}.")
    salt = (KINDS + COMPOSED_KINDS).index(kind)
    horizon = max((frames - 1) / fps, 0.0)
    draw = Draw(
        stream(seed, WORLD_SALT, salt + 1), kind, split, wish, width / short, height / short, max(horizon, NOMINAL_SECONDS)
    )
    plan = PLANNERS[kind](draw)
    plan.events = sorted([*plan.events, *passages(plan, max(horizon, NOMINAL_SECONDS))])
    return plan


def backdrop(plan: Plan, height: int, width: int) -> tuple[Array, Array | None]:
    """(background (H, W, 3), share of each pixel that the panel leaves free (H, W) or None)."""
    if plan.kind == "billiard":
        table = rectangle_coverage(
            height, width, CUSHION_WIDTH, CUSHION_WIDTH, plan.width - CUSHION_WIDTH, plan.height - CUSHION_WIDTH
        )
        return over(plain(height, width, CUSHION), table, GROUND), None
    image = over(
        plain(height, width, WALL), rectangle_coverage(height, width, 0.0, plan.floor, plan.width, plan.height), GROUND
    )
    if plan.panel is None:
        return image, None
    covered = rectangle_coverage(height, width, *plan.panel)
    return over(image, covered, PANEL), 1.0 - covered


def film(plan: Plan, height: int, width: int, frames: int, fps: float) -> tuple[Array, dict[str, Array]]:
    """Samples a plan in time and draws it: (video uint8 (T, H, W, 3), state)."""
    seconds = np.arange(frames) / fps
    image, clear = backdrop(plan, height, width)
    canvas = Canvas(image, frames)
    bodies = plan.bodies
    motion = np.array([body.at(seconds) for body in bodies])  # (N, 6, T)
    visible = np.empty((frames, len(bodies)))
    for index in range(len(bodies) - 1, -1, -1):
        body, (x, y, angle) = bodies[index], motion[index, :3]
        area = canvas.shape(body.word, x, y, body.r, PALETTE[COLORS[body.color]], angle, clear)
        visible[:, index] = np.clip(area / (body.mass * canvas.scale**2), 0.0, 1.0)
    names = ("x", "y", "angle", "vx", "vy", "omega")
    state: dict[str, Array] = {name: motion[:, i].T.copy() for i, name in enumerate(names)}  # (T, N)
    state["visible"] = visible
    state["seconds"] = seconds
    for name in ("r", "mass", "e"):
        state[name] = np.array([getattr(body, name) for body in bodies], np.float64)
    for name in ("color", "shape", "size"):
        state[name] = np.array([getattr(body, name) for body in bodies], np.int64)
    state["g"], state["floor"] = np.float64(plan.g) * np.ones(()), np.float64(plan.floor) * np.ones(())
    state["frame"] = np.array([plan.width, plan.height])
    if plan.panel is not None:
        state["panel"] = np.array(plan.panel)
    return canvas.video(), state


def start_place(x: float, width: float) -> str:
    """The third of the frame in which x lies."""
    return ("left", "center", "right")[min(2, max(0, int(3 * x / width)))]


def captions(plan: Plan, seed: int, events: list[Event]) -> tuple[str, str, str]:
    """Short, dense and casual caption of a plan."""
    random = stream(seed, WORLD_SALT, 99)
    variant = int(random.randint(3))
    heavier = None
    if len(plan.bodies) > 1:
        a, b = plan.bodies[0].mass, plan.bodies[1].mass
        heavier = None if abs(a - b) < 0.02 * a else int(b > a)
    scene = {**plan.scene, "spin": plan.spin}
    place = start_place(plan.bodies[0].pieces[0][1], plan.width)
    dense = grammar.describe(scene, events, place=place, variant=variant, heavier=heavier)
    return grammar.compose(plan.scene), dense, grammar.paraphrase(plan.scene, random)


def episode(plan: Plan, seed: int, height: int, width: int, frames: int, fps: float, split: str) -> Episode:
    """Draws and captions a plan."""
    video, state = film(plan, height, width, frames, fps)
    events = [e for e in plan.events if e[0] <= (frames - 1) / fps]
    short, dense, human = captions(plan, seed, events)
    main = plan.bodies[0]
    tags: dict[str, Any] = {
        "world": "phys2d",
        "kind": plan.kind,
        "split": split,
        "seed": seed,
        "scene": plan.scene,
        "objects": [body.words() for body in plan.bodies],
        "moon": bool(plan.scene.get("moon", False)),
        "spin": plan.spin,
        "held_out_pair": held_out_pair(main.color, main.shape),
        "held_out_size": held_out_size(main.size, plan.kind),
        "place": start_place(main.pieces[0][1], plan.width),
    }
    camera = np.tile([plan.width / 2, plan.height / 2, plan.width, plan.height], (frames, 1))
    return Episode(video, fps, short, dense, human, state, events, camera, tags)


class Phys2D:
    """The world of rigid objects in a plane."""

    name: str = "phys2d"
    kinds: tuple[str, ...] = PHYS2D_KINDS
    splits: tuple[str, ...] = SPLITS

    def sample(
        self,
        seed: int,
        height: int = 64,
        width: int = 64,
        frames: int = 17,
        fps: float = 8.0,
        *,
        kind: str | None = None,
        split: str = "train",
        wish: Mapping[str, Any] | None = None,
    ) -> Episode:
        """The clip of a seed; see `base.World.sample`. The scene does not depend on frames or fps: fewer frames are its
        beginning."""
        check_request(self.name, self.kinds + COMPOSED_KINDS, self.splits, seed, height, width, frames, fps, kind, split)
        plan = make_plan(seed, height, width, frames, fps, kind, split, wish)
        return episode(plan, seed, height, width, frames, fps, split)
