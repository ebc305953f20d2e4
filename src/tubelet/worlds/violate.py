"""Clips in which one law is broken while everything else, the caption included, stays: controls for the tests of the laws.

A test of a law is worth something only if true clips pass it and these fail it (valid and violated pairs: LikePhys, arXiv
2510.11512).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tubelet.core.errors import UserError
from tubelet.worlds import persist2d, phys2d
from tubelet.worlds.base import Array, Episode, check_request
from tubelet.worlds.bodies import SPLITS, Body, Plan
from tubelet.worlds.constants import NOMINAL_SECONDS, PHYS2D_KINDS
from tubelet.worlds.plans import make_plan


@dataclass(frozen=True)
class Violation:
    """How a law is broken: in which world, in which kinds of scene, and by which change."""

    world: str
    kinds: tuple[str, ...]
    change: Callable[..., None] | None
    """Changes a plan in place; None where the film itself is changed (flicker)."""


EXIT_OFFSET = 0.14
"""How far above its line an object comes out from behind the panel under `wrong_exit`, in short sides."""
JUMP = 0.22
"""How far an object jumps under `teleport`, in frame widths."""
FLICKER = 0.22
"""Relative change of the radius from frame to frame under `flicker`; for strokes and food the share of colour that goes."""


def linear_fall(plan: Plan) -> None:
    """Each flight keeps its ends (and its top) but is run through at constant speed."""
    body = plan.bodies[0]
    pieces, body.pieces = body.pieces, []
    for index, (t, x, y, vx, vy, ay, angle, omega) in enumerate(pieces):
        if not ay:
            body.go(t, x, y, vx, vy, 0.0, angle, omega)
            continue
        end = pieces[index + 1][0] if index + 1 < len(pieces) else t + 10.0
        turn = -vy / ay if vy < 0 else 0.0
        if 0 < turn < end - t:
            top = y + vy * turn / 2
            body.go(t, x, y, vx, (top - y) / turn, 0.0, angle, omega)
            t, x, y, vy, angle = t + turn, x + vx * turn, top, 0.0, angle + omega * turn
        wait = end - t
        body.go(t, x, y, vx, vy + 0.5 * ay * wait, 0.0, angle, omega)


def no_gravity(plan: Plan) -> None:
    """The first velocity is kept for ever; what was let go hangs where it is."""
    body = plan.bodies[0]
    t, x, y, vx, vy, _, angle, omega = body.pieces[0]
    body.pieces = [(t, x, y, vx, vy, 0.0, angle, omega)]


def double_gravity(plan: Plan) -> None:
    """Twice the acceleration, the same start: it lands earlier and lies still."""
    body = plan.bodies[0]
    _, x, y, vx, vy, ay, angle, omega = body.pieces[0]
    rest = plan.floor - body.below
    land = (-vy + np.sqrt(vy * vy + 4 * ay * (rest - y))) / (2 * ay)
    body.pieces = []
    body.go(0.0, x, y, vx, vy, 2 * ay, angle, omega)
    body.go(float(land), x + vx * float(land), rest)


def slow_down(plan: Plan) -> None:
    """The speed falls in eight steps to almost nothing within the time that the object is seen."""
    body = plan.bodies[0]
    t, x, y, vx, *_ = body.pieces[0]
    seen = min(NOMINAL_SECONDS, plan.width * 0.9 / abs(vx))
    body.pieces = []
    for step in range(8):
        speed = vx * (1 - step / 8)
        body.go(t, x, y, speed)
        t, x = t + seen / 8, x + speed * seen / 8
    body.go(t, x, y)


def teleport(plan: Plan) -> None:
    """Once in the middle of its way the object is suddenly somewhere else."""
    body = plan.bodies[0]
    _, x, y, vx, *_ = body.pieces[0]
    sign = 1.0 if vx > 0 else -1.0
    room = plan.width - body.half - x if sign > 0 else x - body.half
    when = 0.45 * min(NOMINAL_SECONDS, room / abs(vx))
    ahead = room - abs(vx) * when
    jump = sign * JUMP * plan.width * (1 if ahead > 1.6 * JUMP * plan.width else -1)
    body.go(when, x + vx * when + jump, y, vx)


def disappear(plan: Plan) -> None:
    """Before half of its time in view is over, the object is gone."""
    body = plan.bodies[0]
    _, x, _, vx, *_ = body.pieces[0]
    room = plan.width - body.half - x if vx > 0 else x - body.half
    when = 0.45 * min(NOMINAL_SECONDS, room / max(abs(vx), 1e-9))
    body.pieces = [piece for piece in body.pieces if piece[0] < when]
    body.go(when, -10.0 * plan.width, 0.5 * plan.floor)


def _contact(plan: Plan) -> tuple[Body, Body]:
    first, second = plan.bodies[:2]
    assert len(first.pieces) == len(second.pieces) == 2, "a collision has one contact"
    return first, second


def swapped_roles(plan: Plan) -> None:
    """After the contact each object moves as the other one should."""
    first, second = _contact(plan)
    (ta, xa, ya, va, *_), (tb, xb, yb, vb, *_) = first.pieces[1], second.pieces[1]
    first.pieces[1:], second.pieces[1:] = [], []
    first.go(ta, xa, ya, vb)
    second.go(tb, xb, yb, va)


def pass_through(plan: Plan) -> None:
    """Nothing happens at the contact."""
    first, second = _contact(plan)
    first.pieces[1:], second.pieces[1:] = [], []


def _behind(plan: Plan) -> tuple[Body, tuple[float, ...], float]:
    assert plan.panel is not None, "only a scene with a panel hides something"
    body = plan.bodies[0]
    piece = body.pieces[0]
    return body, piece, ((plan.panel[0] + plan.panel[2]) / 2 - piece[1]) / piece[3]


def vanish(plan: Plan) -> None:
    """What went behind the panel never comes out."""
    body, (_, _, y, *_), when = _behind(plan)
    body.go(when, -10.0 * plan.width, y)


def wrong_exit(plan: Plan) -> None:
    """It comes out on time, but higher."""
    body, (_, x, y, vx, *_), when = _behind(plan)
    body.go(when, x + vx * when, y - EXIT_OFFSET, vx)


def erased(plan: persist2d.Plan) -> None:
    """Everything done so far is undone shortly after the last deed: strokes go, the food is whole again."""
    last = plan.strokes[-1].end if plan.strokes else plan.bites[-1][0]
    plan.erased_at = min(last + 0.15, NOMINAL_SECONDS - 0.2)


def fade(plan: persist2d.Plan) -> None:
    """Strokes and food lose colour in every other frame."""
    plan.flicker = 0.7


VIOLATIONS: dict[str, dict[str, Violation]] = {
    "gravity": {
        "linear_fall": Violation("phys2d", ("fall", "parabola"), linear_fall),
        "no_gravity": Violation("phys2d", ("fall", "parabola"), no_gravity),
        "double_gravity": Violation("phys2d", ("fall", "parabola"), double_gravity),
        "disappear": Violation("phys2d", ("fall", "parabola"), disappear),
    },
    "inertia": {
        "slow_down": Violation("phys2d", ("slide",), slow_down),
        "teleport": Violation("phys2d", ("slide",), teleport),
        "disappear": Violation("phys2d", ("slide",), disappear),
    },
    "momentum": {
        "swapped_roles": Violation("phys2d", ("collision",), swapped_roles),
        "pass_through": Violation("phys2d", ("collision",), pass_through),
    },
    "impenetrability": {
        "swapped_roles": Violation("phys2d", ("collision",), swapped_roles),
        "pass_through": Violation("phys2d", ("collision",), pass_through),
    },
    "permanence": {
        "vanish": Violation("phys2d", ("occlude",), vanish),
        "wrong_exit": Violation("phys2d", ("occlude",), wrong_exit),
    },
    "paint": {
        "erased": Violation("persist2d", ("paint",), erased),
        "flicker": Violation("persist2d", ("paint",), fade),
    },
    "bites": {
        "erased": Violation("persist2d", ("eat",), erased),
        "flicker": Violation("persist2d", ("eat",), fade),
    },
    "steady": {
        "flicker": Violation("phys2d", ("slide", "fall", "bounce", "parabola"), None),
        "disappear": Violation("phys2d", ("slide", "fall", "bounce", "parabola"), disappear),
    },
}
"""Law -> control -> how it is broken."""


def _pulsing(plan: Plan, height: int, width: int, frames: int, fps: float) -> tuple[Array, dict[str, Array]]:
    """The film of a plan whose objects are larger in even frames and smaller in odd ones."""
    films = []
    radii = [body.r for body in plan.bodies]
    for sign in (1.0, -1.0):
        for body, r in zip(plan.bodies, radii, strict=True):
            body.r = r * (1 + sign * FLICKER)
        films.append(phys2d.film(plan, height, width, frames, fps))
    for body, r in zip(plan.bodies, radii, strict=True):
        body.r = r
    video, state = phys2d.film(plan, height, width, frames, fps)
    for parity in (0, 1):
        video[parity::2] = films[parity][0][parity::2]
        state["visible"][parity::2] = films[parity][1]["visible"][parity::2]
    return video, state


def violate(
    world: str,
    law: str,
    control: str,
    seed: int,
    height: int = 64,
    width: int = 64,
    frames: int = 17,
    fps: float = 8.0,
    *,
    kind: str | None = None,
    split: str = "train",
) -> Episode:
    """The clip that `WORLDS[world].sample(seed, ..., kind=kind, split=split)` gives, with its captions, but with a law broken.

    control: one of VIOLATIONS[law]. kind: one of that violation's kinds, by default drawn from the seed. The state is that of
    the violated clip; the events are those that the captions tell; tags["violated"] = [law, control]. Raises UserError for an
    unknown law, control or kind.
    """
    if law not in VIOLATIONS:
        raise UserError(f"there is no law {law!r} to break; choose one of {', '.join(VIOLATIONS)}.")
    if control not in VIOLATIONS[law]:
        raise UserError(f"the law {law!r} has no control {control!r}; choose one of {', '.join(VIOLATIONS[law])}.")
    violation = VIOLATIONS[law][control]
    if world != violation.world:
        raise UserError(f"the law {law!r} holds in the world {violation.world!r}, not in {world!r}; ask for that one.")
    if kind is None:
        kind = violation.kinds[seed % len(violation.kinds)]
    elif kind not in violation.kinds:
        raise UserError(f"the control {control!r} does not apply to {kind!r}; choose one of {', '.join(violation.kinds)}.")
    kinds, splits = (PHYS2D_KINDS, SPLITS) if world == "phys2d" else (persist2d.PERSIST2D_KINDS, persist2d.SPLITS)
    check_request(world, kinds, splits, seed, height, width, frames, fps, kind, split)
    if world == "phys2d":
        plan = make_plan(seed, height, width, frames, fps, kind, split, None)
        true = phys2d.episode(plan, seed, height, width, frames, fps, split)
        if violation.change is None:
            video, state = _pulsing(plan, height, width, frames, fps)
        else:
            violation.change(plan)
            video, state = phys2d.film(plan, height, width, frames, fps)
    else:
        scene = persist2d.make_plan(seed, height, width, kind, split, None)
        true = persist2d.episode(scene, seed, height, width, frames, fps, split)
        assert violation.change is not None, "every control of this world changes the plan"
        violation.change(scene)
        video, state = persist2d.film(scene, height, width, frames, fps)
    tags = {**true.tags, "violated": [law, control]}
    return Episode(video, fps, true.short, true.dense, true.human, state, true.events, true.camera, tags)
