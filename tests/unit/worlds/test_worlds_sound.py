"""Sound is exact: when, how loud and how high follow from the state, and the same seed sounds the same."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import PHYS2D_KINDS, RADIUS
from tubelet.worlds.sound import CONTROLS, HARDNESS, LATE, PITCH, RATES, Sound, sound

WORLD = WORLDS["phys2d"]


def one(shape: str = "ball", size: str = "medium", color: str = "red") -> dict[str, object]:
    return {"objects": [{"shape": shape, "size": size, "color": color}]}


def deviation(heard: Sound, start: float, end: float) -> float:
    rate = heard.audio.rate
    return float(heard.audio.to_float()[round(start * rate) : round(end * rate)].std())


@pytest.mark.parametrize("kind", PHYS2D_KINDS)
def test_what_is_heard_are_the_impacts_of_the_film(kind: str) -> None:
    for seed in range(6):
        film, heard = WORLD.sample(seed, 32, 32, kind=kind), sound(seed, 32, 32, kind=kind)
        seen = [event for event in film.events if event[1] in HARDNESS]
        assert [(i.seconds, i.kind, i.bodies) for i in heard.impacts][: len(seen)] == seen
        assert all(2.0 < i.seconds < 2.125 for i in heard.impacts[len(seen) :]), "the last frame still stands"
        assert len(heard.audio.samples) == 17_000


@pytest.mark.parametrize("rate", RATES)
def test_a_ring_begins_at_the_sample_of_its_impact(rate: int) -> None:
    for seed in range(12):
        heard = sound(seed, kind="fall", rate=rate)
        first = math.ceil(heard.impacts[0].seconds * rate)
        assert not heard.audio.samples[:first].any(), "what falls is silent"
        assert heard.audio.samples[first : first + 3].any()
        assert len(heard.audio.samples) == 17 * rate // 8


def test_an_impulse_is_mass_times_the_change_of_velocity() -> None:
    for kind in ("bounce", "collision", "billiard", "parabola"):
        for seed in range(4):
            film = WORLD.sample(seed, 32, 32, 2000, 1000.0, kind=kind)
            impacts = sound(seed, 32, 32, 16, 8.0, kind=kind).impacts
            assert impacts
            times = [i.seconds for i in impacts]
            for impact in impacts:
                if sum(abs(impact.seconds - other) < 0.004 for other in times) > 1 or impact.seconds > 1.99:
                    continue
                frame = int(impact.seconds * 1000)
                for body in impact.bodies:
                    v = [np.array([film.state[name][f, body] for name in ("vx", "vy")]) for f in (frame, frame + 1)]
                    change = float(np.hypot(*(v[1] - v[0])))
                    assert film.state["mass"][body] * change == pytest.approx(impact.impulse, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("size", list(RADIUS))
def test_large_things_sound_low(size: str) -> None:
    heard = sound(3, kind="fall", wish=one(size=size), rate=16000)
    first = math.ceil(heard.impacts[0].seconds * 16000)
    ring = heard.audio.to_float()[first : first + 1600]
    spectrum = np.abs(np.fft.rfft(ring, 32_000))  # 0.5 Hz
    assert spectrum.argmax() / 2 == pytest.approx(PITCH / RADIUS[size], rel=0.02)


def test_each_shape_has_a_sound_of_its_own() -> None:
    rings = {}
    for shape in ("ball", "square", "triangle", "ring"):
        heard = sound(3, kind="fall", wish=one(shape))
        first = math.ceil(heard.impacts[0].seconds * 8000)
        spectrum = np.abs(np.fft.rfft(heard.audio.to_float()[first : first + 1600]))
        rings[shape] = spectrum / np.linalg.norm(spectrum)
        assert deviation(heard, heard.impacts[0].seconds + 0.5, 2.125) < 1e-3, "it fades"
    names = list(rings)
    assert max(float(rings[a] @ rings[b]) for a in names for b in names if a < b) < 0.9


def test_a_harder_impact_is_louder_by_the_root_of_its_impulse() -> None:
    compared = 0
    for seed in range(12):
        heard = sound(seed, kind="bounce", wish=one())
        times = [i.seconds for i in heard.impacts]
        if len(times) < 2 or times[1] - times[0] < 0.3:
            continue
        first, second = heard.impacts[:2]
        loud = [deviation(heard, i.seconds, i.seconds + 0.03) for i in (first, second)]
        assert loud[0] / loud[1] == pytest.approx(math.sqrt(first.impulse / second.impulse), rel=0.1)
        compared += 1
    assert compared >= 3


def test_a_way_along_the_floor_is_as_loud_as_it_is_fast() -> None:
    per_speed = []
    for seed in range(12):
        film, heard = WORLD.sample(seed, 32, 32, kind="slide"), sound(seed, 32, 32, kind="slide")
        assert not heard.impacts
        per_speed.append(deviation(heard, 0.0, 0.6) / abs(float(film.state["vx"][0, 0])))
    assert max(per_speed) < 1.25 * min(per_speed)
    assert deviation(sound(0, frames=80, kind="slide"), 9.0, 10.0) == 0, "it has left the frame"
    passing = sound(1, kind="occlude")
    hidden = next(t for t, kind, _ in WORLD.sample(1, 32, 32, kind="occlude").events if kind == "enter")
    assert deviation(passing, hidden, hidden + 0.2) > 0.002, "a panel hides, it does not silence"


def test_a_shorter_film_sounds_like_the_beginning_of_a_longer_one() -> None:
    for kind in ("bounce", "billiard", "slide"):
        short, long = (sound(5, 32, 48, frames, kind=kind).audio.samples for frames in (9, 33))
        assert np.array_equal(long[: len(short)], short)


def test_the_same_seed_is_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from tubelet.worlds.sound import sound;"
        "print(hashlib.sha256(b''.join(sound(s).audio.samples.tobytes() for s in range(14))).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert hashlib.sha256(b"".join(sound(s).audio.samples.tobytes() for s in range(14))).hexdigest() == other.stdout.strip()


def test_controls_are_wrong_in_one_thing() -> None:
    for seed in range(4):
        true = sound(seed, kind="fall")
        false = {control: sound(seed, kind="fall", control=control) for control in CONTROLS}
        assert all(heard.impacts == true.impacts for heard in false.values()), "the truth stays"
        samples = round(LATE * 8000)
        when = round(true.impacts[0].seconds * 8000)
        if when + samples + 800 < 17_000:
            late = false["late"].audio.to_float()[when + samples : when + samples + 800]
            assert np.corrcoef(late, true.audio.to_float()[when : when + 800])[0, 1] > 0.95
        quiet = false["loudness"].audio.to_float()
        assert not quiet[: when - 1].any()
        assert quiet.any()
        assert not np.array_equal(quiet, true.audio.to_float())
    still = sound(1, kind="slide")
    assert all(np.array_equal(sound(1, kind="slide", control=c).audio.samples, still.audio.samples) for c in CONTROLS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rate": 44100}, "8000 or 16000"),
        ({"control": "reversed"}, "no control 'reversed'"),
        ({"kind": "paint"}, "no kind 'paint'"),
        ({"frames": 0}, "at least 1 frame"),
        ({"split": "best"}, "no split 'best'"),
    ],
)
def test_wrong_requests_are_one_sentence(wrong: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sound(0, **wrong)
