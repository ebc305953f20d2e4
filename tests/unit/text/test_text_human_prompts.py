from __future__ import annotations

import re

from tubelet.text.human_prompts import HUMAN_PROMPTS

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = {"phys2d": ("ball", "square", "triangle", "ring")}
KINDS = {
    "phys2d": ("slide", "fall", "bounce", "parabola", "collision", "billiard", "occlude"),
    "persist2d": ("paint", "eat"),
}
FOODS = ("cookie", "bread", "apple")
STROKES = ("horizontal", "vertical", "diagonal", "circle")


def test_thirty_different_prompts_that_cover_the_worlds() -> None:
    assert len({p.text for p in HUMAN_PROMPTS}) == len(HUMAN_PROMPTS) == 30
    for world, kinds in KINDS.items():
        assert {p.kind for p in HUMAN_PROMPTS if p.world == world} == set(kinds)
    named = [o for p in HUMAN_PROMPTS for o in p.objects]
    assert {o.color for o in named} >= set(COLORS)
    assert {o.shape for o in named} >= {*SHAPES["phys2d"], *FOODS}
    assert {p.direction for p in HUMAN_PROMPTS} == {None, "left", "right"}
    assert len({o.size for o in named}) >= 3


def test_attributes_are_canonical_words() -> None:
    for prompt in HUMAN_PROMPTS:
        assert prompt.text.strip() == prompt.text
        assert prompt.kind in KINDS[prompt.world]
        assert prompt.objects
        for named in prompt.objects:
            assert named.color in (None, *COLORS)
            assert named.size in (None, "small", "medium", "large")
            allowed = {"eat": FOODS, "paint": STROKES}.get(prompt.kind or "", SHAPES["phys2d"])
            assert named.shape is None or named.shape in allowed


def test_what_is_expected_is_said() -> None:
    """A canonical word that stands in the prompt is expected, and left and right are never the wrong way round."""
    for prompt in HUMAN_PROMPTS:
        words = set(re.findall(r"[a-z]+", prompt.text.lower()))
        assert {c for c in COLORS if c in words} <= {o.color for o in prompt.objects}, prompt.text
        assert (prompt.direction or "") in {"", *(words & {"left", "right"})}, prompt.text
        assert not words & {"left", "right"} or prompt.direction is not None, prompt.text
        assert prompt.moon == ("moon" in words)
