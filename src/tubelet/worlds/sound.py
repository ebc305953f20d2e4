"""What a scene of `phys2d` sounds like, exactly: every impact rings, whatever rolls or slides along rushes.

Everything comes from the plan of the scene, whose impacts have computed times: a ring begins at its impact's sample, its phase
between samples. An object is a sum of decaying sines (modal synthesis: van den Doel & Pai 1998, "The Sounds of Physical
Shapes"), whose pitch falls with its size, whose chord and decay are its shape's, and whose amplitude grows with the root of the
impulse, so that the smallest bounce is still heard. What it hits decides how dull it is. Things on the floor or the table hiss
(squares, triangles) or rumble (balls, rings) as loud as they are fast, while they are in the frame, behind a panel too. The
numbers are ours: made so that each can be told by ear.

Sound is as long as the film, whose last frame stands until `frames / fps` seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.media.audio import Audio
from tubelet.worlds.base import Array, check_request, stream
from tubelet.worlds.bodies import SPLITS, WORLD_SALT, Body, Plan
from tubelet.worlds.constants import COMPOSED_KINDS, PHYS2D_KINDS
from tubelet.worlds.plans import make_plan

RATES = (8000, 16000)
"""Samples per second."""
PITCH = 40.0
"""Hertz of the lowest mode times the radius in short sides: 571, 400 and 286 for the three sizes."""
CHORD: dict[str, tuple[float, ...]] = {
    "ball": (1.0, 2.0),
    "square": (1.0, 1.47, 1.81, 2.58),
    "triangle": (1.0, 1.63, 2.73),
    "ring": (1.0, 2.83, 5.42),
}
"""Frequencies of a shape's modes over its lowest."""
RINGING: dict[str, float] = {"ball": 0.18, "square": 0.12, "triangle": 0.22, "ring": 0.40}
"""Seconds until the lowest mode has lost 60 dB; higher ones take less by the root of their ratio."""
HARDNESS: dict[str, float] = {"floor": 1500.0, "collide": 4000.0, "wall": 700.0}
"""Kind of impact -> hertz over which its modes weaken by e: a cushion is soft."""
LOUDEST, LARGEST_IMPULSE = 0.35, 0.2
"""Root of the summed squares of the amplitudes at an impulse that hardly any impact of the worlds exceeds."""
RUSH = 0.02
"""Deviation of the noise of what moves at one short side per second."""
RUMBLE, HISS = 0.4, 2.5
"""Middle of that noise over the object's lowest mode, for what rolls and for what slides."""
ROLLING = ("ball", "ring")

LATE = 0.4
"""Seconds by which impacts are heard too late under the control `late`; what would come behind the end comes at the start."""
CONTROLS = ("late", "loudness")
NOISE_SALT, CONTROL_SALT = 200, 300


@dataclass(frozen=True)
class Impact:
    """Something that is heard: when, what kind of event, which objects, and mass times change of velocity of the first."""

    seconds: float
    kind: str
    bodies: tuple[int, ...]
    impulse: float


@dataclass(frozen=True)
class Sound:
    """The sound of a clip, and the impacts in it, in order of time."""

    audio: Audio
    impacts: tuple[Impact, ...]


def sound(
    seed: int,
    height: int = 64,
    width: int = 64,
    frames: int = 17,
    fps: float = 8.0,
    *,
    kind: str | None = None,
    split: str = "train",
    wish: Mapping[str, Any] | None = None,
    rate: int = 8000,
    control: str | None = None,
) -> Sound:
    """The sound of the clip that `WORLDS["phys2d"].sample` gives for the same arguments: the same bytes in every process.

    rate: one of `RATES`. control: a sound in which something is wrong while `impacts` stay what is true: `late`, or `loudness`
    (each impact as loud as another impulse, drawn from the seed, would make it). Raises UserError as `sample` does, and on
    another rate or control.
    """
    check_request("phys2d", PHYS2D_KINDS + COMPOSED_KINDS, SPLITS, seed, height, width, frames, fps, kind, split)
    if rate not in RATES:
        raise UserError(f"worlds sound at {' or '.join(map(str, RATES))} samples a second, got {rate}; choose one")
    if control is not None and control not in CONTROLS:
        raise UserError(f"sound has no control {control!r}; choose one of {', '.join(CONTROLS)}")
    # One frame more: the last one stands for a while, and what happens then is heard.
    plan = make_plan(seed, height, width, frames + 1, fps, kind, split, wish)
    seconds = frames / fps
    heard = impacts(plan, seconds)
    wave = np.zeros(max(1, round(seconds * rate)))  # (S,)
    for impact in falsified(heard, control, seed, seconds):
        strike(wave, rate, impact, [plan.bodies[index] for index in impact.bodies])
    for index, body in enumerate(plan.bodies):
        noise = stream(seed, WORLD_SALT, NOISE_SALT, index)
        wave += rush(plan, body, np.arange(len(wave)) / rate) * murmur(body, len(wave), rate, noise)
    return Sound(Audio.from_float(wave, rate), heard)


def impacts(plan: Plan, seconds: float) -> tuple[Impact, ...]:
    """What is hit before `seconds`, of objects whose centre is in the frame."""
    found = []
    for when, kind, bodies in plan.events:
        if kind not in HARDNESS or when >= seconds:
            continue
        body = plan.bodies[bodies[0]]
        place = next(i for i, piece in enumerate(body.pieces) if piece[0] == when)
        start, _, _, vx, vy, ay, *_ = body.pieces[place - 1]
        _, x, _, new_vx, new_vy, *_ = body.pieces[place]
        if 0 <= x <= plan.width:
            change = math.hypot(new_vx - vx, new_vy - (vy + ay * (when - start)))
            found.append(Impact(when, kind, bodies, body.mass * change))
    return tuple(found)


def falsified(heard: Sequence[Impact], control: str | None, seed: int, seconds: float) -> list[Impact]:
    """Impacts as a control lets them be heard; as they are where it is None."""
    if control == "late":
        return [replace(impact, seconds=(impact.seconds + LATE) % seconds) for impact in heard]
    if control == "loudness":
        drawn = stream(seed, WORLD_SALT, CONTROL_SALT).uniform(math.log(0.004), math.log(LARGEST_IMPULSE), len(heard))
        return [replace(impact, impulse=math.exp(log)) for impact, log in zip(heard, drawn, strict=True)]
    return list(heard)


def strike(wave: Array, rate: int, impact: Impact, bodies: Sequence[Body]) -> None:
    """Adds the ringing of the bodies of one impact to `wave (S,)`, half of its power each where two meet."""
    loudness = LOUDEST * math.sqrt(impact.impulse / LARGEST_IMPULSE / len(bodies))
    first = math.ceil(impact.seconds * rate)
    for body in bodies:
        ratios = np.array(CHORD[body.word])
        lowest = PITCH / body.r
        ratios = ratios[lowest * ratios < 0.45 * rate]
        gains = np.exp(-lowest * ratios / HARDNESS[impact.kind])
        gains *= loudness / np.linalg.norm(gains)
        decays = math.log(1000.0) / RINGING[body.word] * np.sqrt(ratios)
        last = min(len(wave), first + round(1.5 * RINGING[body.word] * rate))
        t = np.arange(first, last)[:, None] / rate - impact.seconds  # (s, 1)
        wave[first:last] += (gains * np.exp(-decays * t) * np.sin(2 * math.pi * lowest * ratios * t)).sum(1)


def rush(plan: Plan, body: Body, seconds: Array) -> Array:
    """How loud a body's way along the floor or table is at times `(S,)`: its speed while it touches it, as far as it is in the
    frame."""
    x, y, _, vx, vy, _ = body.at(seconds)
    touches = (plan.g == 0) | ((vy == 0) & (np.abs(y - (plan.floor - body.below)) < 1e-9))
    inside = (plan.width / 2 + body.half - np.abs(x - plan.width / 2)) / (2 * body.half)
    return RUSH * np.hypot(vx, vy) * touches * np.clip(inside, 0.0, 1.0)


def murmur(body: Body, count: int, rate: int, random: np.random.RandomState) -> Array:
    """Noise `(count,)` of deviation 1 around the pitch of a body that rolls or slides."""
    middle = PITCH / body.r * (RUMBLE if body.word in ROLLING else HISS)
    t = np.arange(round(0.006 * rate)) / rate
    kernel = np.exp(-t / 0.0008) * np.cos(2 * math.pi * middle * t)
    kernel /= np.linalg.norm(kernel)
    return np.convolve(random.standard_normal(count + len(kernel) - 1), kernel, mode="valid")
