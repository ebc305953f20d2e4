"""Does a clip obey physics? Each law is read from pixels, the caption's words and the worlds' constants (WORLDS.md C5).

No true state is used, so a generated film is judged exactly like a simulated one. A clip that cannot be judged (no single
blob of the named colour, too few frames in the air, ...) has not obeyed: it fails and is counted in `evaluable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.evaluate.caption import food_and_bites, regrown
from tubelet.evaluate.reading import Reading, Scene, flights, line, moved
from tubelet.evaluate.tracker import AREA_TOLERANCE, Track, aligned_overlap, drawn
from tubelet.worlds.constants import AREA, BELOW, GRAVITY, HALF_WIDTH, MOON_GRAVITY, PAPER, RADIUS

THRESHOLDS: dict[str, float] = {
    "gravity": 0.15,
    "gravity_curve": 0.012,
    "inertia": 0.20,
    "inertia_strict": 0.10,
    "momentum": 0.20,
    "energy": 0.25,
    "impenetrability": 0.35,
    "permanence": 0.08,
    "paint": 0.80,
    "bites": 0.10,
    "steady_area": 0.10,
    "steady_outline": 0.82,
}
"""Frozen pass marks; what they measure is said at each law. `thresholds.json` keeps the pass rates measured with them."""


@dataclass(frozen=True)
class Verdict:
    """Whether a clip could be judged, whether it obeyed, and the number that decided (nan when it could not be judged)."""

    evaluable: bool
    passed: bool
    value: float = float("nan")


BLIND = Verdict(False, False)


@dataclass(frozen=True)
class Law:
    """A law's judge and the kinds of clip it applies to."""

    kinds: tuple[str, ...]
    judge: Callable[[Reading, Scene], Verdict]


def _named(wanted: Scene) -> list[dict[str, Any]]:
    return list(wanted.get("objects") or [{}])


def _main(reading: Reading, wanted: Scene) -> Track | None:
    found = reading.gated(_named(wanted)[:1])
    return found[0] if found else None


def _radius(thing: dict[str, Any], found: Track) -> float:
    """Radius in short sides: by the size word, else from the measured area."""
    if "size" in thing:
        return RADIUS[thing["size"]]
    return float(np.sqrt(np.median(found.area[found.valid]) / AREA[thing.get("shape", "ball")]))


def gravity(reading: Reading, wanted: Scene) -> Verdict:
    """In flight, `y = y0 + v t + g t^2 / 2` with the caption's g (2.2, on the moon 0.7) within 15 %, .012 short sides off
    at most (rms).

    Least squares over all flights of the clip, each with its own y0 and v and one common g; a flight ends at a push from
    below and
    one radius-dependent hair above the floor. Value: |g_fit / g - 1|.
    """
    found = _main(reading, wanted)
    if found is None:
        return BLIND
    g = MOON_GRAVITY if wanted.get("moon") else GRAVITY
    thing = _named(wanted)[0]
    rest = reading.floor - BELOW[thing.get("shape", "ball")] * _radius(thing, found)
    usable = found.valid & (np.nan_to_num(found.y, nan=9.0) < rest - 0.02)
    tick = 1.0 / reading.fps
    runs = [run for run in flights(found.y, usable, max(0.5 * g * tick**2, 0.012)) if len(run) >= 3]
    if not runs or sum(len(run) for run in runs) < 4:
        return BLIND
    # One column per flight's y0 and v would do; taking each flight's own line out first leaves a single unknown.
    curve, height = [], []
    for run in runs:
        t = run * tick
        for values, kept in ((0.5 * t**2, curve), (found.y[run], height)):
            slope, start = line(t, values)
            kept.append(values - start - slope * t)
    c, h = np.concatenate(curve), np.concatenate(height)
    fitted = float((c * h).sum() / (c * c).sum())
    error = abs(fitted / g - 1.0)
    # Up and down at constant speed also has a mean curvature; it does not follow the curve.
    astray = float(np.sqrt(np.mean(np.square(h - fitted * c))))
    return Verdict(True, error <= THRESHOLDS["gravity"] and astray <= THRESHOLDS["gravity_curve"], error)


def _speed_variation(reading: Reading, wanted: Scene) -> float | None:
    found = _main(reading, wanted)
    if found is None:
        return None
    frames = np.flatnonzero(found.valid)
    if len(frames) < 5:
        return None
    # Speeds over two frames: over one, tracking noise of a slow object would drown them.
    x, t = found.x[frames], frames / reading.fps
    speed = (x[2:] - x[:-2]) / (t[2:] - t[:-2])
    mean = abs(float(speed.mean()))
    return float(speed.std()) / mean if mean > 0.05 else None


def inertia(reading: Reading, wanted: Scene) -> Verdict:
    """Nothing pushes, so the horizontal speed stays: coefficient of variation below .20 (`inertia_strict`: .10)."""
    variation = _speed_variation(reading, wanted)
    return BLIND if variation is None else Verdict(True, variation < THRESHOLDS["inertia"], variation)


def inertia_strict(reading: Reading, wanted: Scene) -> Verdict:
    """`inertia` with the prototype's limit of .10."""
    variation = _speed_variation(reading, wanted)
    return BLIND if variation is None else Verdict(True, variation < THRESHOLDS["inertia_strict"], variation)


@dataclass(frozen=True)
class Impact:
    """Two objects before and after they meet: masses (area by words), velocities `(2 objects, before and after)`, summed
    radii."""

    masses: np.ndarray
    velocity: np.ndarray
    reach: float
    distance: np.ndarray  # signed, second minus first, frames where both are seen


def _impact(reading: Reading, wanted: Scene) -> Impact | None:
    things = _named(wanted)
    if len(things) < 2:
        return None
    pair = reading.gated(things[:2])
    if pair is None:
        return None
    a, b = pair
    frames = np.flatnonzero(a.valid & b.valid)
    if len(frames) < 4:
        return None
    t = frames / reading.fps
    places = np.stack([a.x[frames], b.x[frames]])
    best: tuple[float, np.ndarray] | None = None
    for k in range(2, len(frames) - 1):
        error, velocity = 0.0, np.zeros((2, 2))
        for i in range(2):
            for j, part in enumerate((slice(0, k), slice(k, None))):
                slope, start = line(t[part], places[i, part])
                velocity[i, j] = slope
                error += float(np.square(places[i, part] - start - slope * t[part]).sum())
        if best is None or error < best[0]:
            best = error, velocity
    assert best is not None
    radii = [_radius(o, f) for o, f in zip(things, pair, strict=False)]
    masses = np.array([AREA[o.get("shape", "ball")] * r**2 for o, r in zip(things, radii, strict=False)])
    return Impact(masses, best[1], sum(radii), places[1] - places[0])


def _met(impact: Impact) -> bool:
    """Whether they came close enough, with some speed, for a collision to be judged."""
    closest = float((impact.distance * np.sign(impact.distance[0])).min())
    # They may be nearest between two frames.
    stride = float(np.abs(np.diff(impact.distance)).max())
    return closest < 1.5 * impact.reach + 0.5 * stride and float(np.abs(impact.velocity[:, 0]).max()) > 0.08


def momentum(reading: Reading, wanted: Scene) -> Verdict:
    """m1 v1 + m2 v2 is the same before and after the impact: change below .20 of the larger sum of |m v|, and momentum
    changes hands.

    Mass is area by the caption's words; velocities are line fits on both sides of the impact, whose frame is the one that
    fits best. Objects that ignore each other keep their sum too, so the struck one must also have received some.
    """
    impact = _impact(reading, wanted)
    if impact is None or not _met(impact):
        return BLIND
    carried = impact.masses[:, None] * impact.velocity
    scale = float(np.abs(carried).sum(0).max())
    change = abs(float(carried[:, 1].sum() - carried[:, 0].sum())) / scale
    handed = abs(float(carried[1, 1] - carried[1, 0])) / scale
    return Verdict(True, change < THRESHOLDS["momentum"] and handed > THRESHOLDS["momentum"], change)


def energy(reading: Reading, wanted: Scene) -> Verdict:
    """The impact is elastic: kinetic energy changes by less than .25, and the relative speed turns round."""
    impact = _impact(reading, wanted)
    if impact is None or not _met(impact):
        return BLIND
    before, after = (float((impact.masses * impact.velocity[:, j] ** 2).sum()) for j in (0, 1))
    change = abs(after / before - 1.0)
    closing, parting = impact.velocity[1] - impact.velocity[0]
    return Verdict(True, change < THRESHOLDS["energy"] and closing * parting < 0, change)


def impenetrability(reading: Reading, wanted: Scene) -> Verdict:
    """Two solid things never share a place: the gap is never below -.35 (ra + rb), and their order is kept. Value: the
    deepest overlap."""
    impact = _impact(reading, wanted)
    if impact is None or not _met(impact):
        return BLIND
    ordered = impact.distance * np.sign(impact.distance[0])
    overlap = 1.0 - float(ordered.min()) / impact.reach
    return Verdict(True, overlap <= THRESHOLDS["impenetrability"], overlap)


def permanence(reading: Reading, wanted: Scene) -> Verdict:
    """What went behind the panel comes out where and when its line says, as large as before.

    The line is fitted to the frames before the panel. In every frame in which it says that half of the object or more must be
    seen beyond the panel (two at least), the object must be seen, in the median less than .08 short sides off, with an area
    within 40 % of what panel and frame leave free. Places are read from an edge that neither of them hides. Value: the median
    offset.
    """
    panel, thing = reading.panel, _named(wanted)[0]
    found = reading.objects([thing])[0]
    # A large object may be half hidden in every frame, so the gate on its area is the one on the free area below.
    if panel is None or found is None or found.single.sum() < 0.8 * found.present.sum():
        return BLIND
    if "size" not in thing and not found.valid.any():
        return BLIND
    shape = thing.get("shape", "ball")
    radius = _radius(thing, found)
    half = HALF_WIDTH[shape] * radius
    width, pixel = reading.width / reading.short, 1.0 / reading.short
    clear_left = found.present & (found.mask[:, :, 0].max(1) < 0.75)
    clear_right = found.present & (found.mask[:, :, -1].max(1) < 0.75)
    on_left = found.present & (found.right <= panel[0] + 1.5 * pixel)
    on_right = found.present & (found.left >= panel[1] - 1.5 * pixel)
    from_left, from_right = found.left + half, found.right - half
    place = np.full(reading.frames, np.nan)
    for side, outer, outer_clear, inner, inner_clear in (
        (on_left, from_left, clear_left, from_right, found.right < panel[0] - 1.5 * pixel),
        (on_right, from_right, clear_right, from_left, found.left > panel[1] + 1.5 * pixel),
    ):
        place[side & inner_clear] = inner[side & inner_clear]
        place[side & outer_clear] = outer[side & outer_clear]
    place = np.where(found.inside, found.x, place)
    first = np.flatnonzero((on_left | on_right) & np.isfinite(place))
    if not len(first):
        return BLIND
    forward = bool(on_left[first[0]])
    near, beyond = (on_left, on_right) if forward else (on_right, on_left)
    crossed = np.flatnonzero(beyond)
    before = np.flatnonzero(near & np.isfinite(place))
    before = before[before < (crossed[0] if len(crossed) else reading.frames)]
    # A sliver that still shows at the panel's edge is too little to read an edge from.
    before = before[found.area[before] > 0.3 * found.area[before].max(initial=0.0)]
    if len(before) < 2:
        return BLIND
    speed, start = line(before / reading.fps, place[before])
    if abs(speed) < 0.1 or (speed > 0) != forward:
        return BLIND
    expected = start + speed * np.arange(reading.frames) / reading.fps
    beyond_by = expected - panel[1] if forward else panel[0] - expected
    frame_by = width - expected if forward else expected
    due = (beyond_by >= 0.0) & (frame_by >= 0.0) & ((beyond_by > half + 2 * pixel) | (frame_by > half + pixel))
    due = np.flatnonzero(due & (np.arange(reading.frames) > before[-1]))
    if len(due) < 2:
        return BLIND
    offset = np.hypot(place[due] - expected[due], found.y[due] - np.median(found.y[before]))
    off = float(np.median(np.where(np.isfinite(offset), offset, 1.0)))

    def right_size(frames: np.ndarray) -> np.ndarray:
        free = np.array([_free_area(reading, panel, shape, radius, p) for p in place[frames]])
        return np.abs(found.area[frames] / np.maximum(free, 1e-9) - 1.0) <= AREA_TOLERANCE

    if not right_size(before).mean() >= 0.5:
        return BLIND
    seen = beyond[due] & right_size(due)
    return Verdict(True, off < THRESHOLDS["permanence"] and float(seen.mean()) >= 0.6, off)


def _free_area(reading: Reading, panel: tuple[float, float], shape: str, radius: float, x: float) -> float:
    """Area that panel and frame leave of an upright object centred at `x`, short sides squared."""
    if not np.isfinite(x):
        return 0.0
    side = int(2.6 * radius * reading.short) + 4
    origin = np.floor(x * reading.short - side / 2)
    picture = drawn(shape, radius * reading.short, 0.0, side, (x * reading.short - origin, side / 2))
    column = origin + np.arange(side) + 0.5
    free = (column < panel[0] * reading.short) | (column > panel[1] * reading.short)
    free &= (column > 0) & (column < reading.width)
    return float(picture[:, free].sum()) / reading.short**2


def steady(reading: Reading, wanted: Scene) -> Verdict:
    """One object keeps its area and its outline from frame to frame.

    The coefficient of variation of its area is below .10, and in nine of ten pairs of neighbouring frames the outlines, laid
    upon each other by their centroids and turned where that fits better, share at least .82 of their union (soft
    coverage, sub-pixel). Value: the variation of area.
    """
    found = _main(reading, wanted)
    if found is None:
        return BLIND
    frames = np.flatnonzero(found.valid)
    follows = np.diff(frames) == 1
    # Everything that this law is asked of moves; a film that stands still keeps its outline without merit.
    if follows.sum() < 3 or not moved(found):
        return BLIND
    variation = float(found.area[frames].std() / found.area[frames].mean())
    kept = aligned_overlap(found, frames, THRESHOLDS["steady_outline"])[follows] >= THRESHOLDS["steady_outline"]
    return Verdict(True, variation < THRESHOLDS["steady_area"] and float(kept.mean()) >= 0.9, variation)


def paint(reading: Reading, wanted: Scene) -> Verdict:
    """What has been painted stays: of the pixels seen in a stroke's colour in two neighbouring frames, .80 or more still
    have it at the end.

    Pixels that the brush or a later stroke covers at the end are left out; a picture half of which is there in the first frame
    is not one that is painted, so it cannot be judged. Value: the share that stayed.
    """
    names = [s["color"] for s in wanted.get("strokes", []) if "color" in s] or list(reading.tracks)
    names = list(dict.fromkeys(names))
    if not names or any(name not in reading.tracks for name in names):
        return BLIND
    labels = np.full(reading.frames * reading.height * reading.width, -1, np.int8)
    strong = reading.chroma.cover > 0.5
    labels[reading.chroma.where[strong]] = reading.chroma.owner[strong]
    labels = labels.reshape(reading.frames, -1)
    last = labels[-1]
    final = reading.clip[-1].reshape(-1, 3).astype(np.int16)
    bare = (np.abs(final - np.array(PAPER)).max(-1) <= 40) | ((final.min(-1) > 150) & (last < 0))
    once, stayed, begun, painted = 0, 0, 0, 0
    for name in names:
        own = labels == reading.chroma.names.index(name)
        ever = (own[1:] & own[:-1]).any(0)
        judged = ever & (own[-1] | bare)
        if ever.sum() < 0.006 * reading.short**2:
            return BLIND
        once, stayed = once + int(judged.sum()), stayed + int((judged & own[-1]).sum())
        begun, painted = begun + int((own[0] & ever).sum()), painted + int(ever.sum())
    if begun > 0.5 * painted:
        return BLIND
    share = stayed / max(once, 1)
    return Verdict(True, share >= THRESHOLDS["paint"], share)


def bites(reading: Reading, wanted: Scene) -> Verdict:
    """What is eaten stays gone: as many lasting bites as the caption counts, and at most .10 of the food grows back.
    Value: that share."""
    food, count = food_and_bites(reading)
    if food is None or wanted.get("food", food) != food:
        return BLIND
    back = regrown(reading)
    return Verdict(True, count >= 1 and count == wanted.get("count", count) and back <= THRESHOLDS["bites"], back)


LAWS: dict[str, Law] = {
    "gravity": Law(("fall", "bounce", "parabola"), gravity),
    "inertia": Law(("slide",), inertia),
    "inertia_strict": Law(("slide",), inertia_strict),
    "momentum": Law(("collision",), momentum),
    "energy": Law(("collision",), energy),
    "impenetrability": Law(("collision",), impenetrability),
    "permanence": Law(("occlude",), permanence),
    "steady": Law(("slide", "fall", "bounce", "parabola"), steady),
    "paint": Law(("paint",), paint),
    "bites": Law(("eat",), bites),
}
"""Every law by the name it has in the report."""


def judge(law: str, clip: np.ndarray | Reading, fps: float, wanted: Scene) -> Verdict:
    """One law's verdict on a uint8 clip `(T, H, W, 3)` whose caption names `wanted`. Raises UserError on an unknown law or
    a bad clip."""
    if law not in LAWS:
        raise UserError(f"there is no law {law!r}; choose one of {', '.join(LAWS)}")
    reading = clip if isinstance(clip, Reading) else Reading(clip, fps)
    return LAWS[law].judge(reading, wanted)


def rate(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Share that passed and share that could be judged, both of all clips."""
    if not verdicts:
        return float("nan"), float("nan")
    return float(np.mean([v.passed for v in verdicts])), float(np.mean([v.evaluable for v in verdicts]))
