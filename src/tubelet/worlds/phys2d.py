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

from collections.abc import Mapping
from typing import Any

import numpy as np

from tubelet.worlds import grammar
from tubelet.worlds.base import Array, Episode, Event, check_request, stream
from tubelet.worlds.bodies import SPLITS, WORLD_SALT, Plan
from tubelet.worlds.constants import (
    COLORS,
    COMPOSED_KINDS,
    CUSHION,
    CUSHION_WIDTH,
    GROUND,
    PALETTE,
    PANEL,
    PHYS2D_KINDS,
    WALL,
    held_out_pair,
    held_out_size,
)
from tubelet.worlds.draw import Canvas, over, plain, rectangle_coverage
from tubelet.worlds.plans import make_plan


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
    starts = [(body.pieces[0][1] / plan.width, body.pieces[0][2] / plan.height) for body in plan.bodies]
    places = [grammar.where_within(x, y) if plan.kind == "billiard" else grammar.where_along(x) for x, y in starts]
    wall = "" if plan.panel is None else grammar.where_along((plan.panel[0] + plan.panel[2]) / 2 / plan.width)
    dense = grammar.describe(scene, events, places, wall=wall, variant=variant, heavier=heavier)
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
        beginning. What captions count in a clip of more than two seconds, bounces, is what happens in all of it."""
        check_request(self.name, self.kinds + COMPOSED_KINDS, self.splits, seed, height, width, frames, fps, kind, split)
        plan = make_plan(seed, height, width, frames, fps, kind, split, wish)
        return episode(plan, seed, height, width, frames, fps, split)
