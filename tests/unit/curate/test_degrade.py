"""Every kind of damage to a caption, done as often as its rate says, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.curate.degrade import BOILERPLATE, UNRELATED, Rates, alt_text, degrade, say
from tubelet.data.schema import Record
from tubelet.evaluate.report import world_of
from tubelet.worlds import WORLDS
from tubelet.worlds.base import Episode
from tubelet.worlds.constants import KINDS
from tubelet.worlds.grammar import Scene, parse

NONE = Rates(0.0, 0.0, 0.0, 0.0)
COUNT = 900


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Every kind in turn."""
    kinds = [KINDS[number % len(KINDS)] for number in range(COUNT)]
    return [WORLDS[world_of(kind)].sample(number, 16, 16, 2, 8.0, kind=kind) for number, kind in enumerate(kinds)]


def values(scene: Scene) -> Counter[tuple[str, str]]:
    """What a scene names, as (name, value), once for each thing."""
    things = [scene, *scene.get("objects", []), *scene.get("strokes", [])]
    return Counter((k, str(v)) for thing in things for k, v in thing.items() if k not in ("objects", "strokes"))


def test_nothing_is_done_at_rates_of_nothing(episodes: list[Episode]) -> None:
    for number, episode in enumerate(episodes[:300]):
        for caption in (episode.short, episode.dense, episode.human):
            done = degrade(caption, NONE, number)
            assert parse(done.text) == parse(caption)
            assert (done.missing, done.wrong, done.boilerplate, done.unrelated) == ((), (), False, False)
        assert degrade(episode.short, NONE, number).text == episode.short


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_attributes_go_missing(episodes: list[Episode], rate: float) -> None:
    named, missing = Counter[str](), Counter[str]()
    for number, episode in enumerate(episodes):
        done = degrade(episode.short, Rates(rate, 0.0, 0.0, 0.0), number)
        named.update(done.named)
        missing.update(done.missing)
        before, after = values(parse(episode.short)), values(parse(done.text))
        if episode.tags["kind"] == "paint":  # strokes of which much is missing are not read back
            continue
        assert not after - before, "nothing is added"
        gone = Counter(name for name, _ in (before - after).elements())
        assert Counter(done.missing) <= gone
        if not {"shape", "kind"} & set(done.missing):  # without them the grammar passes over some of what is still there
            assert Counter(done.missing) == gone
    assert missing.total() / named.total() == pytest.approx(rate, abs=0.03)
    assert {name for name in named if named[name] > 100} >= {"kind", "color", "shape", "size", "direction", "speed", "count"}
    for name, count in named.items():
        assert missing[name] / count == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5), name


def test_attributes_are_named_wrongly(episodes: list[Episode]) -> None:
    rate, possible, wrong = 0.3, 0, 0
    for number, episode in enumerate(episodes):
        done = degrade(episode.short, Rates(0.0, rate, 0.0, 0.0), number)
        before, after = values(parse(episode.short)), values(parse(done.text))
        able = [name for name in done.named if name in ("color", "shape", "size", "speed", "count", "place")]
        possible, wrong = possible + len(able), wrong + len([name for name in done.wrong if name in able])
        if "kind" not in done.wrong:
            assert sum(after.values()) == sum(before.values()), (episode.short, done.text)
            assert Counter(name for name, _ in (after - before).elements()) <= Counter(done.wrong)
            assert bool(after - before) == bool(done.wrong) or len(done.wrong) > 1, "two words may change places"
        elif "kind" in parse(done.text):
            assert parse(done.text)["kind"] != parse(episode.short)["kind"]
    assert wrong / possible == pytest.approx(rate, abs=0.03)


def test_boilerplate_stands_before_or_behind(episodes: list[Episode]) -> None:
    texts = [degrade(episode.short, Rates(0.0, 0.0, 0.4, 0.0), number) for number, episode in enumerate(episodes)]
    noisy = [(done.text, episode.short) for done, episode in zip(texts, episodes, strict=True) if done.boilerplate]
    assert len(noisy) / COUNT == pytest.approx(0.4, abs=0.05)
    assert all(caption in text and caption != text for text, caption in noisy)
    before = sum(text.endswith(caption) for text, caption in noisy)
    assert before / len(noisy) == pytest.approx(0.5, abs=0.1)
    assert all(done.text == episode.short for done, episode in zip(texts, episodes, strict=True) if not done.boilerplate)


def test_unrelated_texts_say_nothing_of_the_clip(episodes: list[Episode]) -> None:
    texts = [degrade(episode.short, Rates(0.0, 0.0, 0.0, 0.25), number) for number, episode in enumerate(episodes)]
    assert sum(done.unrelated for done in texts) / COUNT == pytest.approx(0.25, abs=0.05)
    for done, episode in zip(texts, episodes, strict=True):
        assert parse(done.text) == ({} if done.unrelated else parse(episode.short))
    assert all(parse(template.format(44)) == {} for template in (*BOILERPLATE, *UNRELATED))


def test_the_seed_and_the_record_decide(episodes: list[Episode]) -> None:
    tensor = {"latent": torch.zeros(1, 1, 1, 1)}
    records = [
        Record(f"clip-{n}", tensor, {"captions": [{"text": e.short, "kind": "short", "source": "w"}]})
        for n, e in enumerate(episodes[:100])
    ]
    once = [alt_text(record, Rates(), 3) for record in records]
    assert once == [alt_text(record, Rates(), 3) for record in records]
    assert [one["text"] for one in once] != [alt_text(record, Rates(), 4)["text"] for record in records]
    assert all((one["kind"], one["source"]) == ("alt", "degraded") for one in once)
    # The same caption under two keys is damaged in two ways.
    twins = [Record(f"twin-{n}", tensor, records[0].meta) for n in range(20)]
    assert len({alt_text(twin, Rates(), 3)["text"] for twin in twins}) > 5


def test_without_its_event_a_scene_is_a_row_of_words() -> None:
    assert say({"objects": [{"color": "red", "shape": "ball"}, {}], "direction": "left", "moon": True}) == (
        "a red ball, an object, to the left, on the moon"
    )
    strokes = [{"stroke": "circle"}, {"color": "blue", "stroke": "diagonal", "direction": "up"}]
    assert say({"strokes": strokes}) == "a circle, a blue diagonal line from bottom to top"
    assert say({"kind": "eat"}) == "A mouth takes bites out of a snack."


@pytest.mark.parametrize("name", ["missing", "wrong", "boilerplate", "unrelated"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_rates_are_shares(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is a rate"):
        Rates(**{name: value})


def test_what_is_no_caption_of_a_world_is_refused() -> None:
    with pytest.raises(UserError, match="names no event of the worlds"):
        degrade("a cat on a sofa", Rates(), 0)
    with pytest.raises(UserError, match="'x' has no caption to degrade"):
        alt_text(Record("x", {"latent": torch.zeros(1, 1, 1, 1)}, {}), Rates())
