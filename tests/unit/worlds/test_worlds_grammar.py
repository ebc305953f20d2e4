"""The grammar over its whole product: good English, and read back to what was said."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

from tubelet.worlds import WORLDS, grammar
from tubelet.worlds.constants import COLORS, FOODS, SHAPES, SIZES, SPEEDS, STROKES

OBJECTS = [{"size": z, "color": c, "shape": s} for z, c, s in itertools.product(SIZES, COLORS, SHAPES)]
SIDES = ("left", "right")
PLACES = ("left", "center", "right")


def scenes() -> list[dict[str, Any]]:
    """Every scene with one object, every stroke, table and meal, and every second object after a fixed set of first ones.

    Speeds of collisions take turns, so that every pair of words for a meeting has each of them.
    """
    found: list[dict[str, Any]] = []
    speeds = itertools.cycle(SPEEDS)
    for thing in OBJECTS:
        for side, speed in itertools.product(SIDES, SPEEDS):
            found.append({"kind": "slide", "objects": [thing], "speed": speed, "direction": side})
            found.append({"kind": "occlude", "objects": [thing], "speed": speed, "direction": side})
        for place, moon in itertools.product(PLACES, (False, True)):
            found.append(
                {"kind": "fall", "objects": [thing], "direction": "down", "place": place} | ({"moon": True} if moon else {})
            )
        for count in (1, 2, 3, 4):
            found += [{"kind": "bounce", "objects": [thing], "count": count, "place": place} for place in PLACES]
            for kind, side in itertools.product(("bounce", "bounce+occlude"), SIDES):
                found.append({"kind": kind, "objects": [thing], "count": count, "direction": side})
        for side, moon in itertools.product(SIDES, (False, True)):
            found.append({"kind": "parabola", "objects": [thing], "direction": side} | ({"moon": True} if moon else {}))
    for first, second in itertools.product(OBJECTS[::7], OBJECTS):
        if first == second:
            continue
        for motion, side in itertools.product(("resting", "oncoming"), SIDES):
            pair = [first, {**second, "motion": motion}]
            found.append({"kind": "collision", "objects": pair, "speed": next(speeds), "direction": side})
        pair = [first, {**second, "motion": "resting"}]
        found.append({"kind": "fall", "objects": pair, "direction": "down", "place": "left"})
        found.append({"kind": "bounce", "objects": pair, "count": 2, "place": "center"})
        found.append({"kind": "collision+parabola", "objects": pair, "direction": "left"})
    balls = [{"size": z, "color": c, "shape": "ball"} for z, c in itertools.product(SIZES, COLORS)]
    for n, start in itertools.product((2, 3, 4), range(len(balls))):
        several = [balls[(start + 9 * k) % len(balls)] for k in range(n)]
        for speed, side in itertools.product(SPEEDS, SIDES):
            found.append({"kind": "billiard", "objects": several, "speed": speed, "direction": side})
    for food, count, side in itertools.product(FOODS, (1, 2, 3), SIDES):
        found.append({"kind": "eat", "food": food, "count": count, "side": side})
    strokes = []
    for color, stroke in itertools.product(COLORS, STROKES):
        ways = {"circle": [None], "vertical": ["up", "down"]}.get(stroke, ["left", "right"])
        strokes += [{"color": color, "stroke": stroke} | ({"direction": way} if way else {}) for way in ways]
    found += [{"kind": "paint", "strokes": [s]} for s in strokes]
    found += [{"kind": "paint", "strokes": [a, b, strokes[0]]} for a, b in itertools.product(strokes, strokes[::3])]
    return found


ALL = scenes()


def english(text: str) -> None:
    """Asserts what any caption must satisfy."""
    assert "  " not in text
    assert text.strip() == text
    assert not re.search(
        r"[{}\[\]]|None|\b(the|a|an) (the|a|an|neither|both)\b|\ba [aeiou]|\ban [^aeiou]|\s[.,]|,,|\.\.", text, re.I
    ), text
    assert not re.search(r"\b([a-z]+)[^a-z]+\1\b", text, re.I), text


def test_short_captions_are_read_back_over_the_whole_product() -> None:
    assert len(ALL) > 8000
    for scene in ALL:
        text = grammar.compose(scene)
        english(text)
        assert text[0].isupper()
        assert text.endswith(".")
        assert grammar.parse(text) == scene, text


def test_no_two_scenes_share_a_short_caption() -> None:
    assert len({grammar.compose(scene) for scene in ALL}) == len(ALL)


@pytest.mark.parametrize("left_out", ["size", "color"])
def test_scenes_with_attributes_left_out_are_read_back(left_out: str) -> None:
    for scene in ALL[::5]:
        if "objects" not in scene:
            continue
        things = [{k: v for k, v in thing.items() if k != left_out} for thing in scene["objects"]]
        bare = {"kind": scene["kind"], "objects": things}
        assert grammar.parse(grammar.compose(bare)) == bare


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_dense_captions_are_english_and_hold_everything(variant: int) -> None:
    times = {"floor": [0.71, 1.4], "collide": [0.5], "apex": [0.4], "enter": [0.5], "exit": [1.2], "leave": [1.8]}
    times |= {"wall": [1.1], "bite": [0.3, 0.8, 1.4], "stroke_end": [0.6, 1.1, 1.6]}
    events = sorted((t, kind, (0,)) for kind, moments in times.items() for t in moments)
    # Shuffled: where things are and how they are told take turns in threes, too.
    mine = np.random.RandomState(0).permutation(len(ALL))[variant::3]
    for scene, shown in itertools.product([ALL[place] for place in mine], (events, [])):
        place = scene.get("place", "left" if scene.get("direction") != "left" else "right")
        heavier = (None, 0, 1)[variant]
        things = len(scene.get("objects", scene.get("strokes", [0])))
        places = [grammar.PLACE_PHRASE[place], "on the far right", "at the top left", "at the bottom"][:things]
        whole = {**scene, "spin": variant == 0}
        text = grammar.describe(whole, shown, places, wall="in the middle", variant=variant, heavier=heavier)
        english(text)
        read = grammar.parse(text)
        for key, value in scene.items():
            assert read.get(key) == value, (key, text)


def test_casual_captions_say_nothing_wrong() -> None:
    random = np.random.RandomState(3)
    seen = set()
    for scene in ALL[::2]:
        text = grammar.paraphrase(scene, random)
        seen.add(text)
        english(text.replace("toast", "loaf"))
        read = grammar.parse(text)
        assert read["kind"] == scene["kind"], text
        for key, value in read.items():
            if key in ("objects", "strokes"):
                assert 1 <= len(value) <= len(scene[key]), text
                for said, true in zip(value, scene[key], strict=False):
                    assert said.items() <= true.items(), text
            else:
                assert scene.get(key) == value, (key, text)
        if scene.get("moon"):
            assert read["moon"], text
    assert len(seen) > 0.6 * len(ALL[::2])


@pytest.mark.parametrize(
    ("table", "key"), [(grammar.COLOR_WORDS, "color"), (grammar.SHAPE_WORDS, "shape"), (grammar.SIZE_WORDS, "size")]
)
def test_every_synonym_is_understood(table: dict[str, tuple[str, ...]], key: str) -> None:
    words = [word for synonyms in table.values() for word in synonyms]
    assert len(words) == len(set(words))
    for canonical, synonyms in table.items():
        assert synonyms[0] == canonical
        for word in synonyms:
            text = f"{word} is falling" if key == "shape" else f"{word} ball is falling"
            assert grammar.parse(text)["objects"][0][key] == canonical, text


PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("a red ball bounces", {"kind": "bounce", "objects": [{"color": "red", "shape": "ball"}]}),
    ("crimson sphere falling", {"kind": "fall", "objects": [{"color": "red", "shape": "ball"}]}),
    (
        "Big blue box slides right",
        {"kind": "slide", "objects": [{"size": "large", "color": "blue", "shape": "square"}], "direction": "right"},
    ),
    (
        "the donut rolls to the left quickly",
        {"kind": "slide", "objects": [{"shape": "ring"}], "direction": "left", "speed": "fast"},
    ),
    ("two balls collide", {"kind": "collision", "objects": [{"shape": "ball"}, {"shape": "ball"}]}),
    (
        "red ball hits blue cube",
        {"kind": "collision", "objects": [{"color": "red", "shape": "ball"}, {"color": "blue", "shape": "square"}]},
    ),
    ("a ball that has left the frame", {"objects": [{"shape": "ball"}]}),
    ("a ball hits the ground", {"objects": [{"shape": "ball"}]}),
    ("a ball falls and hits the floor", {"kind": "fall", "objects": [{"shape": "ball"}]}),
    (
        "tiny green triangle falls on the moon",
        {"kind": "fall", "objects": [{"size": "small", "color": "green", "shape": "triangle"}], "moon": True},
    ),
    ("a yellow hoop goes behind a wall", {"kind": "occlude", "objects": [{"color": "yellow", "shape": "ring"}]}),
    ("a purple disc comes from the left", {"objects": [{"color": "purple", "shape": "ball"}], "direction": "right"}),
    (
        "an orange ball is thrown up from left to right",
        {"kind": "parabola", "objects": [{"color": "orange", "shape": "ball"}], "direction": "right"},
    ),
    (
        "a ball bounces twice on the right side",
        {"kind": "bounce", "objects": [{"shape": "ball"}], "count": 2, "place": "right"},
    ),
    ("someone takes two bites of a biscuit", {"kind": "eat", "food": "cookie", "count": 2}),
    ("an apple is eaten", {"kind": "eat", "food": "apple"}),
    (
        "paint a red circle, then a blue vertical line",
        {"kind": "paint", "strokes": [{"color": "red", "stroke": "circle"}, {"color": "blue", "stroke": "vertical"}]},
    ),
    ("brush draws crimson horizontal stripe", {"kind": "paint", "strokes": [{"color": "red", "stroke": "horizontal"}]}),
    ("a pool table with three balls", {"kind": "billiard", "objects": [{"shape": "ball"}] * 3}),
    (
        "A red ball and a blue ball. The red ball falls.",
        {"kind": "fall", "objects": [{"color": "red", "shape": "ball"}, {"color": "blue", "shape": "ball"}]},
    ),
    ("a ball hits another ball", {"kind": "collision", "objects": [{"shape": "ball"}, {"shape": "ball"}]}),
    ("a ball bounces and goes behind a wall", {"kind": "bounce+occlude", "objects": [{"shape": "ball"}]}),
    (
        "fast orange ring racing to the right",
        {"kind": "slide", "objects": [{"color": "orange", "shape": "ring"}], "direction": "right", "speed": "fast"},
    ),
    (
        "green cube bumps into an orange one",
        {"kind": "collision", "objects": [{"color": "green", "shape": "square"}, {"color": "orange", "shape": "square"}]},
    ),
    (
        "a big ball hits two small ones",
        {"kind": "collision", "objects": [{"size": "large", "shape": "ball"}, *[{"size": "small", "shape": "ball"}] * 2]},
    ),
    ("a red ring hits another", {"kind": "collision", "objects": [{"color": "red", "shape": "ring"}, {"shape": "ring"}]}),
    ("a red ring hits another one", {"kind": "collision", "objects": [{"color": "red", "shape": "ring"}, {"shape": "ring"}]}),
    ("one ball bounces one time", {"kind": "bounce", "objects": [{"shape": "ball"}], "count": 1}),
    ("a red one falls", {"kind": "fall", "objects": [{"color": "red"}]}),
    ("a ball that is red falls", {"kind": "fall", "objects": [{"shape": "ball", "color": "red"}]}),
    ("a red bouncing ball", {"kind": "bounce", "objects": [{"color": "red", "shape": "ball"}]}),
    ("a red ball hits a cat that is blue", {"kind": "collision", "objects": [{"color": "red", "shape": "ball"}]}),
    ("an artist paints two orange stripes", {"kind": "paint", "strokes": [{"color": "orange"}] * 2}),
    ("paint two lines, a red one and a blue one", {"kind": "paint", "strokes": [{"color": "red"}, {"color": "blue"}]}),
    ("paint three lines", {"kind": "paint", "strokes": [{}] * 3}),
    ("a sideways red stripe is painted", {"kind": "paint", "strokes": [{"color": "red", "stroke": "horizontal"}]}),
    ("a ball bounces four times", {"kind": "bounce", "objects": [{"shape": "ball"}], "count": 4}),
    ("", {}),
    ("a dog in the snow", {}),
    ("???!!! 7.5", {}),
]


@pytest.mark.parametrize(("text", "meaning"), PROMPTS)
def test_human_prompts(text: str, meaning: dict[str, Any]) -> None:
    assert grammar.parse(text) == meaning
    assert grammar.parse(text.upper()) == meaning
    assert grammar.parse(f"  {text} ") == meaning


def test_articles() -> None:
    assert grammar.article("orange ball") == "an orange ball"
    assert grammar.article("hoop") == "a hoop"


@pytest.mark.parametrize("world", ["phys2d", "persist2d"])
def test_the_captions_of_clips_are_read_back(world: str) -> None:
    dense = []
    for seed in range(250):
        clip = WORLDS[world].sample(seed, 16, 16)
        scene = clip.tags["scene"]
        assert grammar.parse(clip.short) == scene
        read = grammar.parse(clip.dense)
        assert {key: read.get(key) for key in scene} == scene, clip.dense
        english(clip.dense)
        dense.append(len(clip.dense.split()))
    assert 45 <= np.mean(dense) <= 66


def test_dense_captions_say_where_things_are() -> None:
    table = WORLDS["phys2d"].sample(2, kind="billiard")
    assert "starts on the left" in table.dense
    assert "past a small orange ball in the middle, a large blue ball at the top right and a small pink ball at the bottom" in (
        table.dense
    )
    paint = WORLDS["persist2d"].sample(1, kind="paint")
    assert "a purple circle in the middle" in paint.dense
    assert "a vertical yellow line from bottom to top on the right" in paint.dense
    hit = WORLDS["phys2d"].sample(2, kind="collision")
    assert "hits a resting small blue square that starts in the middle at 0.6 s" in hit.dense


def test_places_in_words() -> None:
    shares = (0.0, 0.2, 0.5, 0.7, 0.9)
    assert [grammar.where_along(x).split("the ")[1] for x in shares] == ["far left", "left", "middle", "right", "far right"]
    assert [grammar.where_within(x, 0.1) for x in (0.1, 0.5, 0.9)] == ["at the top left", "at the top", "at the top right"]
    assert [grammar.where_within(x, 0.5) for x in (0.1, 0.5, 0.9)] == ["on the left", "in the middle", "on the right"]
    assert [grammar.where_within(x, 0.9) for x in (0.1, 0.5)] == ["at the bottom left", "at the bottom"]
