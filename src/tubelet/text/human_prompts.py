"""Thirty short prompts as people type them, and what each one names: encoders are chosen and systems judged by this fixed list.

None of them was written by a world's grammar. `None` means that the prompt leaves it open, so that anything is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["left", "right"]


@dataclass(frozen=True)
class Named:
    """One object in canonical words: `color` of the palette, `shape` (phys2d) or food or stroke (persist2d), `size`."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class HumanPrompt:
    """What is to be seen: `kind` of event in `world`, `direction` of the first object, number of bounces, strokes or bites."""

    text: str
    world: Literal["phys2d", "persist2d"]
    kind: str | None
    objects: tuple[Named, ...]
    direction: Direction | None = None
    times: int | None = None
    moon: bool = False


HUMAN_PROMPTS: tuple[HumanPrompt, ...] = (
    HumanPrompt("a red ball bounces", "phys2d", "bounce", (Named("red", "ball"),)),
    HumanPrompt("crimson sphere falling", "phys2d", "fall", (Named("red", "ball"),)),
    HumanPrompt("blue box sliding to the right", "phys2d", "slide", (Named("blue", "square"),), "right"),
    HumanPrompt("two balls crash into each other", "phys2d", "collision", (Named(None, "ball"), Named(None, "ball"))),
    HumanPrompt("Show me a tiny green triangle falling down", "phys2d", "fall", (Named("green", "triangle", "small"),)),
    HumanPrompt("huge yellow ring dropping to the floor", "phys2d", "fall", (Named("yellow", "ring", "large"),)),
    HumanPrompt("throw an orange ball up and to the right", "phys2d", "parabola", (Named("orange", "ball"),), "right"),
    HumanPrompt("a violet cube glides left", "phys2d", "slide", (Named("purple", "square"),), "left"),
    HumanPrompt("Can you make a pink ball that bounces twice?", "phys2d", "bounce", (Named("pink", "ball"),), None, 2),
    HumanPrompt(
        "little turquoise circle moving slowly to the left", "phys2d", "slide", (Named("cyan", "ball", "small"),), "left"
    ),
    HumanPrompt(
        "a big purple hoop goes behind a wall and comes out again", "phys2d", "occlude", (Named("purple", "ring", "large"),)
    ),
    HumanPrompt(
        "red square passes behind the gray wall, heading right", "phys2d", "occlude", (Named("red", "square"),), "right"
    ),
    HumanPrompt("the yellow ball hits the blue ball", "phys2d", "collision", (Named("yellow", "ball"), Named("blue", "ball"))),
    HumanPrompt(
        "green cube bumps into an orange one", "phys2d", "collision", (Named("green", "square"), Named("orange", "square"))
    ),
    HumanPrompt("billiard balls knocking around", "phys2d", "billiard", (Named(None, "ball"), Named(None, "ball"))),
    HumanPrompt("a ball falls on the moon", "phys2d", "fall", (Named(None, "ball"),), None, None, True),
    HumanPrompt(
        "a small pink triangle is tossed to the left", "phys2d", "parabola", (Named("pink", "triangle", "small"),), "left"
    ),
    HumanPrompt("scarlet ball flying through the air in an arc", "phys2d", "parabola", (Named("red", "ball"),)),
    HumanPrompt("I want to see a large cyan square drop and bounce", "phys2d", "bounce", (Named("cyan", "square", "large"),)),
    HumanPrompt("fast orange ring racing to the right", "phys2d", "slide", (Named("orange", "ring"),), "right"),
    HumanPrompt("someone takes three bites of a cookie", "persist2d", "eat", (Named(None, "cookie"),), None, 3),
    HumanPrompt("an apple gets eaten, one bite", "persist2d", "eat", (Named(None, "apple"),), None, 1),
    HumanPrompt("eating bread in two bites", "persist2d", "eat", (Named(None, "bread"),), None, 2),
    HumanPrompt("take a bite out of the cookie", "persist2d", "eat", (Named(None, "cookie"),), None, 1),
    HumanPrompt("a brush paints a red line across the canvas", "persist2d", "paint", (Named("red"),)),
    HumanPrompt("paint a blue circle", "persist2d", "paint", (Named("blue", "circle"),), None, 1),
    HumanPrompt("somebody draws one green vertical stroke", "persist2d", "paint", (Named("green", "vertical"),), None, 1),
    HumanPrompt("purple horizontal brush stroke", "persist2d", "paint", (Named("purple", "horizontal"),)),
    HumanPrompt(
        "first a yellow diagonal stroke, then a pink circle",
        "persist2d",
        "paint",
        (Named("yellow", "diagonal"), Named("pink", "circle")),
        None,
        2,
    ),
    HumanPrompt("an artist paints two orange stripes", "persist2d", "paint", (Named("orange"), Named("orange")), None, 2),
)
