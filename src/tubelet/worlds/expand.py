"""From a few words to the caption of a whole scene: the worlds play the chat model of DALL-E 3's prompt expansion.

What the prompt names is kept; what it leaves open is drawn by the world itself, from the prompt's own bytes, so that the same
prompt always expands to the same caption.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from tubelet.core.errors import UserError
from tubelet.worlds.base import World
from tubelet.worlds.grammar import compose, parse
from tubelet.worlds.persist2d import Persist2D
from tubelet.worlds.phys2d import Phys2D

Scene = dict[str, Any]
TRIES = 24
"""Seeds tried until a scene has all that its prompt names."""
ROOMS: tuple[World, ...] = (Phys2D(), Persist2D())


def parse_scene(prompt: str) -> Scene | None:
    """The scene that a prompt names, or None when it names no event of these worlds."""
    scene = parse(prompt)
    return {**scene, "prompt": prompt} if scene.get("kind") else None


def _episode(scene: Mapping[str, Any]) -> Any:
    wish = {name: value for name, value in scene.items() if name not in ("kind", "prompt")}
    words = scene["prompt"] if "prompt" in scene else compose(scene)
    seed = zlib.crc32(str(words).strip().lower().encode()) & 0x7FFFFFFF
    world = next(w for w in ROOMS if scene["kind"].split("+")[0] in w.kinds)
    episode = world.sample(seed, kind=scene["kind"], wish=wish)
    for further in range(1, TRIES):
        if _agrees(episode.tags["scene"], wish):
            break
        episode = world.sample((seed + further) & 0x7FFFFFFF, kind=scene["kind"], wish=wish)
    return episode


def _agrees(made: Mapping[str, Any], wish: Mapping[str, Any]) -> bool:
    """Whether a scene has the number and the heading that were asked for, and the moon only where it was asked for.

    A world draws the rest so that its law can be read, and a drop from low down, say, leaves no time for a second bounce.
    """
    asked = all(made.get(name) == wish[name] for name in ("count", "direction") if name in wish)
    return asked and bool(made.get("moon")) == bool(wish.get("moon"))


def compose_dense(scene: Mapping[str, Any]) -> str:
    """A dense caption (about fifty words) of a scene that has everything the prompt names. Falls back to the short one."""
    try:
        return _episode(scene).dense
    except UserError:  # the wishes contradict each other: say what was said, in the grammar's words
        return compose(scene)


def compose_short(scene: Mapping[str, Any]) -> str:
    """The short caption, attributes that the prompt leaves open filled in."""
    try:
        return _episode(scene).short
    except UserError:
        return compose(scene)
