"""Every world: the same bytes from a seed in every process, any size and length, colours and words that anyone can read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.worlds import WORLDS, Episode, foreground, grammar
from tubelet.worlds.constants import TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS

DIGEST = """
import hashlib, json
from tubelet.worlds import WORLDS
from tubelet.worlds.violate import VIOLATIONS, violate
h = hashlib.sha256()
for world in WORLDS.values():
    for split in world.splits:
        for seed in (0, 1, 2**31 + 5, 2**32 - 1):
            e = world.sample(seed, 24, 32, 9, 4.0, split=split)
            h.update(e.video.tobytes())
            h.update(json.dumps([e.short, e.dense, e.human, e.events, e.tags], sort_keys=True).encode())
            for name, value in e.state.items():
                h.update(name.encode() + value.tobytes())
for law, controls in VIOLATIONS.items():
    for control, violation in controls.items():
        h.update(violate(violation.world, law, control, 7, 24, 24, 9, 4.0).video.tobytes())
print(h.hexdigest())
"""


def test_same_bytes_in_every_process_and_for_every_hash_seed() -> None:
    digests = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("name", list(WORLDS))
def test_global_random_state_is_neither_read_nor_written(name: str) -> None:
    np.random.seed(1)
    before = WORLDS[name].sample(3, 16, 16).video
    state = np.random.get_state()[1]
    np.random.seed(2)
    assert (WORLDS[name].sample(3, 16, 16).video == before).all()
    np.random.seed(1)
    assert (np.asarray(np.random.get_state()[1]) == np.asarray(state)).all()


@pytest.mark.parametrize("name", list(WORLDS))
@pytest.mark.parametrize(
    ("height", "width", "frames", "fps"),
    [(64, 64, 17, 8.0), (16, 16, 1, 8.0), (40, 96, 5, 3.5), (90, 32, 3, 24.0), (17, 19, 40, 30.0)],
)
def test_any_size_and_length(name: str, height: int, width: int, frames: int, fps: float) -> None:
    world = WORLDS[name]
    for kind in world.kinds:
        e = world.sample(11, height, width, frames, fps, kind=kind)
        assert isinstance(e, Episode)
        assert e.video.shape == (frames, height, width, 3)
        assert e.video.dtype == np.uint8
        assert e.fps == fps
        assert e.camera.shape == (frames, 4)
        assert len(e.state["seconds"]) == frames
        assert all(np.isfinite(value).all() for value in e.state.values())
        assert all(0 <= t <= (frames - 1) / fps for t, _, _ in e.events)
        assert e.events == sorted(e.events)
        assert foreground(e.video).shape == (frames, height, width)
        json.dumps(e.tags)


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_catalogue(name: str) -> None:
    world = WORLDS[name]
    assert world.name == name
    assert "train" in world.splits
    assert "held_out" in world.splits
    for kind in world.kinds:
        e = world.sample(0, 16, 16, kind=kind)
        assert e.tags["kind"] == kind
        assert e.tags["world"] == name
        assert e.tags["seed"] == 0
        assert e.tags["scene"] == grammar.parse(e.short)
    with pytest.raises(UserError):
        world.sample(0, kind="nothing")
    with pytest.raises(UserError):
        world.sample(0, split="nothing")


@pytest.mark.parametrize("name", list(WORLDS))
def test_seeds_give_different_clips(name: str) -> None:
    seen = {hashlib.sha256(WORLDS[name].sample(seed, 24, 24).video.tobytes()).hexdigest() for seed in range(120)}
    assert len(seen) == 120


def test_seed_ranges_do_not_meet() -> None:
    assert TRAIN_SEEDS[0] == 0
    assert TRAIN_SEEDS[-1] + 1 == VALIDATION_SEEDS[0] == 2**31
    assert VALIDATION_SEEDS[-1] + 1 == TEST_SEEDS[0]
    assert TEST_SEEDS[-1] == 2**32 - 1


def test_the_foreground_is_the_objects() -> None:
    for seed in range(20):
        e = WORLDS["phys2d"].sample(seed, 64, 64)
        area = (e.state["visible"] * e.state["mass"]).sum(1)
        np.testing.assert_allclose(foreground(e.video).mean((1, 2)), area, rtol=0.2, atol=0.004)


@pytest.mark.parametrize("name", list(WORLDS))
def test_clips_come_fast_enough_for_training(name: str) -> None:
    world = WORLDS[name]
    world.sample(0)
    best = 1e9
    for _ in range(3):
        start = time.process_time()
        for seed in range(12):
            world.sample(seed)
        best = min(best, (time.process_time() - start) / 12)
    assert 1 / best > 60, f"{1 / best:.0f} clips a second of one core; 200 and more are meant"
