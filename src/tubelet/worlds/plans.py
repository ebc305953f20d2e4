"""Scenes of `phys2d`: one planner a kind, each writing its motion down in closed form.

A planner draws attributes and motion from a `Draw` such that the law can be read from what is seen, and returns a `Plan`:
bodies with their pieces, events with their times, and the attributes that the captions name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.worlds.base import Array, Event, stream
from tubelet.worlds.bodies import (
    CANDIDATES,
    HELD_OUT_SIZE_KINDS,
    HOLE_KINDS,
    MARGIN,
    SHELL_KINDS,
    SPIN_SHARE,
    VISIBLE_HOP,
    WORLD_SALT,
    Body,
    Draw,
    Plan,
    first_true,
    heading,
)
from tubelet.worlds.constants import (
    COLORS,
    COMPOSED_KINDS,
    CUSHION_WIDTH,
    FLOOR_Y,
    GRAVITY,
    KINDS,
    NOMINAL_SECONDS,
    PANEL_FOOT,
    PANEL_HALF,
    PANEL_HEIGHT,
    PHYS2D_KINDS,
    RESTITUTIONS,
    SIZES,
    SPEED_HOLE,
    SPEED_HULL,
    speed_word,
)


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


def kinds_of(split: str) -> tuple[str, ...]:
    """Kinds of events that a split has."""
    few = {"held_out_size": HELD_OUT_SIZE_KINDS, "hole": HOLE_KINDS, "shell": SHELL_KINDS, "compose": COMPOSED_KINDS}
    return few.get(split, PHYS2D_KINDS)


def make_plan(
    seed: int, height: int, width: int, frames: int, fps: float, kind: str | None, split: str, wish: Mapping[str, Any] | None
) -> Plan:
    """The scene of a seed, before it is drawn."""
    wish = dict(wish or {})
    wanted: str | None = kind or wish.get("kind")
    short = min(height, width)
    choice = stream(seed, WORLD_SALT).randint(2**31 - 1)
    allowed = kinds_of(split)
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
