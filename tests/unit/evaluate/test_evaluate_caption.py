from __future__ import annotations

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.evaluate.caption import follow, read
from tubelet.evaluate.report import make_cases, scene_of
from tubelet.text.human_prompts import HUMAN_PROMPTS
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import COLORS, KINDS, TEST_SEEDS
from tubelet.worlds.grammar import parse


@pytest.mark.parametrize("split", ["in", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_truth_follows_its_caption(kind, split):
    rights: dict[str, list[bool]] = {}
    for case in make_cases((kind,), 16, split):
        for facet, right in follow(case.truth, case.fps, case.wanted).items():
            rights.setdefault(facet, []).append(right)
    assert set(rights) >= {"event"}
    for facet, values in rights.items():
        assert np.mean(values) >= 0.93, facet


@pytest.mark.parametrize("kind", ["slide", "fall", "parabola", "occlude"])
def test_each_wrong_word_is_noticed(kind):
    shapes, sizes = ("ball", "square", "triangle", "ring"), ("small", "medium", "large")
    for case in make_cases((kind,), 6):
        scene = case.wanted
        thing = scene["objects"][0]

        def seen(case=case, scene=scene, **changed: object) -> dict[str, bool]:
            return follow(case.truth, case.fps, {**scene, **changed})

        other = {**thing, "shape": next(s for s in shapes if s != thing["shape"])}
        assert seen(objects=[other, *scene["objects"][1:]])["shape"] is False
        other = {**thing, "size": next(s for s in sizes if s != thing["size"])}
        assert seen(objects=[other, *scene["objects"][1:]])["size"] is False
        taken = [o["color"] for o in scene["objects"]]
        other = {**thing, "color": next(c for c in COLORS if c not in taken)}
        # Without its object nothing named can be right.
        assert not any(seen(objects=[other, *scene["objects"][1:]]).values())
        assert seen(direction="left" if scene["direction"] != "left" else "right")["direction"] is False
        assert seen(kind="bounce")["event"] is False


def test_only_what_is_named_is_judged():
    case = make_cases(("slide",), 1)[0]
    colour = case.wanted["objects"][0]["color"]
    assert set(follow(case.truth, 8.0, {"objects": [{"color": colour}]})) == {"colour"}
    assert set(follow(case.truth, 8.0, {"kind": "slide", "objects": [{"shape": "ball"}]})) == {"shape", "event"}
    assert follow(case.truth, 8.0, {}) == {}


def test_a_stray_object_is_a_wrong_colour():
    case = make_cases(("slide",), 1)[0]
    clip = case.truth.copy()
    stray = (40, 90, 215) if case.wanted["objects"][0]["color"] != "blue" else (39, 158, 72)
    clip[:, 4:14, 4:14] = stray
    assert follow(case.truth, 8.0, case.wanted)["colour"]
    assert not follow(clip, 8.0, case.wanted)["colour"]


def test_an_empty_film_shows_nothing():
    empty = np.full((17, 64, 64, 3), 235, np.uint8)
    assert read(empty)["trackable"] is False
    for kind in KINDS:
        scene = make_cases((kind,), 1)[0].wanted
        assert not any(follow(empty, 8.0, scene).values())


def test_reading_gives_the_words_back():
    episode = WORLDS["phys2d"].sample(TEST_SEEDS[3], kind="occlude")
    seen = read(episode.video, 8.0)
    scene = episode.tags["scene"]
    assert seen["trackable"]
    assert seen["objects"] == scene["objects"]
    assert (seen["kind"], seen["direction"]) == ("occlude", scene["direction"])
    paint = WORLDS["persist2d"].sample(TEST_SEEDS[0], kind="paint")
    assert read(paint.video)["strokes"] == paint.tags["scene"]["strokes"]
    eat = WORLDS["persist2d"].sample(TEST_SEEDS[0], kind="eat")
    seen = read(eat.video)
    assert (seen["food"], seen["count"]) == (eat.tags["scene"]["food"], eat.tags["scene"]["count"])


def test_bites_and_foods_are_counted():
    for split in ("in", "held_out"):
        cases = make_cases(("eat",), 24, split)
        right = [(s["food"], s["count"]) == (c.wanted["food"], c.wanted["count"]) for c in cases if (s := read(c.truth))]
        assert np.mean(right) >= 0.95


def test_human_prompts_have_scenes_of_the_grammar():
    assert len(HUMAN_PROMPTS) == 30
    for prompt in HUMAN_PROMPTS:
        scene = scene_of(prompt)
        assert scene["kind"] in KINDS
        # The judge goes by the list, not by the grammar, which need not know every verb that people use.
        assert parse(prompt.text).get("kind", scene["kind"]) == scene["kind"], prompt.text
        wished = WORLDS[prompt.world].sample(TEST_SEEDS[0], kind=scene["kind"], wish=scene)
        assert wished.video.shape == (17, 64, 64, 3)


@pytest.mark.parametrize("prompt", HUMAN_PROMPTS, ids=lambda prompt: prompt.text)
def test_truth_passes_every_human_prompt(prompt):
    read_as = parse(prompt.text)
    for seed in range(3):
        truth = WORLDS[prompt.world].sample(seed, kind=read_as["kind"], wish=read_as)
        right = follow(truth.video, truth.fps, scene_of(prompt))
        assert right
        assert all(right.values()), right


def test_strokes_of_one_colour_count_as_one():
    strokes = [{"color": "orange", "stroke": "vertical"}, {"color": "orange", "stroke": "horizontal"}, {"color": "blue"}]
    truth = WORLDS["persist2d"].sample(1, kind="paint", wish={"strokes": strokes})
    assert all(follow(truth.video, 8.0, {"kind": "paint", "strokes": strokes}).values())
    assert not follow(truth.video, 8.0, {"kind": "paint", "strokes": strokes[:2]})["event"]
    assert not follow(truth.video, 8.0, {"kind": "paint", "strokes": [strokes[0], strokes[2], {"color": "red"}]})["colour"]


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="uint8"):
        follow(np.zeros((17, 64, 64, 3)), 8.0, {"kind": "fall"})
    with pytest.raises(UserError, match="positive"):
        read(np.zeros((17, 64, 64, 3), np.uint8), -1.0)
