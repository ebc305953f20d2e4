"""The invisible mark: found after what re-encoding does, not found where it is not, too faint to see."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from tubelet.serve import mark
from tubelet.serve.mark import THRESHOLD, Found, best, coded_luma, decibels, detect, detect_luma, embed, payload_of

KEY, OTHER = hashlib.sha256(b"ours").digest(), hashlib.sha256(b"theirs").digest()
PAYLOAD = 0xC0FFEE42


@pytest.fixture(scope="module")
def clips() -> dict[str, tuple[np.ndarray, int]]:
    """Clips at full size, and their frames a second."""
    return {f"textured {seed}": (mark.textured_clip(seed, frames=24), 24) for seed in (1, 2)} | {
        f"world {seed}": (mark.world_clip(seed), 8) for seed in (1, 2)
    }


NAMES = ("textured 1", "textured 2", "world 1", "world 2")


@pytest.fixture(scope="module")
def marked(clips: dict[str, tuple[np.ndarray, int]]) -> dict[str, np.ndarray]:
    return {name: embed(clip, KEY, PAYLOAD) for name, (clip, _) in clips.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_mark_survives_h264_and_scaling(clips: dict, marked: dict, name: str) -> None:
    fps = clips[name][1]
    for crf, size in ((28, None), (26, (182, 320))):
        found = detect_luma(coded_luma(marked[name], fps, crf, size), KEY)
        assert found is not None, f"crf {crf} at {size}"
        assert found.payload == PAYLOAD


@pytest.mark.parametrize("name", NAMES)
def test_the_mark_is_faint(clips: dict, marked: dict, name: str) -> None:
    clip = clips[name][0]
    assert marked[name].shape == clip.shape
    assert marked[name].dtype == np.uint8
    assert decibels(clip, marked[name]) >= 42
    shift = marked[name].astype(int) - clip
    assert np.abs(shift).max() <= 10
    inside = (clip.min(-1) > 8) & (clip.max(-1) < 247)
    assert (shift.max(-1) == shift.min(-1))[inside].all(), "brightness changes, colours do not"


@pytest.mark.parametrize("name", NAMES)
def test_only_the_key_finds_it_and_only_where_it_is(clips: dict, marked: dict, name: str) -> None:
    assert detect(marked[name], KEY) == Found(PAYLOAD, pytest.approx(best(mark._mean_luma(marked[name]), [KEY])[0][1]))
    assert detect(marked[name], OTHER) is None
    assert detect(clips[name][0], KEY) is None


def test_lively_films_are_marked_in_bursts_and_still_ones_throughout() -> None:
    """Noise of strong contrast that glides a pixel a frame: what a coder throws away of a steady mark there is all of it."""
    lively, still = mark.textured_clip(30), mark.world_clip(1, 64, 64, 48)
    bursts = embed(lively, KEY, PAYLOAD)
    found = detect_luma(coded_luma(bursts, 24, 28), KEY)
    assert found is not None
    assert found.payload == PAYLOAD
    assert np.array_equal(bursts[mark.BURST :], lively[mark.BURST :])
    assert decibels(lively, bursts) >= 42
    shift = embed(still, KEY, PAYLOAD).astype(int) - still
    assert all(frame.any() for frame in shift)


def test_flat_areas_are_changed_less_than_textures(clips: dict, marked: dict) -> None:
    half = np.full((4, 128, 128, 3), 128, np.uint8)
    half[:, :, 64:] = np.random.default_rng(0).integers(60, 200, (1, 128, 64, 1), dtype=np.uint8)
    shift = embed(half, KEY, PAYLOAD).astype(float) - half
    assert shift[:, :, :56].std() < 0.7 * shift[:, :, 72:].std()


def test_cuts_brightness_contrast_and_grain_do_not_hide_it(marked: dict) -> None:
    clip = marked["world 1"].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 6, clip.shape)
    for name, other in {
        "one frame": clip[3:4],
        "a cut": clip[5:11],
        "every other frame": clip[::2],
        "brighter": clip * 1.1 + 10,
        "darker": clip * 0.6,
        "negative contrast is a different film": 255 - clip,
        "grain": clip + grain,
        "grey": clip.mean(-1, keepdims=True).repeat(3, -1),
    }.items():
        found = detect(other.clip(0, 255).astype(np.uint8), KEY)
        if "negative" in name:
            assert found is None or found.payload != PAYLOAD
        else:
            assert found is not None, name
            assert found.payload == PAYLOAD, name


@pytest.mark.parametrize("size", [(64, 64), (64, 112), (112, 64), (96, 170), (240, 136), (63, 65)])
def test_small_and_tall_and_odd_films_carry_it(size: tuple[int, int]) -> None:
    clip = mark.world_clip(4, *size)
    found = detect(embed(clip, KEY, PAYLOAD), KEY)
    assert found is not None
    assert found.payload == PAYLOAD


def test_a_picture_carries_it() -> None:
    picture = mark.world_clip(3, 256, 256)[:1]
    found = detect(embed(picture, KEY, PAYLOAD), KEY)
    assert found is not None
    assert found.payload == PAYLOAD


@pytest.mark.parametrize("payload", [0, 1, 2**32 - 1, 0x80000000, payload_of("video_0")])
def test_every_payload_is_carried(payload: int) -> None:
    found = detect(embed(mark.world_clip(2, 128, 128), KEY, payload), KEY)
    assert found is not None
    assert found.payload == payload


def test_parts_of_a_film_marked_one_by_one_carry_one_mark(clips: dict) -> None:
    clip = clips["textured 2"][0]
    whole = np.concatenate([embed(part, KEY, PAYLOAD) for part in np.array_split(clip, 3)])
    found = detect(whole, KEY)
    assert found is not None
    assert found.payload == PAYLOAD


def test_marking_is_repeatable_and_leaves_its_input_alone() -> None:
    clip = mark.world_clip(0, 64, 64)
    before = clip.copy()
    assert np.array_equal(embed(clip, KEY, 7), embed(clip, KEY, 7))
    assert np.array_equal(clip, before)
    assert not np.array_equal(embed(clip, KEY, 7), embed(clip, KEY, 8))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 2, 2, 3), (1, 16, 16, 3), (3, 8, 300, 3)])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_films_without_room_for_a_mark_do_no_harm(shape: tuple[int, ...], value: int) -> None:
    clip = np.full(shape, value, np.uint8)
    marked = embed(clip, KEY, PAYLOAD)
    assert decibels(clip, marked) >= 42
    assert detect(clip, KEY) is None


# --- chance ------------------------------------------------------------------------------------------------------------------


def test_the_threshold_is_where_the_bound_says() -> None:
    assert len(mark.BANDS) * 2.0**32 * math.exp(-(THRESHOLD**2) / 2) == pytest.approx(1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_chance_stays_below_the_threshold(clips: dict, marked: dict, name: str) -> None:
    """Wrong keys on marked and unmarked films: the scores must look like those of random signs, far from the threshold."""
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(100)]
    for film in (clips[name][0], marked[name]):
        scores = [score for _, score in best(mark._mean_luma(film), keys)]
        assert max(scores) < THRESHOLD - 0.5
        assert 4 < np.mean(scores) < 6.5


def test_chance_needs_no_assumption_about_films() -> None:
    """Even a film that is nothing but a pattern of the band is as unlikely as any other under a key it does not know."""
    cosines = mark._Cosines.of(128, 128, mark.BANDS[1])
    pattern = cosines.inverse(cosines.signs(OTHER) * 300)
    payload, score = best(pattern, [OTHER])[0]
    assert payload == 0  # all of its code is +1
    assert score > 20
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(200)]
    assert max(score for _, score in best(pattern, keys)) < THRESHOLD


# --- the code ----------------------------------------------------------------------------------------------------------------


def test_the_code_corrects_any_eight_wrong_bits() -> None:
    """Free distance 18."""
    random = np.random.default_rng(0)
    for _ in range(30):
        payload = int(random.integers(0, 2**32))
        votes = mark._encode(payload)
        votes[random.choice(len(votes), 8, replace=False)] *= -1
        (read,), (total,) = mark._decode(votes[None])
        assert read == payload
        assert total == len(votes) - 16


def test_decoding_finds_the_best_payload() -> None:
    random = np.random.default_rng(1)
    votes = random.normal(size=(5, mark._CODE_BITS))
    payloads, totals = mark._decode(votes)
    for vote, payload, total in zip(votes, payloads, totals, strict=True):
        assert total == pytest.approx(vote @ mark._encode(int(payload)))
        near = [int(payload) ^ 1 << place for place in range(32)]
        others = near + [int(value) for value in random.integers(0, 2**32, 300)]
        assert all(vote @ mark._encode(other) <= total + 1e-9 for other in others)


def test_ids_become_payloads() -> None:
    assert payload_of("video_a") != payload_of("video_b")
    assert 0 <= payload_of("video_a") < 2**32
    assert payload_of("video_a") == int(hashlib.sha256(b"video_a").hexdigest()[:8], 16)


def test_the_measurement_runs() -> None:
    command = [
        sys.executable,
        "-m",
        "tubelet.serve.mark",
        "--clips",
        "1",
        "--unmarked",
        "1",
        "--keys",
        "3",
        "--size",
        "96",
        "160",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("crf 16       found 1 of 1, payload right 1") == 2
    assert "0 of 6 at 8.6" in said
