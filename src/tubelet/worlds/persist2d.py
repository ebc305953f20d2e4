"""What is done stays done: a brush paints strokes that remain, a mouth bites pieces out of food that stay gone.

State of both kinds: seconds (T,); x, y (T, 1), the brush tip or the mouth's centre; frame (2,) = width, height; canvas (T, H,
W) uint8, 0 for the background and k for the k-th stroke (counted from 1) or 1 for what is left of the food, as if nothing
stood in front; cover (T, H, W) uint8, 1 where brush or mouth hides it. Paint: stroke_color, stroke_kind (K,) int; stroke_path
(K, 4) = x0, y0, x1, y1 of a line or centre x, centre y, radius, 0 of a circle (drawn clockwise from its top); stroke_start,
stroke_end (K,) seconds. Eat: food () int; bite_x, bite_y, bite_time (K,); food_area (T,), short sides squared.
Events: stroke_start, stroke_end, bite (ids = number of the stroke or bite, from 0), leave (the brush or mouth has gone).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.worlds import grammar
from tubelet.worlds.base import Array, Episode, Event, check_request, stream
from tubelet.worlds.constants import (
    BITE_RADIUS,
    BRUSH_HANDLE,
    BRUSH_TIP,
    COLORS,
    DESK,
    FOOD_COLOR,
    FOOD_RADIUS,
    FOODS,
    HELD_OUT_FOOD,
    MOUTH,
    MOUTH_EYE,
    PALETTE,
    PAPER,
    PERSIST2D_KINDS,
    STROKE_RADIUS,
    STROKES,
    held_out_pair,
)
from tubelet.worlds.draw import Canvas, capsule_coverage, over, plain, rectangle_coverage

WORLD_SALT = 2
SPLITS = ("train", "held_out", "held_out_pair")
HANDLE = (0.11, -0.26)
"""Where the handle's end is, seen from the brush's tip."""
HANDLE_RADIUS = 0.018
TIP_RADIUS = 0.032
MOUTH_RADIUS = 0.16
PAPER_MARGIN = 0.03
MOST_STROKES = 3
CRUST = (182, 122, 48)
CHIP = (98, 64, 38)
STEM = (98, 88, 78)


@dataclass
class Stroke:
    """One stroke: what, from where to where, and when."""

    kind: str
    color: int
    path: tuple[float, float, float, float]
    direction: str | None
    start: float = 0.0
    end: float = 0.0

    def at(self, u: Array) -> tuple[Array, Array]:
        """The pen's place after the share u (T,) of the stroke."""
        a, b, c, d = self.path
        if self.kind == "circle":
            return a + c * np.sin(2 * math.pi * u), b - c * np.cos(2 * math.pi * u)
        return a + (c - a) * u, b + (d - b) * u

    def middle(self) -> tuple[float, float]:
        """Its centre."""
        a, b, c, d = self.path
        return (a, b) if self.kind == "circle" else ((a + c) / 2, (b + d) / 2)

    def words(self) -> dict[str, str]:
        """Its attributes for the grammar."""
        words = {"color": COLORS[self.color], "stroke": self.kind}
        return words if self.direction is None else {**words, "direction": self.direction}


@dataclass
class Plan:
    """A scene before it is sampled in time. `erased_at` and `flicker` break the law for controls; None and 0.0 keep it."""

    kind: str
    width: float
    height: float
    scene: dict[str, Any]
    knots: list[tuple[float, float, float]]
    """(seconds, x, y) of brush tip or mouth between which it moves in straight lines, strokes apart."""
    strokes: list[Stroke] = field(default_factory=list)
    food: str = ""
    center: tuple[float, float] = (0.0, 0.0)
    bites: list[tuple[float, float, float]] = field(default_factory=list)
    """(seconds, x, y) of each bite."""
    side: float = -1.0
    chips: list[tuple[float, float]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    erased_at: float | None = None
    flicker: float = 0.0

    def tool(self, seconds: Array) -> tuple[Array, Array]:
        """x, y (T,) of the brush tip or the mouth."""
        times, xs, ys = np.array(self.knots).T
        x, y = np.interp(seconds, times, xs), np.interp(seconds, times, ys)
        for stroke in self.strokes:
            on = (seconds >= stroke.start) & (seconds <= stroke.end)
            sx, sy = stroke.at(np.clip((seconds - stroke.start) / (stroke.end - stroke.start), 0.0, 1.0))
            x, y = np.where(on, sx, x), np.where(on, sy, y)
        return x, y


def propose(
    random: np.random.RandomState, kind: str, direction: str | None, width: float, height: float
) -> tuple[float, float, float, float]:
    """A place for a stroke of this kind and direction."""

    def spread(size: float, length: float, margin: float = 0.15) -> float:
        return margin + length / 2 + (size - 2 * margin - length) * random.random_sample()

    if kind == "circle":
        r = random.uniform(0.15, 0.23)
        return spread(width, 2 * r, 0.1), spread(height, 2 * r, 0.1), r, 0.0
    long, short = random.uniform(0.45, 0.68), random.uniform(0.40, 0.60)
    if kind == "horizontal":
        x, y = spread(width, long * width), spread(height, 0.0)
        path = (x - long * width / 2, y, x + long * width / 2, y)
    elif kind == "vertical":
        x, y = spread(width, 0.0), spread(height, long * height)
        path = (x, y - long * height / 2, x, y + long * height / 2)
    else:
        x, y = spread(width, short), spread(height, short)
        rise = short / 2 if random.rand() < 0.5 else -short / 2
        path = (x - short / 2, y - rise, x + short / 2, y + rise)
    return path if direction in ("right", "down") else (path[2], path[3], path[0], path[1])


def plan_paint(random: np.random.RandomState, split: str, wish: Mapping[str, Any], width: float, height: float) -> Plan:
    """One to three strokes, each of its own colour. Raises UserError when more are wished for."""
    wished = wish.get("strokes", [])
    if len(wished) > MOST_STROKES:
        raise UserError(f"a painting has at most {MOST_STROKES} strokes, got {len(wished)}; wish for fewer")
    count = len(wished) or (1, 1, 1, 2, 2, 2, 3, 3)[random.randint(8)]
    strokes: list[Stroke] = []
    for index in range(count):
        held_out = split != "train" and index == 0
        while True:
            color, kind = int(random.randint(len(COLORS))), int(random.randint(len(STROKES)))
            if held_out_pair(color, kind) == held_out and all(s.color != color for s in strokes):
                break
        want = wished[index] if index < len(wished) else {}
        name = want.get("stroke", STROKES[kind])
        color = COLORS.index(want["color"]) if "color" in want else color
        options = {
            "horizontal": ("right", "left"),
            "vertical": ("down", "up"),
            "diagonal": ("right", "left"),
            "circle": (None,),
        }[name]
        direction = options[random.randint(len(options))]
        direction = want["direction"] if want.get("direction", "") in options else direction
        # Of several places the one farthest from the strokes that are there, so that little is painted over.
        tries = [Stroke(name, color, propose(random, name, direction, width, height), direction) for _ in range(6)]
        apart = [min([math.dist(t.middle(), s.middle()) for s in strokes], default=0.0) for t in tries]
        strokes.append(tries[apart.index(max(apart))])
    count = len(strokes)
    gap, enter = 0.14, 0.16
    each = min(1.0, (1.68 - enter - gap * (count - 1)) / count) * random.uniform(0.85, 1.0)
    t = enter
    out = (0.34, -0.16)
    x, y = (float(v) for v in strokes[0].at(np.zeros(())))
    knots = [(0.0, x + out[0] * 0.5, y + out[1] * 0.9)]
    events: list[Event] = []
    for index, stroke in enumerate(strokes):
        stroke.start, stroke.end = t, t + each
        for moment, u in ((t, 0.0), (t + each, 1.0)):
            sx, sy = stroke.at(np.full((), u))
            knots.append((moment, float(sx), float(sy)))
        events += [(t, "stroke_start", (index,)), (t + each, "stroke_end", (index,))]
        t += each + gap
    end, x, y = knots[-1]
    # The brush goes up and to the right until its tip is above the frame.
    away = -0.1 - y
    leave = end + max(0.12, 0.30 * min(1.0, -away / 0.6))
    knots.append((leave, x - 0.3 * away, -0.1))
    knots.append((leave + 10.0, x - 0.3 * away, -0.1 - 20.0))
    events.append((leave, "leave", (0,)))
    return Plan(
        "paint", width, height, {"kind": "paint", "strokes": [s.words() for s in strokes]}, knots, strokes, events=events
    )


def plan_eat(random: np.random.RandomState, split: str, wish: Mapping[str, Any], width: float, height: float) -> Plan:
    """A mouth comes one to three times and takes a piece each time."""
    while True:
        food, count = FOODS[random.randint(len(FOODS))], 1 + int(random.randint(3))
        if ((food, count) == HELD_OUT_FOOD) == (split != "train"):
            break
    food, count = wish.get("food", food), min(max(int(wish.get("count", count)), 1), 3)
    side = wish.get("side", "left" if random.rand() < 0.5 else "right")
    sign = -1.0 if side == "left" else 1.0
    cx = width / 2 + random.uniform(-0.05, 0.05) - 0.04 * sign
    cy = height / 2 + random.uniform(-0.06, 0.06)
    lean = {1: [0.0], 2: [-0.5, 0.5], 3: [-0.9, 0.0, 0.9]}[count]
    order = random.permutation(count)
    cycle = {1: 1.25, 2: 0.85, 3: 0.60}[count] * random.uniform(0.94, 1.0)
    home = -MOUTH_RADIUS - 0.02 if sign < 0 else width + MOUTH_RADIUS + 0.02
    bites: list[tuple[float, float, float]] = []
    knots: list[tuple[float, float, float]] = []
    for k in range(count):
        turn = lean[order[k]] + random.uniform(-0.08, 0.08)
        bx, by = cx + sign * 0.92 * FOOD_RADIUS * math.cos(turn), cy + 0.92 * FOOD_RADIUS * math.sin(turn)
        when = (k + 0.5) * cycle
        stop = bx + sign * 0.05
        bites.append((when, bx, by))
        knots.append((k * cycle, home if k == 0 else stop + sign * 0.26, by))
        knots.append((when, stop, by))
    knots.append((count * cycle, home, knots[-1][2]))
    knots.append((count * cycle + 10.0, home, knots[-1][2]))
    events: list[Event] = [(t, "bite", (k,)) for k, (t, _, _) in enumerate(bites)]
    events.append((count * cycle, "leave", (0,)))
    spots = []
    for k in range(6):
        angle, reach = (k + random.uniform(-0.2, 0.2)) * math.pi / 3, FOOD_RADIUS * random.uniform(0.35, 0.72)
        spots.append((reach * math.cos(angle), reach * math.sin(angle)))
    scene = {"kind": "eat", "food": food, "count": count, "side": side}
    return Plan("eat", width, height, scene, knots, [], food, (cx, cy), bites, sign, spots, events)


def stroke_coverage(stroke: Stroke, x: Array, y: Array, scale: float, share: Array) -> Array:
    """Coverage (T, P, Q) of the part of a stroke that is drawn: x (1, Q), y (P, 1) pixel centres, share (T,) drawn, 0 for
    nothing yet."""
    a, b, c, d = (v * scale for v in stroke.path)
    radius = STROKE_RADIUS * scale
    u = share[:, None, None]
    if stroke.kind == "circle":
        dx, dy = x - a, y - b
        turn = np.mod(np.arctan2(dx, -dy), 2 * math.pi) / (2 * math.pi)  # (P, Q)
        tip = np.hypot(dx - c * np.sin(2 * math.pi * u), dy + c * np.cos(2 * math.pi * u))  # (T, P, Q)
        distance = np.where(turn <= u, np.abs(np.hypot(dx, dy) - c), np.minimum(tip, np.hypot(dx, dy + c)))
    else:
        length = math.hypot(c - a, d - b)
        ex, ey = (c - a) / length, (d - b) / length
        along = (x - a) * ex + (y - b) * ey  # (P, Q)
        aside = (y - b) * ex - (x - a) * ey
        distance = np.hypot(aside, along - np.clip(along, 0.0, u * length))
    return np.clip(radius + 0.5 - distance, 0.0, 1.0) * (u > 0)


def grid(height: int, width: int) -> tuple[Array, Array]:
    """Pixel centres: x (1, W), y (H, 1)."""
    return np.arange(width, dtype=np.float32)[None] + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5


def box_of(plan_box: tuple[float, float, float, float], height: int, width: int, scale: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels of x0, y0, x1, y1 in short sides, inside the frame."""
    x0, y0, x1, y1 = (v * scale for v in plan_box)
    return max(0, int(y0) - 2), min(height, int(y1) + 3), max(0, int(x0) - 2), min(width, int(x1) + 3)


def film_paint(plan: Plan, canvas: Canvas, seconds: Array, ids: Array) -> None:
    """Paints the strokes on the canvas and writes their numbers to ids (T, H, W)."""
    height, width, scale = canvas.height, canvas.width, canvas.scale
    xs, ys = grid(height, width)
    for k, stroke in enumerate(plan.strokes):
        share = np.clip((seconds - stroke.start) / (stroke.end - stroke.start), 0.0, 1.0)
        share = np.where(seconds >= stroke.start, np.maximum(share, 1e-6), 0.0)
        a, b, c, d = stroke.path
        pad = STROKE_RADIUS
        if stroke.kind == "circle":
            area = (a - c - pad, b - c - pad, a + c + pad, b + c + pad)
        else:
            area = (min(a, c) - pad, min(b, d) - pad, max(a, c) + pad, max(b, d) + pad)
        top, bottom, left, right = box_of(area, height, width, scale)
        alpha = stroke_coverage(stroke, xs[:, left:right], ys[top:bottom], scale, share).astype(np.float32)
        if plan.erased_at is not None:
            alpha = alpha * (seconds < plan.erased_at)[:, None, None]
        if plan.flicker:
            alpha = alpha * np.where(np.arange(len(seconds)) % 2 == 1, 1.0 - plan.flicker, 1.0)[:, None, None].astype(
                np.float32
            )
        canvas.layer(alpha, top, left, PALETTE[COLORS[stroke.color]])
        ids[:, top:bottom, left:right][alpha > 0.5] = k + 1


def food_coverage(plan: Plan, x: Array, y: Array, scale: float) -> list[tuple[Array, tuple[int, int, int]]]:
    """The layers of whole food, back to front, as (coverage (P, Q), colour); the first one is its outline."""
    cx, cy = plan.center[0] * scale, plan.center[1] * scale
    dx, dy = x - cx, y - cy
    r = FOOD_RADIUS * scale

    def disc(ox: float, oy: float, radius: float) -> Array:
        return np.clip(radius + 0.5 - np.hypot(dx - ox, dy - oy), 0.0, 1.0)

    def slab(oy: float, half_x: float, half_y: float, corner: float) -> Array:
        qx, qy = np.abs(dx) - (half_x - corner), np.abs(dy - oy) - (half_y - corner)
        outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
        return np.clip(0.5 - outside, 0.0, 1.0)

    color = FOOD_COLOR[plan.food]
    if plan.food == "cookie":
        chips = [(disc(ox * scale, oy * scale, 0.12 * r), CHIP) for ox, oy in plan.chips]
        return [(disc(0.0, 0.0, r), color), *chips]
    if plan.food == "bread":
        outer = np.maximum(slab(0.1 * r, 0.82 * r, 0.88 * r, 0.16 * r), slab(-0.5 * r, 0.98 * r, 0.42 * r, 0.38 * r))
        inner = np.maximum(slab(0.1 * r, 0.70 * r, 0.76 * r, 0.12 * r), slab(-0.5 * r, 0.86 * r, 0.30 * r, 0.28 * r))
        return [(outer, CRUST), (inner, color)]
    halves = np.maximum(disc(-0.28 * r, 0.0, 0.70 * r), disc(0.28 * r, 0.0, 0.70 * r))
    body = np.maximum(halves, disc(0.0, 0.22 * r, 0.74 * r))
    stem = capsule_coverage(dx, dy + 0.55 * r, (0.14 * r, -0.42 * r), 0.07 * r)
    return [(body, color), (stem * (1 - body), STEM)]


def film_eat(plan: Plan, canvas: Canvas, seconds: Array, ids: Array) -> Array:
    """Draws the food with its bites, writes ids (T, H, W) and returns the area left (T,) in short sides squared."""
    height, width, scale = canvas.height, canvas.width, canvas.scale
    xs, ys = grid(height, width)
    (cx, cy), reach = plan.center, FOOD_RADIUS * 1.1
    top, bottom, left, right = box_of((cx - reach, cy - reach, cx + reach, cy + reach), height, width, scale)
    x, y = xs[:, left:right], ys[top:bottom]
    layers = food_coverage(plan, x, y, scale)
    # The food has one look between two bites; each frame shows one of these stages.
    stages = [np.ones(layers[0][0].shape, np.float32)]
    for _, bx, by in plan.bites:
        hole = np.clip(BITE_RADIUS * scale + 0.5 - np.hypot(x - bx * scale, y - by * scale), 0.0, 1.0)
        stages.append((stages[-1] * (1 - hole)).astype(np.float32))
    stage = np.zeros(len(seconds), np.int64)
    for when, _, _ in plan.bites:
        stage += seconds >= when
    if plan.erased_at is not None:
        stage = np.where(seconds >= plan.erased_at, 0, stage)
    keep = np.stack(stages)[stage]  # (T, P, Q)
    if plan.flicker:
        keep = keep * np.where(np.arange(len(seconds)) % 2 == 1, 1.0 - plan.flicker, 1.0)[:, None, None].astype(np.float32)
    for alpha, color in layers:
        canvas.layer((keep * alpha).astype(np.float32), top, left, color)
    eaten = keep * layers[0][0]
    ids[:, top:bottom, left:right][eaten > 0.5] = 1
    return eaten.sum((1, 2), dtype=np.float64) / scale**2


def film_tool(plan: Plan, canvas: Canvas, seconds: Array) -> Array:
    """Draws brush or mouth over everything and returns where it covers, uint8 (T, H, W)."""
    cover = np.zeros(canvas.pixels.shape[:3], np.uint8)
    x, y = plan.tool(seconds)
    scale = canvas.scale
    if plan.kind == "paint":
        to = (HANDLE[0] * scale, HANDLE[1] * scale)

        def handle(dx: Array, dy: Array) -> Array:
            return capsule_coverage(dx + to[0] / 2, dy + to[1] / 2, to, HANDLE_RADIUS * scale)

        def tip(dx: Array, dy: Array) -> Array:
            return np.clip(TIP_RADIUS * scale + 0.5 - np.sqrt(dx * dx + dy * dy), 0.0, 1.0)

        reach = (HANDLE[0] / 2 + 2 * HANDLE_RADIUS, -HANDLE[1] / 2 + 2 * HANDLE_RADIUS)
        canvas.stamp(handle, x + HANDLE[0] / 2, y + HANDLE[1] / 2, reach, BRUSH_HANDLE, mark=cover)
        canvas.stamp(tip, x, y, (2 * TIP_RADIUS, 2 * TIP_RADIUS), BRUSH_TIP, mark=cover)
    else:
        # Open on the way to a bite, shut from the bite until the way back is done.
        opening = np.zeros(len(seconds))
        cycle = 2 * plan.bites[0][0]
        for when, _, _ in plan.bites:
            wait = when - seconds
            opening = np.where((wait > 0) & (wait <= cycle / 2), 0.62 * np.clip(4 * wait / cycle, 0.0, 1.0), opening)
        wide = opening[:, None, None].astype(np.float32)
        sine, cosine = np.sin(wide), np.cos(wide)

        def mouth(dx: Array, dy: Array) -> Array:
            disc = np.clip(MOUTH_RADIUS * scale + 0.5 - np.sqrt(dx * dx + dy * dy), 0.0, 1.0)
            ahead = -plan.side * dx
            gap = np.clip(0.5 - (np.abs(dy) * cosine - ahead * sine), 0.0, 1.0) * np.clip(ahead + 0.5, 0.0, 1.0)
            return disc * (1 - gap)

        def eye(dx: Array, dy: Array) -> Array:
            return np.clip(0.026 * scale + 0.5 - np.sqrt(dx * dx + dy * dy), 0.0, 1.0)

        canvas.stamp(mouth, x, y, (MOUTH_RADIUS, MOUTH_RADIUS), MOUTH, mark=cover)
        canvas.stamp(eye, x, y - 0.09, (0.03, 0.03), MOUTH_EYE)
    return cover


def make_plan(seed: int, height: int, width: int, kind: str | None, split: str, wish: Mapping[str, Any] | None) -> Plan:
    """The scene of a seed, before it is drawn."""
    wish = dict(wish or {})
    kind = kind or wish.get("kind")
    if kind is None:
        kind = PERSIST2D_KINDS[stream(seed, WORLD_SALT).randint(2**31 - 1) % len(PERSIST2D_KINDS)]
    if kind not in PERSIST2D_KINDS:
        raise UserError(f"the world persist2d has no kind {kind!r}; choose one of {', '.join(PERSIST2D_KINDS)}.")
    random = stream(seed, WORLD_SALT, 1 + PERSIST2D_KINDS.index(kind))
    planner = plan_paint if kind == "paint" else plan_eat
    short = min(height, width)
    return planner(random, split, wish, width / short, height / short)


def film(plan: Plan, height: int, width: int, frames: int, fps: float) -> tuple[Array, dict[str, Array]]:
    """Samples a plan in time and draws it: (video uint8 (T, H, W, 3), state)."""
    seconds = np.arange(frames) / fps
    image = plain(height, width, DESK)
    if plan.kind == "paint":
        m = PAPER_MARGIN
        image = over(image, rectangle_coverage(height, width, m, m, plan.width - m, plan.height - m), PAPER)
    canvas = Canvas(image, frames)
    ids = np.zeros((frames, height, width), np.uint8)
    state: dict[str, Array] = {"seconds": seconds, "frame": np.array([plan.width, plan.height])}
    if plan.kind == "paint":
        film_paint(plan, canvas, seconds, ids)
        state["stroke_color"] = np.array([s.color for s in plan.strokes], np.int64)
        state["stroke_kind"] = np.array([STROKES.index(s.kind) for s in plan.strokes], np.int64)
        state["stroke_path"] = np.array([s.path for s in plan.strokes])
        state["stroke_start"] = np.array([s.start for s in plan.strokes])
        state["stroke_end"] = np.array([s.end for s in plan.strokes])
    else:
        state["food_area"] = film_eat(plan, canvas, seconds, ids)
        state["food"] = np.array(FOODS.index(plan.food))
        state["bite_time"], state["bite_x"], state["bite_y"] = np.array(plan.bites).T
    state["cover"] = film_tool(plan, canvas, seconds)
    state["canvas"] = ids
    x, y = plan.tool(seconds)
    state["x"], state["y"] = x[:, None], y[:, None]
    return canvas.video(), state


def episode(plan: Plan, seed: int, height: int, width: int, frames: int, fps: float, split: str) -> Episode:
    """Draws and captions a plan."""
    video, state = film(plan, height, width, frames, fps)
    events = [e for e in plan.events if e[0] <= (frames - 1) / fps]
    random = stream(seed, WORLD_SALT, 99)
    middles = [stroke.middle() for stroke in plan.strokes]
    places = [grammar.where_within(x / plan.width, y / plan.height) for x, y in middles]
    dense = grammar.describe(plan.scene, events, places, variant=int(random.randint(3)))
    if plan.kind == "paint":
        first = plan.strokes[0]
        held_out = held_out_pair(first.color, STROKES.index(first.kind))
    else:
        held_out = (plan.food, len(plan.bites)) == HELD_OUT_FOOD
    tags: dict[str, Any] = {
        "world": "persist2d",
        "kind": plan.kind,
        "split": split,
        "seed": seed,
        "scene": plan.scene,
        "objects": plan.scene.get("strokes", [{"food": plan.food}]),
        "moon": False,
        "spin": False,
        "held_out_pair": held_out,
        "held_out_size": False,
    }
    camera = np.tile([plan.width / 2, plan.height / 2, plan.width, plan.height], (frames, 1))
    short, human = grammar.compose(plan.scene), grammar.paraphrase(plan.scene, random)
    return Episode(video, fps, short, dense, human, state, events, camera, tags)


class Persist2D:
    """The world of lasting marks."""

    name: str = "persist2d"
    kinds: tuple[str, ...] = PERSIST2D_KINDS
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
        check_request(self.name, self.kinds, self.splits, seed, height, width, frames, fps, kind, split)
        return episode(make_plan(seed, height, width, kind, split, wish), seed, height, width, frames, fps, split)
