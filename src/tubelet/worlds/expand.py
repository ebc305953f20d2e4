"""From a few words to the caption of a whole scene: the worlds play the chat model of DALL-E 3's prompt expansion.

What the prompt names is kept; what it leaves open is drawn by the world itself, from the prompt's own bytes, so that the same
prompt always expands to the same caption. A prompt that names what no scene here can have stays as it is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

from tubelet.core.errors import UserError
from tubelet.worlds.base import Episode, World
from tubelet.worlds.grammar import COLOR_WORDS, SHAPE_WORDS, compose, parse
from tubelet.worlds.persist2d import Persist2D
from tubelet.worlds.phys2d import Phys2D
from tubelet.worlds.unread import unread

Scene = dict[str, Any]
TRIES = 24
"""Seeds tried until a scene has all that its prompt names."""
ROOMS: tuple[World, ...] = (Phys2D(), Persist2D())
_TINGED = {
    "reddish": "red",
    "orangish": "orange",
    "orangey": "orange",
    "yellowish": "yellow",
    "greenish": "green",
    "bluish": "blue",
    "blueish": "blue",
    "purplish": "purple",
    "pinkish": "pink",
}
_TINGES = re.compile(rf"\b({'|'.join(_TINGED)})\b", re.IGNORECASE)
_SHARED = re.compile(  # "a red and a blue ball"
    r"\b(an?|the|one) ({colours}) and (an?|the|one|another) ({colours}) ({shapes})\b".format(
        colours="|".join(word for words in COLOR_WORDS.values() for word in words),
        shapes="|".join(word for words in SHAPE_WORDS.values() for word in words),
    ),
    re.IGNORECASE,
)
_MARKS = re.compile(r"\b(line|stripe|stroke|brushstroke|circle|ring|loop|hoop)s?\b")


def parse_scene(prompt: str) -> Scene | None:
    """The scene that a prompt names, or None when it names no event of these worlds, or something that they cannot show."""
    read = _TINGES.sub(lambda found: _TINGED[found[1].lower()], prompt)
    read = _SHARED.sub(r"\1 \2 \5 and \3 \4 \5", read)
    scene = parse(read)
    if "kind" not in scene or unread(read, scene) is not None:
        return None
    return {**scene, "prompt": prompt}


def _episode(scene: Mapping[str, Any]) -> Episode | None:
    """An episode that has all that a scene names; None where no seed gives one."""
    wish = {name: value for name, value in scene.items() if name not in ("kind", "prompt")}
    words = str(scene["prompt"] if "prompt" in scene else compose(scene)).strip().lower()
    seed = zlib.crc32(words.encode(errors="replace")) & 0x7FFFFFFF
    world = next(w for w in ROOMS if scene["kind"].split("+")[0] in w.kinds)
    episode, kept = None, False
    for further in range(TRIES):
        try:
            episode = world.sample((seed + further) & 0x7FFFFFFF, kind=scene["kind"], wish=wish)
        except UserError:  # more strokes than a painting has, say
            return None
        made = episode.tags["scene"]
        kept = _keeps(made, wish, words)
        if kept and all(made.get(name) == wish[name] for name in ("count", "direction") if name in wish):
            return episode
    # What a scene of this kind has no word for ("falls once") is passed over.
    return episode if kept else None


def _keeps(made: Mapping[str, Any], wish: Mapping[str, Any], words: str) -> bool:
    """Whether a scene contradicts nothing that was asked for, and is on the moon only where that was asked for.

    A world draws the rest so that its law can be read, and a drop from low down, say, leaves no time for a second bounce.
    """
    if bool(made.get("moon")) != bool(wish.get("moon")) or made.get("count", 1) != wish.get("count", made.get("count", 1)):
        return False
    if any(made.get(name) != wish[name] for name in ("food", "side") if name in wish):
        return False
    # What bounces on the spot comes down, though its caption does not say so.
    if "direction" in wish and made.get("direction", "down") != wish["direction"]:
        return False
    things, wished = made.get("objects", ()), wish.get("objects", ())
    if len(things) < len(wished) or not all(_is(a, b, "color", "shape", "size") for a, b in zip(things, wished, strict=False)):
        return False
    strokes, asked = made.get("strokes", ()), wish.get("strokes", ())
    if (asked and len(strokes) != len(asked)) or not all(_follows(a, b) for a, b in zip(strokes, asked, strict=False)):
        return False
    # A line or stripe is no circle, where the words tell which is which.
    straight = [mark in ("line", "stripe") for mark in _MARKS.findall(words)]
    if len(straight) != len(strokes):
        straight = [bool(straight) and all(straight)] * len(strokes)
    return not any(line and one["stroke"] == "circle" for line, one in zip(straight, strokes, strict=True))


def _is(made: Mapping[str, str], wished: Mapping[str, str], *names: str) -> bool:
    return all(made.get(name) == wished[name] for name in names if name in wished)


def _follows(made: Mapping[str, str], wished: Mapping[str, str]) -> bool:
    """Whether a stroke is as it was asked for; a circle has no direction, and a slanted line none up or down."""
    free = "direction" not in made or (made["stroke"] == "diagonal" and wished.get("direction") in ("up", "down"))
    return _is(made, wished, "color", "stroke", *(() if free else ("direction",)))


def compose_dense(scene: Mapping[str, Any]) -> str:
    """A dense caption (about fifty words) of a scene that has everything the prompt names.

    Where there is no such scene, the prompt as it is, or without one the scene in the grammar's words.
    """
    episode = _episode(scene)
    return _as_it_is(scene) if episode is None else episode.dense


def compose_short(scene: Mapping[str, Any]) -> str:
    """The short caption, attributes that the prompt leaves open filled in; else as `compose_dense`."""
    episode = _episode(scene)
    return _as_it_is(scene) if episode is None else episode.short


def _as_it_is(scene: Mapping[str, Any]) -> str:
    return str(scene["prompt"]) if "prompt" in scene else compose(scene)
