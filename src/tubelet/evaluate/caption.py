"""Does a clip show its sentence? Colour, shape, size, direction and event are read from pixels and compared with the words.

Colour comes from the tracker, shape and size from outline templates, direction and event from rules on the tracks. The
words compared with are those of `tubelet.worlds.grammar.parse`, or a world's own `tags["scene"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tubelet.evaluate.reading import STILL, Reading, Scene, bounces, moved
from tubelet.evaluate.tracker import Track, chroma, largest_blob, shape_and_size, trackable
from tubelet.worlds.constants import FAST_ABOVE, FOOD_COLOR, PALETTE, SLOW_BELOW

FACETS = ("colour", "shape", "size", "direction", "event")
CHANCE = {"colour": 1 / 8, "shape": 1 / 4, "size": 1 / 3, "direction": 1 / 2, "event": 1 / 9}
"""Rates of a uniform guess for one object."""
GROWS = 0.01
"""Short sides: a stroke whose centre moves no farther than this while it grows has no direction."""
STRAY_AREA = 0.0045
"""Short sides squared: half of the smallest object; more of a colour that nobody named is a stray object."""


def read(clip: np.ndarray | Reading, fps: float = 8.0) -> dict[str, Any]:
    """What a uint8 clip `(T, H, W, 3)` shows, in the words of a caption.

    Keys as in `grammar.parse` (`kind`, `objects` with color, shape, size, main one first, `direction`, `speed`, `place`,
    `count`;
    `strokes` of a painting; `food` of a meal), each present only if it can be read, and `trackable`: every object is one
    blob. Raises UserError on a bad clip.
    """
    reading = clip if isinstance(clip, Reading) else Reading(clip, fps)
    if reading.backdrop == "paper":
        strokes = [stroke for stroke, _ in _strokes(reading)]
        return {"trackable": bool(strokes), **({"kind": "paint", "strokes": strokes} if strokes else {})}
    if reading.backdrop == "desk":
        food, bites = food_and_bites(reading)
        if food is None:
            return {"trackable": False}
        return {"trackable": True, "food": food, "count": bites, **({"kind": "eat"} if bites else {})}
    found = sorted(_solid(reading).values(), key=lambda t: -_travel(t))
    if not found:
        return {"trackable": False}
    if reading.backdrop == "table":
        found = sorted(found, key=lambda t: -_early(t))
    objects = []
    for one in found:
        words = shape_and_size(one)
        objects.append({"color": one.colour, **({} if words is None else {"shape": words[0], "size": words[1]})})
    main = found[0]
    seen: dict[str, Any] = {"trackable": all(reading.trackable(t) for t in found), "objects": objects}
    kind = event(reading, found)
    if kind is not None:
        seen["kind"] = kind
    if kind in ("bounce", "bounce+occlude"):
        seen["count"] = min(len(bounces(main.y, 0.012)), 4)
    heading = direction(main, reading.backdrop == "table")
    if heading is not None:
        seen["direction"] = heading
    frames = np.flatnonzero(main.present)
    if kind is not None and len(frames) >= 2:
        width = reading.width / reading.short
        seen["place"] = ("left", "center", "right")[int(np.clip(3 * main.x[frames[0]] / width, 0, 2))]
        end = frames[min(2, len(frames) - 1)]
        speed = abs(main.x[end] - main.x[frames[0]]) / (end - frames[0]) * reading.fps / width
        seen["speed"] = "slowly" if speed < SLOW_BELOW else "fast" if speed > FAST_ABOVE else "steadily"
    return seen


def follow(clip: np.ndarray | Reading, fps: float, wanted: Scene) -> dict[str, bool]:
    """Which of the facets that `wanted` names a uint8 clip `(T, H, W, 3)` shows: any of "colour", "shape", "size",
    "direction", "event".

    A facet is right when it is right for every object that names it. When a named object cannot be tracked as one blob of
    its colour, every facet named is wrong. Colour also asks that no stray object of another colour is there. For paintings
    colour is every stroke's colour, direction every stroke's direction, event the number and kinds of strokes in order
    (strokes of one colour count as one, for they may cross); for meals event is the food and the number of bites. Raises
    UserError on a bad clip.
    """
    reading = clip if isinstance(clip, Reading) else Reading(clip, fps)
    kind = wanted.get("kind")
    if kind == "paint":
        return _follow_paint(reading, wanted)
    if kind == "eat":
        food, bites = food_and_bites(reading)
        eaten = food is not None and wanted.get("food", food) == food and bites >= 1 and wanted.get("count", bites) == bites
        return {"event": eaten and reading.backdrop == "desk"}
    things = list(wanted.get("objects", []))
    named = {
        "colour": any("color" in o for o in things),
        "shape": any("shape" in o for o in things),
        "size": any("size" in o for o in things),
        "direction": "direction" in wanted,
        "event": kind is not None,
    }
    found = reading.objects(things)
    if not things or any(t is None or not reading.trackable(t) for t in found):
        return {facet: False for facet, is_named in named.items() if is_named}
    tracks = [t for t in found if t is not None]
    right: dict[str, bool] = {}
    if named["colour"]:
        stray = set(_solid(reading)) - {t.colour for t in tracks}
        # A table may hold balls that a short prompt does not list.
        right["colour"] = not stray or kind == "billiard"
    words = [shape_and_size(t) if named["shape"] or named["size"] else None for t in tracks]
    for facet, key, index in (("shape", "shape", 0), ("size", "size", 1)):
        if named[facet]:
            right[facet] = all(w is not None and w[index] == o.get(key, w[index]) for w, o in zip(words, things, strict=True))
    if named["direction"]:
        right["direction"] = direction(tracks[0], reading.backdrop == "table") == wanted["direction"]
    if named["event"]:
        rest = [t for name, t in _solid(reading).items() if name not in {x.colour for x in tracks}]
        right["event"] = event(reading, [*tracks, *rest]) == kind
    return right


def _solid(reading: Reading) -> dict[str, Track]:
    """Tracks that are objects rather than coloured noise: seen with half of the smallest area in three of ten frames."""
    return {k: v for k, v in reading.tracks.items() if (v.area > STRAY_AREA).mean() >= 0.3 or trackable(v, least=3)}


def _travel(found: Track) -> float:
    frames = found.present
    return float(np.ptp(found.x[frames]) + np.ptp(found.y[frames])) if frames.any() else 0.0


def _early(found: Track) -> float:
    """Path length over the first three frames: on a table the ball that is played moves first."""
    frames = np.flatnonzero(found.present)[:3]
    return float(np.hypot(np.diff(found.x[frames]), np.diff(found.y[frames])).sum()) if len(frames) else 0.0


def direction(found: Track, hasty: bool = False) -> str | None:
    """Where an object sets out for: "left", "right", or "down" when it moves down only; None when it rests.

    Read over four steps, or over the first step only where an object may soon be deflected (`hasty`).
    """
    frames = np.flatnonzero(found.valid)
    if len(frames) < 3:
        frames = np.flatnonzero(found.present)
    if len(frames) < 2:
        return None
    for last, least in [(1, STILL / 4)] * hasty + [(min(4, len(frames) - 1), STILL), (len(frames) - 1, STILL)]:
        dx = float(found.x[frames[last]] - found.x[frames[0]])
        if abs(dx) > least:
            return "right" if dx > 0 else "left"
    return "down" if float(found.y[frames[-1]] - found.y[frames[0]]) > STILL else None


def event(reading: Reading, found: list[Track]) -> str | None:
    """The kind of event that the tracks (main object first) show; None when nothing moves or no rule fits."""
    if not any(moved(t) or _travel(t) > 2 * STILL for t in found):
        return None
    if reading.backdrop == "table":
        return "billiard"
    if reading.backdrop != "wall":
        return None
    main = found[0]
    frames = np.flatnonzero(main.present)
    y = main.y[frames]
    if len(frames) < 2:
        return None
    climbs = float(np.ptp(y)) > 0.08
    if reading.panel is not None:
        hidden = (~main.present | (main.area < 0.35 * main.area.max())) & (np.arange(reading.frames) > frames[0])
        between = hidden[: frames[-1]].any()
        if not between:
            return None
        return "bounce+occlude" if climbs else "occlude"
    others = [t for t in found[1:] if t.present.sum() >= 2]
    if not climbs:
        return "collision" if any(_near(main, t) for t in others) else "slide"
    if any(moved(t) for t in others):
        return "collision+parabola"
    # Thrown means that it first goes up by itself, and to one side.
    if y[0] - y[: max(2, int(len(y) * 0.7))].min() > 0.05 and abs(float(main.x[frames[-1]] - main.x[frames[0]])) > 2 * STILL:
        return "parabola"
    return "bounce" if bounces(main.y, 0.012) else "fall"


def _near(a: Track, b: Track) -> bool:
    """Whether two objects come within half a width of touching."""
    both = a.present & b.present
    if not both.any():
        return False
    gap = np.maximum(a.left - b.right, b.left - a.right)[both]
    # Contact falls between two frames: what they close in at once between frames may still be open in the nearest one.
    stride = float(np.abs(np.diff(gap)).max(initial=0.0))
    return float(gap.min()) < 0.25 * float(np.median((a.right - a.left)[both])) + 0.6 * stride


# --- paint and food ----------------------------------------------------------------------------------------------------


def _strokes(reading: Reading) -> list[tuple[dict[str, str], Track]]:
    """The painted strokes in order of appearance: color, stroke, direction."""
    found = []
    for name, one in reading.tracks.items():
        frames = np.flatnonzero(one.area > STRAY_AREA)
        if len(frames) < 2:
            continue
        # All that was ever painted, so that a later stroke across it does not cut it.
        mask = (one.mask > 0.5).sum(0) >= 2
        rows, columns = np.nonzero(mask)
        if len(rows) < 4:
            continue
        spread = np.cov(np.stack([columns, rows]).astype(np.float64))
        values, vectors = np.linalg.eigh(spread)
        words = {"color": name}
        if values[0] > 0.3 * values[1]:
            words["stroke"] = "circle"
        else:
            tilt = np.degrees(np.arctan2(abs(vectors[1, 1]), abs(vectors[0, 1])))
            words["stroke"] = "horizontal" if tilt < 22.5 else "vertical" if tilt > 67.5 else "diagonal"
            first, last = np.flatnonzero(one.present)[0], frames[-1]
            across, down = one.x[last] - one.x[first], one.y[last] - one.y[first]
            upright = words["stroke"] == "vertical"
            if abs(down if upright else across) > GROWS:
                words["direction"] = ("down" if down > 0 else "up") if upright else "right" if across > 0 else "left"
        found.append((int(np.flatnonzero(one.present)[0]), words, one))
    return [(words, one) for _, words, one in sorted(found, key=lambda f: f[0])]


def _by_colour(strokes: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Strokes as the tracker sees them: those of one colour are one, of which neither form nor direction can be told."""
    merged: dict[str, Mapping[str, str]] = {}
    for place, one in enumerate(strokes):
        key = one.get("color", str(place))
        merged[key] = {"color": key} if key in merged else one
    return list(merged.values())


def _follow_paint(reading: Reading, wanted: Scene) -> dict[str, bool]:
    named = _by_colour(wanted.get("strokes", []))
    seen = [words for words, _ in _strokes(reading)] if reading.backdrop == "paper" else []

    def match(key: str) -> bool:
        if len(seen) != len(named):
            return False
        return all(key not in o or o[key] == s.get(key) for o, s in zip(named, seen, strict=True))

    right: dict[str, bool] = {}
    if any("color" in o for o in named):
        right["colour"] = match("color")
    if any("direction" in o for o in named):
        right["direction"] = match("direction")
    right["event"] = match("stroke") if named else bool(seen)
    return right


def food_and_bites(reading: Reading) -> tuple[str | None, int]:
    """Which food lies there and how many bites are taken out of it; None and 0 when there is none."""
    food, gone = _food(reading)
    if food is None:
        return None, 0
    share = gone / reading.short**2
    bites, running = 0, 0.0
    # A bite is a run of frames in which food is seen for the last time; the mouth closes over it within a frame or two.
    for lost in [*share[:-1], 0.0]:
        if lost > 0.002:
            running += lost
            continue
        bites += running > 0.006
        running = 0.0
    return food, int(bites)


def _food_mask(reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    seen = chroma(reading.clip, {"brown": FOOD_COLOR["cookie"], "apple": PALETTE["red"]})
    mask = np.zeros((2, reading.frames, reading.height, reading.width), bool)
    strong = seen.cover > 0.5
    mask.reshape(2, -1)[seen.owner[strong], seen.where[strong]] = True
    return mask[0], mask[1]


def _food(reading: Reading) -> tuple[str | None, np.ndarray]:
    """The food's name and how many of its pixels are seen for the last time in each frame, `(T,)`."""
    brown, apple = _food_mask(reading)
    mask = brown if brown.sum() >= apple.sum() else apple
    for t in np.flatnonzero(mask.any((1, 2))):
        main, _ = largest_blob(mask[t])
        mask[t] = mask[t] if main is None else main
    if mask[: max(1, reading.frames // 4)].mean((1, 2)).max() < 0.04 * reading.short**2 / (reading.height * reading.width):
        return None, np.zeros(reading.frames)
    name = "apple"
    if mask is brown:
        tone = np.median(reading.clip[mask], axis=0)
        name = min(("cookie", "bread"), key=lambda food: float(np.square(tone - np.array(FOOD_COLOR[food])).sum()))
    # Pixels seen in two frames at least; single ones are noise.
    real = mask.sum(0) >= 2
    last = reading.frames - 1 - mask[::-1].argmax(0)
    return name, np.bincount(last[real], minlength=reading.frames).astype(np.float64)


def regrown(reading: Reading) -> float:
    """Share of the food's pixels that are bare table between two times at which they are food: what is eaten must stay gone."""
    brown, apple = _food_mask(reading)
    mask = brown if brown.sum() >= apple.sum() else apple
    low, high = reading.clip.min(-1), reading.clip.max(-1)
    # Bare table, or food so pale that the table shines through; the dark mouth is neither.
    bare = ~mask & ((low > 185) | ((high - low > 30) & (low > 140)))
    gone = np.logical_and(np.logical_or.accumulate(mask), bare)
    back = np.logical_and(np.logical_or.accumulate(gone), mask).sum(0) >= 2
    return float(back.sum()) / max(1, int((mask.sum(0) >= 2).sum()))
