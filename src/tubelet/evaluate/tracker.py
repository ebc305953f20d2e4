"""Where each coloured object is, read from pixels alone (WORLDS.md C5).

Saturated colour belongs to objects only, so a pixel's hue says whose it is and its chroma says how much of the pixel the
object covers. Identity is the colour; position is the soft centroid, size the soft area, outline the soft mask. Units are
short sides of the frame; x goes right, y goes down from the top left corner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tubelet.core.errors import UserError
from tubelet.worlds.constants import PALETTE, RADIUS, RING_INNER, SHAPES, SQUARE_HALF, TRIANGLE_CIRCUM

COLOURS = tuple(PALETTE)
HUE_GATE = 22.0
"""Degrees: a pixel farther than this from every palette hue belongs to nobody."""
CHROMA_GATE = 40
"""Levels of max - min below which a pixel is background: above codec noise on grey, below a third of any palette colour."""
SPECK_GATE = 0.18
"""Mean coverage over 3 x 3 pixels below which a coloured pixel is noise."""
PRESENT_AREA = 0.0018
"""Short sides squared (7 pixels at 64 px): less than a third of the smallest object is a speck, not an object."""
ONE_BLOB = 0.9
"""Share of an object's pixels that must hang together."""
AREA_TOLERANCE = 0.4
"""How far an area may be from what the words say."""
MOST_GONE = 1
"""Frames for which an object may be out of sight that nothing hides."""

_GRID = 17
_SPAN = 1.75


def _opponent(rgb: np.ndarray) -> np.ndarray:
    """Colour difference as a complex number: the angle is hue, the length is chroma, grey is zero."""
    r, g, b = rgb[..., 0].astype(np.float32), rgb[..., 1].astype(np.float32), rgb[..., 2].astype(np.float32)
    return r - 0.5 * (g + b) + 1j * np.float32(np.sqrt(3) / 2) * (g - b)


@dataclass(frozen=True)
class Track:
    """One colour's object over a clip; every array has one value per frame.

    `x, y` centroid, `area` soft area (short sides squared), `share` of the largest blob, `left, right, top, bottom` box
    edges, `present`: enough of the colour is seen, `inside`: the border does not cut it, `mask` soft coverage
    `(T, H, W)` in [0, 1].
    """

    colour: str
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    share: np.ndarray
    left: np.ndarray
    right: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    present: np.ndarray
    inside: np.ndarray
    mask: np.ndarray

    @property
    def single(self) -> np.ndarray:
        """Present as one blob, `(T,)`."""
        return self.present & (self.share >= ONE_BLOB)

    @property
    def valid(self) -> np.ndarray:
        """Present, one blob, and wholly inside the frame, `(T,)`."""
        return self.single & self.inside


@dataclass(frozen=True)
class Chroma:
    """The coloured pixels of a clip `(T, H, W)`: flat positions `where`, index of the nearest anchor `owner`, `cover` in
    [0, 1]."""

    frames: int
    height: int
    width: int
    names: tuple[str, ...]
    where: np.ndarray
    owner: np.ndarray
    cover: np.ndarray


def chroma(clip: np.ndarray, anchors: Mapping[str, tuple[int, int, int]] = PALETTE, gate: float = HUE_GATE) -> Chroma:
    """Which anchor colour each saturated pixel of a uint8 clip `(T, H, W, 3)` shows, and how much of the pixel it covers.

    A pixel farther than `gate` degrees of hue from every anchor belongs to nobody. Raises UserError on another form of clip.
    """
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or 0 in clip.shape:
        raise UserError(f"a clip to evaluate is uint8 (T, H, W, 3), got {clip.dtype} {clip.shape}; convert it first")
    pixels = clip.reshape(-1, 3)
    r, g, b = pixels.T.copy()
    spread = np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
    where = np.flatnonzero(spread >= CHROMA_GATE)
    seen = _opponent(pixels[where])
    hue = (
        _neighbourhood(r.astype(np.int16) * 2 - g - b, clip.shape[:3])[where]
        + 1j * np.float32(np.sqrt(3)) * (_neighbourhood(g.astype(np.int16) - b, clip.shape[:3])[where])
    )
    axes = _opponent(np.array(list(anchors.values()), np.float32))
    gap = np.degrees(np.abs(np.angle(hue[:, None] * axes.conj())))  # (pixels, anchors)
    owner = gap.argmin(1)
    axis = axes[owner]
    level = np.square(np.abs(axis))
    # On average over its neighbours a pixel of an object is coloured, a speck of noise on a tinted table is not.
    near = (gap[np.arange(len(owner)), owner] <= gate) & (np.real(hue * axis.conj()) > 9 * 2 * SPECK_GATE * level)
    where, owner = where[near], owner[near]
    cover = np.clip(np.real(seen * axis.conj()) / level, 0.0, 1.0)[near]
    frames, height, width = clip.shape[:3]
    return Chroma(frames, height, width, tuple(anchors), where, owner, cover.astype(np.float32))


def _neighbourhood(plane: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Sums over 3 x 3 pixels, flat: orange and yellow lie 20 degrees apart, which noise on one pixel may bridge but not on
    nine."""
    frames, height, width = shape
    padded = np.zeros((frames, height + 2, width + 2), np.int16)
    padded[:, 1:-1, 1:-1] = plane.reshape(shape)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).reshape(-1).astype(np.float32)


def track(clip: np.ndarray, colours: Iterable[str] | None = None) -> dict[str, Track]:
    """Follow colours through a uint8 clip `(T, H, W, 3)`: by default every palette colour that is seen in some frame.

    Colours asked for by name are always in the result, seen or not. Raises UserError on an unknown colour or a bad clip.
    """
    return tracks(chroma(clip), colours)


def tracks(seen: Chroma, colours: Iterable[str] | None = None) -> dict[str, Track]:
    """The tracks in an already read clip; see `track`."""
    unit = 1.0 / min(seen.height, seen.width)
    if colours is None:
        key = seen.owner * seen.frames + seen.where // (seen.height * seen.width)
        weight = np.bincount(key, seen.cover, len(seen.names) * seen.frames).reshape(len(seen.names), -1) * unit**2
        wanted = [name for i, name in enumerate(seen.names) if weight[i].max() >= PRESENT_AREA]
    else:
        wanted = list(dict.fromkeys(colours))
        for name in wanted:
            if name not in seen.names:
                raise UserError(f"{name!r} is not a colour of the worlds; choose one of {', '.join(seen.names)}")
    found = {}
    for name in wanted:
        own = seen.owner == seen.names.index(name)
        mask = np.zeros((seen.frames, seen.height, seen.width), np.float32)
        mask.reshape(-1)[seen.where[own]] = np.maximum(seen.cover[own], 1e-3)
        found[name] = _follow(name, mask, unit)
    return found


def _follow(name: str, mask: np.ndarray, unit: float) -> Track:
    frames, height, width = mask.shape
    owned = mask > 0
    share = np.zeros(frames)
    speck = int(PRESENT_AREA / 2 / unit**2)
    for t in np.flatnonzero(owned.any((1, 2))):
        main, share[t] = largest_blob(owned[t], speck)
        if main is not None:
            owned[t] = main
            mask[t] *= main
    columns, rows = mask.sum(1), mask.sum(2)  # (T, W), (T, H)
    total = columns.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = columns @ (np.arange(width) + 0.5) / total * unit
        y = rows @ (np.arange(height) + 0.5) / total * unit
    area = total * unit**2
    present = area >= PRESENT_AREA
    left, right = _edges(mask.max(1))
    top, bottom = _edges(mask.max(2))
    # Half a covered pixel on the border is the soft rim of an object that ends there; an object cut by the border covers it.
    rim = np.stack([mask[:, 0].max(1), mask[:, -1].max(1), mask[:, :, 0].max(1), mask[:, :, -1].max(1)]).max(0)
    inside = present & (rim <= 0.6)
    x, y = np.where(present, x, np.nan), np.where(present, y, np.nan)
    return Track(name, x, y, area, share, left * unit, right * unit, top * unit, bottom * unit, present, inside, mask)


def _edges(profile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a profile `(T, n)` first rises above and last falls below one half, in cells, interpolated; the border where
    it is cut."""

    def rise(p: np.ndarray) -> np.ndarray:
        at = (p >= 0.5).argmax(1)
        rows = np.arange(len(p))
        here, last = p[rows, at], p[rows, np.maximum(at - 1, 0)]
        return np.where(at == 0, 0.0, at + 0.5 - (here - 0.5) / np.maximum(here - last, 1e-6))

    return rise(profile), profile.shape[1] - rise(profile[:, ::-1])


def largest_blob(mask: np.ndarray, speck: int = 0) -> tuple[np.ndarray | None, float]:
    """The largest 8-connected blob of a boolean `(H, W)` and its share of all set pixels; None for the blob when it is all.

    Other blobs of at most `speck` pixels are noise and do not count against the share.
    The frame is one long integer, a bit per pixel with an empty column as guard: flooding is shifts and masks of machine words.
    """
    height, width = mask.shape
    row = width + 1
    padded = np.zeros((height, row), bool)
    padded[:, :width] = mask
    bits = int.from_bytes(np.packbits(padded, bitorder="little").tobytes(), "little")
    total = bits.bit_count()
    if total == 0:
        return None, 0.0
    rest, best, size, noise = bits, 0, 0, 0
    while rest:
        blob, grown = 0, rest & -rest
        while grown != blob:
            blob = grown
            line = blob | blob << 1 | blob >> 1
            grown = (line | line << row | line >> row) & bits
        rest &= ~blob
        count = blob.bit_count()
        noise += count if count <= speck else 0
        if count > size:
            best, size = blob, count
    noise -= size if size <= speck else 0
    if size == total:
        return None, 1.0
    raw = np.frombuffer(best.to_bytes((height * row + 7) // 8, "little"), np.uint8)
    return np.unpackbits(raw, count=height * row, bitorder="little").reshape(height, row)[:, :width].astype(bool), size / (
        total - noise
    )


# --- outlines: what shape and size a track has -------------------------------------------------------------------------


def _patches(mask: np.ndarray, x: np.ndarray, y: np.ndarray, step: np.ndarray, angle: float = 0.0) -> np.ndarray:
    """Bilinear samples `(N, _GRID, _GRID)` of `mask (N, H, W)` around pixel positions `x, y` every `step` pixels, turned
    by `angle`."""
    n, height, width = mask.shape
    offsets = np.arange(_GRID) - _GRID // 2
    cosine, sine = np.cos(angle), np.sin(angle)
    right = offsets[None, :] * cosine - offsets[:, None] * sine  # (G, G)
    low = offsets[None, :] * sine + offsets[:, None] * cosine
    across = np.clip(x[:, None, None] + step[:, None, None] * right + 0.5, 0.0, width + 1.0)  # (N, G, G), padded by one
    down = np.clip(y[:, None, None] + step[:, None, None] * low + 0.5, 0.0, height + 1.0)
    c0, r0 = across.astype(np.int64), down.astype(np.int64)
    fc, fr = (across - c0).astype(np.float32), (down - r0).astype(np.float32)
    padded = np.pad(mask, ((0, 0), (1, 2), (1, 2)))
    row = width + 3
    at = np.arange(n)[:, None, None] * (row * (height + 3)) + r0 * row + c0
    flat = padded.reshape(-1)
    top = flat[at] * (1 - fc) + flat[at + 1] * fc
    bottom = flat[at + row] * (1 - fc) + flat[at + row + 1] * fc
    return top * (1 - fr) + bottom * fr


def drawn(shape: str, radius: float, angle: float, side: int, centre: tuple[float, float]) -> np.ndarray:
    """Exact-coverage picture `(side, side)` in [0, 1] of a shape at a pixel position (4 x 4 samples a pixel).

    Drawn anew rather than by the world's painter, so that the judge does not depend on what it judges.
    """
    samples = (np.arange(side * 4) + 0.5) / 4
    dx, dy = samples[None, :] - centre[0], samples[:, None] - centre[1]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    distance = np.hypot(u, v)
    if shape == "ball":
        inside = distance <= radius
    elif shape == "ring":
        inside = (distance <= radius) & (distance >= RING_INNER * radius)
    elif shape == "square":
        inside = np.maximum(np.abs(u), np.abs(v)) <= SQUARE_HALF * radius
    else:
        inside = (
            np.max([u * np.sin(a) - v * np.cos(a) for a in np.pi + np.arange(3) * 2 * np.pi / 3], 0)
            <= TRIANGLE_CIRCUM * radius / 2
        )
    return inside.reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32)


@dataclass(frozen=True)
class Templates:
    """Pictures `(K, _GRID**2)` of every shape, size and angle as the tracker would see them, and each (shape, size)'s soft
    area."""

    pictures: np.ndarray
    shape: np.ndarray
    area: np.ndarray  # (shapes, sizes), short sides squared


@lru_cache(maxsize=8)
def templates(short: int) -> Templates:
    """Templates for frames of `short` pixels on the short side: 3 sizes, sharp and blurred, all angles, 2 sub-pixel places."""
    pictures, owners, area = [], [], np.zeros((len(SHAPES), len(RADIUS)))
    turns = {"square": np.arange(9) * np.pi / 18, "triangle": np.arange(12) * np.pi / 18}
    for j, size in enumerate(RADIUS):
        radius = RADIUS[size] * short
        side = int(np.ceil(2 * radius * 1.3)) + 6
        for i, shape in enumerate(SHAPES):
            for angle in turns.get(shape, np.zeros(1)):
                for shift in (0.0, 0.37):
                    sharp = drawn(shape, radius, float(angle), side, (side / 2 + shift, side / 2 - shift))
                    for picture in (sharp, _blurred(sharp)):
                        # The tracker drops thin coverage; templates must lose the same rim.
                        kept = np.where(picture >= 0.3, picture, 0.0)
                        if kept.any():  # of the smallest ring on 16 pixels the blurred picture keeps nothing
                            pictures.append(_normalised(kept[None])[0])
                            owners.append(i)
                    area[i, j] += np.where(sharp >= 0.3, sharp, 0.0).sum() / short**2 / len(turns.get(shape, [0])) / 2
    return Templates(np.stack(pictures).reshape(len(pictures), -1), np.array(owners), area)


def _blurred(picture: np.ndarray, sigma: float = 0.9) -> np.ndarray:
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(picture, 3)
    rows = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=0) @ taps
    return np.lib.stride_tricks.sliding_window_view(rows, 7, axis=1) @ taps


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Patches with place and area taken out: centred on the centroid, scaled by the soft area. `(N, _GRID, _GRID)`."""
    total = mask.sum((1, 2))
    x = mask.sum(1) @ (np.arange(mask.shape[2]) + 0.5) / total
    y = mask.sum(2) @ (np.arange(mask.shape[1]) + 0.5) / total
    step = 2 * _SPAN * np.sqrt(total / np.pi) / (_GRID - 1)
    return _patches(mask, x, y, step).astype(np.float32)


def shape_costs(found: Track, frames: np.ndarray) -> np.ndarray:
    """Mean squared distance `(len(frames), len(SHAPES))` of the object's outline to the nearest picture of each shape."""
    known = templates(min(found.mask.shape[1:]))
    seen = _normalised(found.mask[frames]).reshape(len(frames), -1)
    cost = np.square(known.pictures).sum(1) - 2 * seen @ known.pictures.T + np.square(seen).sum(1)[:, None]
    return np.stack([cost[:, known.shape == i].min(1) for i in range(len(SHAPES))], 1) / seen.shape[1]


def shape_and_size(found: Track) -> tuple[str, str] | None:
    """The shape and size words of a track by template matching over its valid frames; None when it has none.

    Votes are summed squared distances, so a frame that is clear decides more than one that is not.
    """
    frames = np.flatnonzero(found.valid)
    if not len(frames):
        return None
    best = int(shape_costs(found, frames).sum(0).argmin())
    area = templates(min(found.mask.shape[1:])).area[best]
    ratio = np.log(np.median(found.area[frames]) / area)
    return SHAPES[best], list(RADIUS)[int(np.abs(ratio).argmin())]


def expected_area(shape: str, size: str, short: int) -> float:
    """Soft area, in short sides squared, that the tracker reads for these words on frames of `short` pixels."""
    return float(templates(short).area[SHAPES.index(shape), list(RADIUS).index(size)])


def trackable(found: Track, shape: str | None = None, size: str | None = None, least: int = 2) -> bool:
    """The gate before every judgement: exactly one blob of the colour wherever it is seen whole, with the worded area.

    At least `least` frames must be valid, nine of ten frames that show the colour inside the frame must be one blob, and
    the median area must be within 40 % of what `shape` and `size` say (where both are given).
    """
    whole = found.inside
    valid = found.valid
    if valid.sum() < least or valid.sum() < 0.9 * whole.sum():
        return False
    if shape is None or size is None:
        return True
    ratio = float(np.median(found.area[valid])) / expected_area(shape, size, min(found.mask.shape[1:]))
    return abs(ratio - 1.0) <= AREA_TOLERANCE


def gone(found: Track) -> np.ndarray:
    """Frames `(T,)` in which an object is not seen although nothing took it out of view, or brought it there later.

    Where it was last seen whole, and one and a half of its last step further on would be whole still, it should be seen in the
    next frame; so before it is first seen, backwards. What falls stays above the frame's lower edge.
    """
    width = found.mask.shape[2] / min(found.mask.shape[1:])
    lost = np.zeros(len(found.present), bool)
    seen = np.flatnonzero(found.present)
    for order in (seen, seen[::-1]):
        for place, last in enumerate(order):
            if place + 1 < len(order):
                until = order[place + 1]
            else:
                until = len(lost) if order is seen else -1
            missing = np.arange(last, until, 1 if until > last else -1)[1:]
            if not len(missing) or not found.inside[last]:
                continue
            before = order[place - 1] if place else last
            ahead = 1.5 / max(1, abs(last - before))
            across, down = ahead * (found.x[last] - found.x[before]), ahead * (found.y[last] - found.y[before])
            if found.left[last] + across > 0 and found.right[last] + across < width and found.top[last] + down > 0:
                lost[missing] = True
    return lost


def aligned_overlap(found: Track, frames: np.ndarray, enough: float = 1.0) -> np.ndarray:
    """Soft intersection over union `(len(frames) - 1,)` of consecutive outlines, laid upon each other by their centroids,
    scale kept.

    Pairs below `enough` are tried again turned by up to 60 degrees: a rigid object may spin.
    """
    short = min(found.mask.shape[1:])
    step = np.full(len(frames), 2 * _SPAN * np.sqrt(np.median(found.area[frames]) / np.pi) * short / (_GRID - 1))
    x, y, mask = found.x[frames] * short, found.y[frames] * short, found.mask[frames]
    patches = _patches(mask, x, y, step)
    overlap = _overlap(patches[:-1], patches[1:])
    for angle in np.radians([-60, -48, -36, -24, -12, 12, 24, 36, 48, 60]):
        weak = np.flatnonzero(overlap < enough)
        if not len(weak):
            break
        turned = _patches(mask[weak + 1], x[weak + 1], y[weak + 1], step[weak + 1], angle)
        overlap[weak] = np.maximum(overlap[weak], _overlap(patches[weak], turned))
    return overlap


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(a, b).sum((1, 2)) / np.maximum(np.maximum(a, b).sum((1, 2)), 1e-9)
