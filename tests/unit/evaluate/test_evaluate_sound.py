"""The judge of sound: true sounds pass it, sounds with one thing wrong fail in that thing alone."""

from __future__ import annotations

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.evaluate.sound import (
    REFERENCES,
    Onset,
    agreement,
    audible,
    onsets,
    partners,
    rank_correlation,
    references,
    seen_impacts,
)
from tubelet.media.audio import Audio
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS
from tubelet.worlds.sound import Impact, Sound, sound

KINDS = ("fall", "bounce", "parabola", "collision", "billiard")
FRAME = 1 / 8


def hear(place: int, control: str | None, rate: int = 8000) -> Sound:
    return sound(TEST_SEEDS[place], kind=KINDS[place % len(KINDS)], rate=rate, control=control)


def test_truth_passes_and_each_control_fails_in_its_own_thing() -> None:
    rows = references(hear, 60, FRAME, len(KINDS))
    assert tuple(rows) == REFERENCES
    truth, late, loudness, other = rows.values()
    assert min(truth["precision"], truth["recall"]) > 0.95
    assert truth["timing"] < 0.01
    assert truth["loudness"] > 0.85
    assert late["f1"] < 0.45
    assert late["count"] > 0.85
    assert loudness["f1"] > 0.9
    assert abs(loudness["loudness"]) < 0.35
    assert other["f1"] < 0.55


def test_truth_passes_at_the_other_rate_and_through_hiss() -> None:
    heard = [hear(place, None, 16000) for place in range(20)]
    true = [audible(one.impacts) for one in heard]
    assert agreement([onsets(one.audio) for one in heard], true, FRAME)["f1"] > 0.95
    random = np.random.RandomState(0)
    hissed = [Audio.from_float(one.audio.to_float() + 0.003 * random.randn(34_000), 16000) for one in heard]
    assert agreement([onsets(audio) for audio in hissed], true, FRAME)["f1"] > 0.9


@pytest.mark.parametrize("kind", ["slide", "occlude"])
def test_what_only_moves_strikes_nothing(kind: str) -> None:
    assert [len(onsets(sound(seed, kind=kind).audio)) for seed in range(12)] == [0] * 12


def test_silence_and_steady_noise_strike_nothing() -> None:
    random = np.random.RandomState(0)
    for samples in (np.zeros(8000), 0.1 * random.randn(8000), np.zeros(10)):
        assert onsets(Audio.from_float(samples, 8000)) == []


@pytest.mark.parametrize("size", [32, 64])
def test_impacts_are_seen_in_true_films(size: int) -> None:
    for kind, least in (("fall", 0.9), ("collision", 0.9), ("parabola", 0.85), ("slide", 0.0)):
        films = [WORLDS["phys2d"].sample(TEST_SEEDS[place], size, size, kind=kind).video for place in range(8)]
        true = [audible(sound(TEST_SEEDS[place], size, size, kind=kind).impacts) for place in range(8)]
        figures = agreement([seen_impacts(film, 8.0) for film in films], true, FRAME, (1 / 8, 15 / 8))
        assert figures["f1"] >= least
        assert figures["count"] >= least
        still = [film[:1].repeat(17, 0) for film in films]
        assert [seen_impacts(film, 8.0) for film in still] == [[]] * 8


def test_a_film_of_few_frames_shows_no_impact() -> None:
    assert seen_impacts(np.full((2, 32, 32, 3), 200, np.uint8), 8.0) == []


def test_impacts_that_cannot_be_told_apart_are_one() -> None:
    many = [Impact(1.0, "floor", (0,), 0.1), Impact(1.02, "collide", (0, 1), 0.3), Impact(1.2, "floor", (0,), 0.2)]
    assert audible(many) == [Onset(1.02, 0.3), Onset(1.2, 0.2)]


def test_each_onset_has_one_partner() -> None:
    true = [Onset(t, 1.0) for t in (0.5, 0.6, 1.5)]
    assert len(partners([Onset(0.55, 1.0)], true, 0.125)) == 1
    assert len(partners([Onset(t, 1.0) for t in (0.45, 0.55, 0.65, 1.7)], true, 0.125)) == 2
    figures = agreement([[Onset(0.55, 1.0), Onset(1.0, 1.0)], []], [true, []], 0.125)
    assert (figures["precision"], figures["recall"], figures["count"]) == (0.5, pytest.approx(1 / 3), 0.5)
    assert "loudness" not in figures, "one pair has no correlation"
    ahead = agreement([[Onset(0.05, 1.0), Onset(1.0, 1.0)]], [[Onset(1.0, 1.0)]], 0.125, (0.1, 2.0))
    assert ahead["precision"] == 1, "outside of the span nothing counts"
    with pytest.raises(UserError, match="1 sounds are held against 2 clips"):
        agreement([[]], [[], []], 0.1)


def test_ranks_ignore_the_volume() -> None:
    assert rank_correlation([1.0, 4.0, 9.0], [0.1, 0.2, 3.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert rank_correlation([1.0, 1.0, 1.0], [3.0, 2.0, 1.0]) == 0
