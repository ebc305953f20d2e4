"""Expansion by the worlds: what a prompt names is kept, the rest is drawn, always the same way."""

from __future__ import annotations

import pytest

from tubelet.text.expand import RuleExpander
from tubelet.worlds import WORLDS
from tubelet.worlds.expand import ROOMS, compose_dense, compose_short, parse_scene
from tubelet.worlds.grammar import parse
from tubelet.worlds.unread import unread

PROMPTS = (
    "a red ball bounces",
    "crimson sphere falling",
    "a blue square slides to the left",
    "eat a cookie",
    "paint a red circle",
)


def expanded(prompt: str) -> str:
    return RuleExpander(parse_scene, compose_dense).expand(prompt).text


def test_the_rooms_are_the_worlds() -> None:
    assert [world.name for world in ROOMS] == list(WORLDS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_the_prompt_names_is_kept(prompt: str) -> None:
    named = parse(prompt)
    for write in (compose_short, compose_dense):
        scene = parse_scene(prompt)
        assert scene is not None
        whole = parse(write(scene))
        assert whole["kind"] == named["kind"]
        assert all(whole.get(name) == named[name] for name in ("direction", "count", "food") if name in named)
        for key in ("objects", "strokes"):
            for wanted, got in zip(named.get(key, []), whole.get(key, []), strict=False):
                assert wanted.items() <= got.items()


@pytest.mark.parametrize("colour", ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"])
@pytest.mark.parametrize(
    "words", ["A large {} ball drops and bounces twice.", "a {} square drops and bounces once", "a {} ball falls"]
)
def test_as_often_as_was_said_and_on_the_moon_only_where_it_was_said(words: str, colour: str) -> None:
    named = parse(words.format(colour))
    for prompt, moon in ((words.format(colour), False), (words.format(colour).rstrip(".") + " on the moon", True)):
        scene = parse_scene(prompt)
        assert scene is not None
        whole = parse(compose_dense(scene))
        assert bool(whole.get("moon")) == moon
        if "count" in named and not moon:
            assert whole["count"] == named["count"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_words_expand_the_same_way(prompt: str) -> None:
    assert expanded(prompt) == expanded(prompt) == expanded(f"  {prompt.upper()} ")


def test_half_a_character_harms_nothing() -> None:
    """What a terminal makes of a byte that is no text."""
    assert "red ball" in expanded("a red ball bounces \udcff")


def test_the_dense_caption_is_longer_than_the_short_one() -> None:
    scene = parse_scene("a red ball bounces")
    assert scene is not None
    assert len(compose_dense(scene).split()) > 2 * len(compose_short(scene).split())


@pytest.mark.parametrize("prompt", ["a ship in a storm", "hello", "", "?!", "a red ball"])
def test_words_without_an_event_stay_as_they_are(prompt: str) -> None:
    assert parse_scene(prompt) is None
    assert expanded(prompt) == prompt


def test_every_kind_can_be_expanded() -> None:
    for world in WORLDS.values():
        for kind in world.kinds:
            prompt = world.sample(11, frames=1, kind=kind).short
            scene = parse_scene(prompt)
            assert scene is not None
            assert scene["kind"] == kind
            assert parse(compose_dense(scene))["kind"] == kind


@pytest.mark.parametrize("prompt", ["it goes on", "it falls", "they collide"])
def test_what_it_is_can_only_be_seen(prompt: str) -> None:
    """Such words go on from a film; a thing that is invented for them would not be the one in it."""
    assert parse_scene(prompt) is None


@pytest.mark.parametrize("prompt", ["a thing falls", "something bounces"])
def test_a_prompt_that_names_no_object_is_given_one(prompt: str) -> None:
    scene = parse_scene(prompt)
    assert scene is not None
    assert parse(compose_dense(scene))["objects"]


@pytest.mark.parametrize(
    "prompt",
    [
        # Things that are not there.
        "a red star falls",
        "red star falling",
        "an apple falls",
        "an orange falls",
        "stars fall",
        "a red ball hits a tree",
        "a red ball hits trees",
        "a cat that is red slides to the left",
        "draw a cat",
        "paint a blue square",
        "a donut is eaten",
        "eating pizza",
        # Colours.
        "a black ball falls",
        "a white square slides to the right",
        "a red and blue ball falls",
        "a ball rolls behind a red wall",
        "a green apple is eaten",
        # Numbers.
        "a red ball bounces three times",
        "a red ball bounces four times",
        "a red ball bounces 7 times",
        "a cookie is eaten in four bites",
        "a cookie is eaten in five bites",
        "ten red balls fall",
        "two balls slide to the right",
        "a brush paints five red lines",
        "a brush paints a red line, a blue line, a green line and a yellow line",
        "paint red, orange, yellow, green, cyan, blue, purple, pink and red lines",
        "a lime ball falls",
        # Ways that nothing goes here, and what several things would do at once.
        "a red ball goes up",
        "a red ball moves down",
        "a ball rolls upward",
        "a ball is thrown down",
        "a ball falls up",
        "a red ball hits a wall",
        "a red ball goes through a wall",
        "a brush erases a red line",
        "a red ball and a green ball fall",
        "a red and a green ball fall",
        "A red ball falls. A blue ball falls.",
        "two red balls bounce",
        # What is denied, and what cannot go together.
        "a red ball does not move",
        "the red ball never falls",
        "a red ball isn't falling",
        "a red ball isn" + "t falling",
        "a red ball isn\u2019t falling",
        "a red ball falls to the left",
        "a red ball slides on the moon",
        "a square rolls across a billiard table",
    ],
)
def test_what_the_worlds_cannot_show_leaves_the_prompt_as_it_is(prompt: str) -> None:
    assert "kind" in parse(prompt)
    assert expanded(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "kind", "named"),
    [
        ("a ball that is red slides left", "slide", {"color": "red", "shape": "ball"}),
        ("the ball is red and it falls", "fall", {"color": "red", "shape": "ball"}),
        ("a red bouncing ball", "bounce", {"color": "red", "shape": "ball"}),
        ("a big bouncy ball falls", "fall", {"size": "large", "shape": "ball"}),
        ("a shiny red ball bounces happily", "bounce", {"color": "red", "shape": "ball"}),
        ("it is red and falls", "fall", {"color": "red"}),
        ("a man throws a red ball to the right", "parabola", {"color": "red", "shape": "ball"}),
        ("red square passes behind the gray wall, heading right", "occlude", {"color": "red", "shape": "square"}),
        ("a ball falls on a white background", "fall", {"shape": "ball"}),
        ("a yellow ball falls once", "fall", {"color": "yellow", "shape": "ball"}),
        ("a reddish ball falls", "fall", {"color": "red", "shape": "ball"}),
        ("A Bluish square slides left", "slide", {"color": "blue", "shape": "square"}),
        ("a red and a blue ball collide", "collision", {"color": "red", "shape": "ball"}),
        ("a red ball falls next to a blue box", "fall", {"color": "red", "shape": "ball"}),
        ("a red ball thrown up in the air", "parabola", {"color": "red", "shape": "ball"}),
        ("a red ball bounces up and down", "bounce", {"color": "red", "shape": "ball"}),
        ("make a red ball fall beside a blue box", "fall", {"color": "red", "shape": "ball"}),
        ("I would like to see a red ball bounce, please", "bounce", {"color": "red", "shape": "ball"}),
    ],
)
def test_a_colour_is_kept_wherever_it_stands(prompt: str, kind: str, named: dict[str, str]) -> None:
    assert expanded(prompt) != prompt
    whole = parse(expanded(prompt))
    assert whole["kind"] == kind
    assert named.items() <= whole["objects"][0].items()


def test_words_of_the_worlds_themselves_are_all_read() -> None:
    for world in WORLDS.values():
        for seed in range(150):
            clip = world.sample(seed, 16, 16)
            for text in (clip.short, clip.human):
                assert unread(text, parse(text)) is None, text


@pytest.mark.parametrize("colour", ["red", "green", "purple", "pink"])
def test_a_line_is_no_circle_and_goes_where_it_was_sent(colour: str) -> None:
    one = parse(expanded(f"a brush paints a {colour} line from left to right"))["strokes"]
    assert [(s["color"], s["stroke"] in ("horizontal", "diagonal"), s["direction"]) for s in one] == [(colour, True, "right")]
    two = parse(expanded(f"an artist paints two {colour} stripes"))["strokes"]
    assert [s["color"] for s in two] == [colour] * 2
    assert "circle" not in {s["stroke"] for s in two}


def test_a_painting_of_four_strokes_is_said_in_the_grammars_words() -> None:
    scene = {"kind": "paint", "strokes": [{"color": colour} for colour in ("red", "blue", "green", "pink")]}
    said = "A brush paints a red line, then a blue line, then a green line, then a pink line."
    assert compose_dense(scene) == compose_short(scene) == said
