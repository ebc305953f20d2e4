"""Does the sound tell when something is hit, and how hard? Onsets read from samples, against impacts of the exact state.

An onset is where the power of the next `AFTER` seconds exceeds that of the last `BEFORE` seconds most, and by enough: what
rolls or slides grows louder, too, but never at once. It is found where an impact is within one frame of it; each counts once.
Loudness is compared by rank, over all found impacts of all clips, so that any steady volume is as good as another. What pixels
show of impacts is read from tracks, and held against the same truth, for films that are made for a sound.

`references` are the rows that must stand beside any figure: the true sound itself, its two controls (`worlds.sound.CONTROLS`)
and the sound of another clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tubelet.core.errors import UserError
from tubelet.evaluate.reading import Reading
from tubelet.media.audio import Audio
from tubelet.worlds.sound import CONTROLS, Impact, Sound

Figures = dict[str, float]
REFERENCES = ("truth", *CONTROLS, "another clip")

AFTER, BEFORE, STEP = 0.016, 0.024, 0.002
"""Seconds of the windows on both sides of an onset, and between the places where it is looked for."""
RISE = 4.0
"""How many times louder, in power, it is behind an onset than before it."""
FAINT = 0.012
"""Deviation below which nothing is an onset: the slowest way along the floor is at 0.005, the softest ring at 0.02."""
APART = 0.05
"""Seconds: what is hit so soon after something else is heard as one with it."""
KICK = 0.2
"""Short sides per second by which an object's velocity changes when something has hit it; tracks of 32 pixels vary by 0.09."""


@dataclass(frozen=True)
class Onset:
    """When something is hit, in seconds, and how hard, in any unit."""

    seconds: float
    loudness: float


def onsets(audio: Audio) -> list[Onset]:
    """What is struck in a sound, in order of time. Nothing is found in the first `BEFORE` and the last `AFTER` seconds."""
    after, before, step = (round(seconds * audio.rate) for seconds in (AFTER, BEFORE, STEP))
    energy = np.concatenate([[0.0], np.square(audio.to_float(), dtype=np.float64).cumsum()])  # (S + 1,)
    at = np.arange(before, len(audio.samples) - after + 1, step)  # (k,)
    ahead, behind = (energy[at + after] - energy[at]) / after, (energy[at] - energy[at - before]) / before
    rise = np.where(ahead > FAINT**2, ahead / np.maximum(behind, (FAINT / 4) ** 2), 0.0)
    loudness = np.sqrt(np.maximum(ahead - behind, 0.0))
    return _peaks(rise, RISE, round(APART / STEP), lambda place: Onset(at[place] / audio.rate, float(loudness[place])))


def seen_impacts(clip: np.ndarray, fps: float) -> list[Onset]:
    """What is struck in a uint8 film `(T, H, W, 3)`: where a tracked object's velocity is another than two frames before.

    Gravity alone pulls down, so only kicks to the side and up count, but on a table. Each lies in the middle of the frames
    between which it happened; nothing is found in the first and in the last two of these gaps. Raises UserError as `Reading`.
    """
    reading = Reading(clip, fps)
    kicks, impulses = np.zeros((2, max(0, reading.frames - 3)))  # (T - 3,) each
    for track in reading.tracks.values():
        vx, vy = np.diff(track.x) * fps, np.diff(track.y) * fps  # (T - 1,)
        down = vy[2:] - vy[:-2]
        if reading.backdrop != "table":
            down = np.minimum(down, 0.0)
        whole = track.valid[:-3] & track.valid[1:-2] & track.valid[2:-1] & track.valid[3:]  # (T - 3,)
        kick = np.where(whole, np.hypot(vx[2:] - vx[:-2], down), 0.0)
        impulses = np.where(kick > kicks, kick * np.median(track.area), impulses)  # mass is area
        kicks = np.maximum(kicks, kick)
    return _peaks(kicks, KICK, 1, lambda place: Onset((place + 1.5) / fps, float(impulses[place])))


def _peaks(values: np.ndarray, least: float, apart: int, made: Callable[[int], Onset]) -> list[Onset]:
    """What is `made` of every place whose value is above `least` and the first largest of those up to `apart` around it."""
    padded = np.pad(values, apart, constant_values=-np.inf)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * apart + 1) if len(values) else padded[:0, None]
    first = around.argmax(1) == apart
    return [made(int(place)) for place in np.flatnonzero(first & (values > least))]


def audible(impacts: Sequence[Impact]) -> list[Onset]:
    """True impacts as onsets, as loud as their impulse; those less than `APART` behind one that is louder are one with it."""
    kept: list[Onset] = []
    for impact in impacts:
        if not kept or impact.seconds - kept[-1].seconds >= APART:
            kept.append(Onset(impact.seconds, impact.impulse))
        elif impact.impulse > kept[-1].loudness:
            kept[-1] = Onset(impact.seconds, impact.impulse)
    return kept


def agreement(
    found: Sequence[Sequence[Onset]],
    true: Sequence[Sequence[Onset]],
    tolerance: float,
    span: tuple[float, float] = (BEFORE, np.inf),
) -> Figures:
    """How well onsets of several clips agree with true ones, all clips together.

    `precision` and `recall`: shares of found and of true onsets that have a partner within `tolerance` seconds, and their
    harmonic mean `f1`; `count`: share of clips with as many of both; `timing`: mean distance of partners in seconds;
    `loudness`: rank correlation of their loudness (Spearman), both only where there are three pairs. Onsets outside of `span`
    do not count. Raises UserError when the numbers of clips differ.
    """
    if len(found) != len(true) or not found:
        raise UserError(f"{len(found)} sounds are held against {len(true)} clips; give one of each")
    pairs: list[tuple[Onset, Onset]] = []
    heard = struck = equal = 0
    for several, wanted in zip(found, true, strict=True):
        some, due = ([one for one in these if span[0] <= one.seconds < span[1]] for these in (several, wanted))
        pairs += partners(some, due, tolerance)
        heard, struck, equal = heard + len(some), struck + len(due), equal + (len(some) == len(due))
    precision, recall = len(pairs) / max(1, heard), len(pairs) / max(1, struck)
    figures = {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "count": equal / len(found),
    }
    if len(pairs) >= 3:
        figures["timing"] = float(np.mean([abs(a.seconds - b.seconds) for a, b in pairs]))
        figures["loudness"] = rank_correlation([a.loudness for a, _ in pairs], [b.loudness for _, b in pairs])
    return figures


def partners(found: Sequence[Onset], true: Sequence[Onset], tolerance: float) -> list[tuple[Onset, Onset]]:
    """As many pairs within `tolerance` as there can be; both in order of time."""
    pairs: list[tuple[Onset, Onset]] = []
    i = j = 0
    while i < len(found) and j < len(true):
        gap = found[i].seconds - true[j].seconds
        if abs(gap) <= tolerance:
            pairs.append((found[i], true[j]))
        i += gap <= tolerance
        j += gap >= -tolerance
    return pairs


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties; 0 where one side does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def references(hear: Callable[[int, str | None], Sound], n: int, tolerance: float, step: int = 1) -> dict[str, Figures]:
    """What must stand beside the figures of `n` clips: `REFERENCES`, the true sound, each control, and another clip's sound.

    `hear(place, control)` is the sound of the clip at a place, true or with something wrong. The other clip is `step` places
    on: with as many as there are kinds, and kinds that come in turn, it is of the same kind, which is the harder control.
    """
    heard = [hear(place, None) for place in range(n)]
    found, true = [onsets(one.audio) for one in heard], [audible(one.impacts) for one in heard]
    wrong = {control: [onsets(hear(place, control).audio) for place in range(n)] for control in CONTROLS}
    step %= n
    several = {"truth": found, **wrong, "another clip": [*found[step:], *found[:step]]}
    return {name: agreement(one, true, tolerance) for name, one in several.items()}
