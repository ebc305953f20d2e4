"""The test of the tests: truth obeys every law, each violated control breaks its law, damage changes neither."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from tubelet.core.errors import UserError
from tubelet.evaluate import laws
from tubelet.evaluate.reading import Reading, bounces, flights, line
from tubelet.evaluate.report import CONTROLS, make_cases, world_of
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import TEST_SEEDS
from tubelet.worlds.violate import VIOLATIONS, violate

N = 40
FROZEN = json.loads((Path(laws.__file__).parent / "thresholds.json").read_text(encoding="utf-8"))


def degraded(clip: np.ndarray, seed: int) -> np.ndarray:
    """As a small autoencoder might: noise of 22 levels and a blur of .8 pixels over both."""
    noise = np.random.RandomState(seed).randn(*clip.shape) * 22
    return np.clip(scipy.ndimage.gaussian_filter(clip + noise, (0, 0.8, 0.8, 0)) + 0.5, 0, 255).astype(np.uint8)


def blurred(clip: np.ndarray) -> np.ndarray:
    return np.clip(scipy.ndimage.gaussian_filter(clip.astype(np.float64), (0, 0.8, 0.8, 0)) + 0.5, 0, 255).astype(np.uint8)


def test_thresholds_are_the_frozen_ones():
    assert FROZEN["thresholds"] == laws.THRESHOLDS
    assert set(FROZEN["measured"]) == set(laws.LAWS) == set(CONTROLS)


@pytest.mark.parametrize("law", list(laws.LAWS))
def test_truth_obeys_and_controls_break(law):
    cases = make_cases(laws.LAWS[law].kinds, N)
    real = laws.rate([laws.judge(law, case.truth, case.fps, case.wanted) for case in cases])
    assert real[0] >= 0.9, f"truth passes {law} in {real[0]:.2f} only"
    assert real[1] >= real[0]
    for name, violation in CONTROLS[law].items():
        source = next(key for key, value in VIOLATIONS.items() if value is CONTROLS[law])
        verdicts = []
        for index in range(N):
            kind = violation.kinds[index % len(violation.kinds)]
            clip = violate(violation.world, source, name, TEST_SEEDS[index], kind=kind)
            verdicts.append(laws.judge(law, clip.video, clip.fps, clip.tags["scene"]))
        assert laws.rate(verdicts)[0] <= 0.2, f"{name} passes {law}"


@pytest.mark.parametrize("law", list(laws.LAWS))
def test_truth_obeys_through_damage(law):
    cases = make_cases(laws.LAWS[law].kinds, N, "held_out")
    verdicts = [laws.judge(law, degraded(c.truth, i), c.fps, c.wanted) for i, c in enumerate(cases)]
    assert laws.rate(verdicts)[0] >= 0.85
    if law == "steady":
        assert laws.rate([laws.judge(law, blurred(c.truth), c.fps, c.wanted) for c in cases])[0] >= 0.95


@pytest.mark.parametrize("law", list(laws.LAWS))
def test_nothing_and_stillness_pass_no_law(law):
    case = make_cases(laws.LAWS[law].kinds, 1)[0]
    empty = np.full_like(case.truth, 235)
    verdict = laws.judge(law, empty, case.fps, case.wanted)
    assert not verdict.passed
    assert not verdict.evaluable
    assert not laws.judge(law, np.repeat(case.truth[:1], 17, 0), case.fps, case.wanted).passed


def test_gravity_on_the_moon_follows_the_words():
    episodes = [WORLDS["phys2d"].sample(seed, kind="fall", wish={"moon": True}) for seed in TEST_SEEDS[:6]]
    for episode in episodes:
        scene = episode.tags["scene"]
        assert scene["moon"]
        assert laws.judge("gravity", episode.video, episode.fps, scene).passed
        assert not laws.judge("gravity", episode.video, episode.fps, {**scene, "moon": False}).passed


def test_another_frame_rate_is_another_gravity():
    case = make_cases(("parabola",), 1)[0]
    assert laws.judge("gravity", case.truth, 8.0, case.wanted).passed
    assert not laws.judge("gravity", case.truth, 12.0, case.wanted).passed


def test_laws_do_not_depend_on_the_frame_size():
    for size in ((96, 96), (64, 112), (112, 64)):
        for law in ("gravity", "inertia", "momentum", "permanence", "steady", "paint", "bites"):
            cases = make_cases(laws.LAWS[law].kinds, 4, size=size)
            verdicts = [laws.judge(law, c.truth, c.fps, c.wanted).passed for c in cases]
            assert sum(verdicts) >= 3, f"{law} at {size}"


def test_the_gate_needs_the_worded_area():
    case = make_cases(("slide",), 1)[0]
    thing = case.wanted["objects"][0]
    other = {**thing, "size": "small" if thing["size"] != "small" else "large"}
    assert laws.judge("inertia", case.truth, 8.0, case.wanted).passed
    assert not laws.judge("inertia", case.truth, 8.0, {**case.wanted, "objects": [other]}).evaluable


def test_squeezing_every_other_frame_is_not_steady():
    for case in make_cases(("slide",), 5):
        reading = Reading(case.truth, 8.0)
        found = reading.tracks[case.wanted["objects"][0]["color"]]
        clip = case.truth.copy()
        for t in range(1, 17, 2):
            if found.valid[t]:
                centre = np.array([found.y[t], found.x[t], 0]) * 64 - 0.5
                scale = np.array([1.25, 0.8, 1.0])
                clip[t] = scipy.ndimage.affine_transform(clip[t], scale, centre - scale * centre, order=1, mode="nearest")
        assert not laws.judge("steady", clip, 8.0, case.wanted).passed


def test_line_bounces_and_flights():
    t = np.arange(5) / 8
    assert line(t, 2 + 3 * t) == (pytest.approx(3), pytest.approx(2))
    y = np.abs(np.sin(np.arange(24) / 24 * 3 * np.pi))
    assert len(bounces(y)) == 2 + (y[-1] < y[-3] - 0.02)
    assert bounces(np.linspace(0.1, 0.8, 9)) == []
    falling = np.concatenate(
        [np.square(np.arange(5.0)) * 0.03, 0.48 - np.arange(1, 5) * 0.1 + np.square(np.arange(1, 5)) * 0.03]
    )
    runs = flights(falling, np.ones(9, bool), 0.02)
    assert next(list(run) for run in runs if len(run) > 1) == [0, 1, 2, 3]
    assert list(runs[-1]) == [5, 6, 7, 8]


def test_bad_requests_are_refused():
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="no law"):
        laws.judge("karma", clip, 8.0, {})
    with pytest.raises(UserError, match="positive"):
        laws.judge("gravity", clip, 0.0, {})
    with pytest.raises(UserError, match="uint8"):
        laws.judge("gravity", clip.astype(float), 8.0, {})
    with pytest.raises(UserError, match="no world"):
        world_of("levitation")
    assert np.isnan(laws.rate([])).all()
