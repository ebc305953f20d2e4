"""Expansion by the worlds: what a prompt names is kept, the rest is drawn, always the same way."""

from __future__ import annotations

import pytest

from tubelet.text.expand import RuleExpander
from tubelet.worlds import WORLDS
from tubelet.worlds.expand import ROOMS, compose_dense, compose_short, parse_scene
from tubelet.worlds.grammar import parse

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


@pytest.mark.parametrize("prompt", ["it falls", "something bounces"])
def test_a_prompt_that_names_no_object_is_given_one(prompt: str) -> None:
    scene = parse_scene(prompt)
    assert scene is not None
    assert parse(compose_dense(scene))["objects"]
