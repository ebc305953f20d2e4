"""Make a world's captions as bad as the alternative texts of the web, to learn what bad captions cost.

DALL-E 3 (Betker et al. 2023, section 2) names what is wrong with those: attributes, places and numbers are left out, things
are named wrongly, and what stands there is often about the page and not about the picture. The rates are our own; the paper
has none.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tubelet.core.errors import UserError
from tubelet.data.schema import Record
from tubelet.worlds.constants import COLORS, FOODS, PHYS2D_KINDS, SHAPES, SIZES, SPEEDS, STROKES
from tubelet.worlds.grammar import COUNT_WORDS, FROM_TO, OPPOSITE, PLACE_PHRASE, Scene, article, compose, noun, parse

KIND, SOURCE = "alt", "degraded"
"""Kind and source of a degraded caption."""

BOILERPLATE = (
    "IMG_{:04d}.MP4",
    "clip {:04d} - free download",
    "click to enlarge",
    "royalty-free footage no. {:04d}",
    "HD 1080p",
    "| My Video Archive",
    "(c) 20{:02d} all rights reserved",
    "#shorts #fyp #{:04d}",
)
"""What is put before or behind a caption, with a number where there is a place for one."""
UNRELATED = (
    "Welcome to my homepage",
    "Home > Products > New",
    "posted by admin, {:d} comments",
    "buy {:d} and save today",
    "best of {:d}",
    "thumbnail {:04d}",
    "untitled project {:d}",
    "Subscribe for more",
)
"""What stands in a caption's place."""

_WORDS: dict[str, Sequence[Any]] = {
    "color": COLORS, "shape": SHAPES, "size": SIZES, "speed": SPEEDS, "stroke": STROKES, "food": FOODS,
    "place": tuple(PLACE_PHRASE), "side": ("left", "right"), "motion": ("resting", "oncoming"),
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """How often each kind of damage is done, every rate in [0, 1]. Raises UserError when one is not."""

    missing: float = 0.5
    """Of the attributes (colour, shape, size, event, direction, speed, place, number, ...), those that are left out."""
    wrong: float = 0.1
    """Of the attributes that stay, those that are named wrongly."""
    boilerplate: float = 0.3
    """Captions with noise before or behind them."""
    unrelated: float = 0.1
    """Captions that give way to a text about something else."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0.0 <= getattr(self, one.name) <= 1.0:
                raise UserError(f"{one.name} is a rate and must lie in [0, 1], got {getattr(self, one.name)}; correct it")


@dataclass(frozen=True)
class Degraded:
    """A degraded caption and what was done to it: attributes by name, once for each thing that has one."""

    text: str
    named: tuple[str, ...]
    """What the caption named before."""
    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    boilerplate: bool
    unrelated: bool


def degrade(caption: str, rates: Rates, *seed: int) -> Degraded:
    """The caption of a world, short, dense or casual, as an alternative text; `seed` alone decides what is done to it.

    Raises UserError when the caption names no event of the worlds.
    """
    scene = parse(caption)
    if "kind" not in scene:
        raise UserError(f"{caption[:60]!r} names no event of the worlds; only their captions can be degraded")
    things = {"paint": "strokes", "eat": "food"}.get(scene["kind"], "objects")
    if things != "food":
        scene.setdefault(things, [{}])
    random = np.random.RandomState([number & 0xFFFFFFFF for number in seed])
    named: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    for thing, name in list(_attributes(scene)):
        left_out, wrongly, which = random.rand(3)
        named.append(name)
        if left_out < rates.missing:
            del thing[name]
            missing.append(name)
        elif wrongly < rates.wrong and (others := _others(scene, thing, name)):
            thing[name] = others[int(which * len(others))]
            wrong.append(name)
    text = say(scene)
    before, noisy, astray = random.rand(3)
    if noisy < rates.boilerplate:
        noise = _filled(BOILERPLATE, random)
        text = f"{noise} {text}" if before < 0.5 else f"{text} {noise}"
    if astray < rates.unrelated:
        text = _filled(UNRELATED, random)
    return Degraded(text, tuple(named), tuple(missing), tuple(wrong), noisy < rates.boilerplate, astray < rates.unrelated)


def alt_text(record: Record, rates: Rates, seed: int = 0) -> dict[str, str]:
    """A record's short caption (its first, where it has none of that kind) degraded, as a caption of kind "alt".

    From (seed, key) alone. Raises UserError when the record has no captions, and as `degrade`.
    """
    captions = record.meta.get("captions")
    if not captions:
        raise UserError(f"record {record.key!r} has no caption to degrade; caption it first")
    one = next((caption for caption in captions if caption["kind"] == "short"), captions[0])
    return {"text": degrade(one["text"], rates, seed, zlib.crc32(record.key.encode())).text, "kind": KIND, "source": SOURCE}


def say(scene: Scene) -> str:
    """A scene of which anything may be missing: a sentence where its event is named, else its words in a row."""
    if "kind" in scene:
        return compose({"food": "snack", **scene} if scene["kind"] == "eat" else scene)
    if "strokes" in scene:
        return ", ".join(_stroke(stroke) for stroke in scene["strokes"])
    words = [article(noun(thing)) for thing in scene["objects"]]
    words += [f"to the {scene['direction']}"] if scene.get("direction") in ("left", "right") else []
    words += [scene["speed"]] if "speed" in scene else []
    words += [PLACE_PHRASE[scene["place"]]] if "place" in scene else []
    words += [COUNT_WORDS[min(scene["count"], 4)][0]] if "count" in scene else []
    words += ["on the moon"] if scene.get("moon") else []
    return ", ".join(words)


def _stroke(stroke: Scene) -> str:
    words = [stroke[name] for name in ("color", "stroke") if name in stroke]
    line = article(" ".join([*words, *(["line"] if stroke.get("stroke") != "circle" else [])]))
    return f"{line} {FROM_TO[stroke['direction']]}" if "direction" in stroke else line


def _attributes(scene: Scene) -> Iterator[tuple[Scene, str]]:
    """What a scene names, each as the dict that holds it and its name there. What is eaten says what happens to it."""
    for name in ("kind", "direction", "speed", "place", "count", "side", "food", "moon"):
        if name in scene and not (name == "kind" and scene["kind"] == "eat"):
            yield scene, name
    for thing in (*scene.get("objects", ()), *scene.get("strokes", ())):
        for name in ("motion", "size", "color", "shape", "stroke", "direction"):
            if name in thing:
                yield thing, name


def _others(scene: Scene, thing: Scene, name: str) -> list[Any]:
    """What else an attribute could be; nothing where no other word would fit."""
    if name == "kind":
        known = scene["kind"].split("+")
        return [kind for kind in PHYS2D_KINDS if kind not in known] if "objects" in scene else []
    if name == "direction":
        # What falls has no other way to go.
        return [OPPOSITE[thing[name]]] if thing is not scene or thing[name] != "down" else []
    if name == "count":
        most = 3 if scene.get("kind") == "eat" else 4
        return [number for number in range(1, most + 1) if number != thing[name]]
    return [word for word in _WORDS.get(name, ()) if word != thing[name]]


def _filled(templates: Sequence[str], random: np.random.RandomState) -> str:
    return templates[random.randint(len(templates))].format(random.randint(10, 100))
