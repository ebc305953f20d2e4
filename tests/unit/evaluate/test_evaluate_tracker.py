from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.ndimage

from tubelet.core.errors import UserError
from tubelet.evaluate import tracker
from tubelet.evaluate.reading import Reading
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import AREA, PALETTE, RADIUS, SHAPES, TEST_SEEDS, WALL


def film(shape: str, size: str, colour: str, side: int = 64, angles: tuple[float, ...] = (0.1, 0.5, 0.9, 1.3)) -> np.ndarray:
    """Frames with the object at sub-pixel places, turned by the given angles."""
    frames = []
    for t, angle in enumerate(angles):
        centre = (side * 0.4 + 1.37 * t, side * 0.5 - 0.61 * t)
        cover = tracker.drawn(shape, RADIUS[size] * side, angle, side, centre)[..., None]
        frames.append(np.array(WALL) * (1 - cover) + np.array(PALETTE[colour]) * cover)
    return (np.stack(frames) + 0.5).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", list(RADIUS))
@pytest.mark.parametrize("side", [48, 64, 96])
def test_place_area_shape_and_size_are_read(shape, size, side):
    for colour in PALETTE:
        clip = film(shape, size, colour, side)
        found = tracker.track(clip)
        assert list(found) == [colour]
        one = found[colour]
        assert one.valid.all()
        steps = np.arange(4)
        # A turned triangle has its centroid at its centre, as all the shapes have.
        np.testing.assert_allclose(one.x * side, side * 0.4 + 1.37 * steps, atol=0.25)
        np.testing.assert_allclose(one.y * side, side * 0.5 - 0.61 * steps, atol=0.25)
        np.testing.assert_allclose(one.area, AREA[shape] * RADIUS[size] ** 2, rtol=0.12)
        assert tracker.shape_and_size(one) == (shape, size)
        assert tracker.trackable(one, shape, size)


def test_sixteen_pixels_are_enough_for_colours_and_sizes():
    # The smallest ring is a pixel wide here: of its blurred template nothing is left.
    for size in RADIUS:
        found = tracker.track(film("ball", size, "blue", 16))["blue"]
        assert tracker.shape_and_size(found) is not None
        assert tracker.shape_and_size(found)[1] == size


def test_box_edges_are_sub_pixel():
    one = tracker.track(film("square", "large", "blue", angles=(0.0, 0.0)))["blue"]
    half = 0.86 * 0.14 * 64
    np.testing.assert_allclose(one.left * 64, [25.6 - half, 26.97 - half], atol=0.2)
    np.testing.assert_allclose(one.right * 64, [25.6 + half, 26.97 + half], atol=0.2)
    np.testing.assert_allclose(one.top * 64, [32 - half, 31.39 - half], atol=0.2)


def test_exact_state_of_the_world_is_found():
    for seed in TEST_SEEDS[:12]:
        episode = WORLDS["phys2d"].sample(seed, kind="parabola")
        one = tracker.track(episode.video)[episode.tags["objects"][0]["color"]]
        whole = one.valid
        assert whole.sum() >= 8
        assert np.abs(one.x - episode.state["x"][:, 0])[whole].max() < 0.006
        assert np.abs(one.y - episode.state["y"][:, 0])[whole].max() < 0.006


@pytest.mark.parametrize("wrong_size", [s for s in RADIUS if s != "medium"])
def test_the_gate_refuses_a_wrong_area(wrong_size):
    one = tracker.track(film("ball", "medium", "red"))["red"]
    assert tracker.trackable(one, "ball", "medium")
    assert not tracker.trackable(one, "ball", wrong_size)


def test_what_vanishes_or_comes_from_nowhere_is_no_object():
    there = film("ball", "medium", "red", angles=(0.0,) * 12)
    bare = np.broadcast_to(np.array(WALL, np.uint8), there.shape)
    assert not tracker.gone(tracker.track(there)["red"]).any()
    for seen in (slice(0, len(there) // 2), slice(len(there) // 2, None), slice(None, None, 2)):
        clip = bare.copy()
        clip[seen] = there[seen]
        one = tracker.track(clip)["red"]
        assert np.array_equal(tracker.gone(one), ~one.present)
        assert tracker.trackable(one), "wherever it is seen it is whole"
        assert not Reading(clip, 8.0).trackable(one)


def test_what_leaves_the_frame_or_enters_it_is_not_lost():
    for seed in TEST_SEEDS[:20]:
        for size in ((64, 64), (64, 112)):
            for kind in ("slide", "parabola", "collision", "billiard"):
                episode = WORLDS["phys2d"].sample(seed, *size, kind=kind)
                named = {thing["color"] for thing in episode.tags["objects"]}
                tracks = tracker.track(episode.video, sorted(named))
                assert not any(tracker.gone(one).any() for one in tracks.values())


def test_two_blobs_of_one_colour_are_no_object():
    clip = np.minimum(film("ball", "small", "red"), np.roll(film("ball", "small", "red"), 20, axis=2))
    one = tracker.track(clip)["red"]
    assert not one.valid.any()
    assert not tracker.trackable(one)


def test_an_object_cut_by_the_border_is_not_inside():
    clip = np.roll(film("ball", "large", "green"), -24, axis=2)
    clip[:, :, 40:] = WALL
    one = tracker.track(clip)["green"]
    assert one.present.all()
    assert not one.inside.any()


def test_missing_colours_are_reported_as_absent():
    one = tracker.track(film("ball", "large", "green"), ["pink"])["pink"]
    assert not one.present.any()
    assert np.isnan(one.x).all()
    assert not tracker.trackable(one)
    assert tracker.shape_and_size(one) is None


@pytest.mark.parametrize("seed", range(6))
def test_largest_blob_agrees_with_scipy(seed):
    mask = np.random.RandomState(seed).rand(37, 53) < (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)[seed]
    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    sizes = scipy.ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    blob, share = tracker.largest_blob(mask)
    assert share == pytest.approx(sizes.max() / sizes.sum())
    assert blob is not None
    assert blob.sum() == sizes.max()
    assert (labels[blob] == labels[blob][0]).all()


def test_largest_blob_of_nothing_of_one_and_with_specks():
    mask = np.zeros((8, 9), bool)
    assert tracker.largest_blob(mask) == (None, 0.0)
    mask[2:5, 2:5] = True
    assert tracker.largest_blob(mask) == (None, 1.0)
    mask[7, 8] = True
    assert tracker.largest_blob(mask)[1] == pytest.approx(0.9)
    assert tracker.largest_blob(mask, speck=1)[1] == 1.0


def test_turning_rigidly_keeps_the_outline_and_changing_shape_does_not():
    turning = tracker.track(film("square", "large", "blue", angles=(0.0, 0.3, 0.6, 0.9)))["blue"]
    assert tracker.aligned_overlap(turning, np.arange(4), 0.9).min() > 0.9
    square, triangle = film("square", "large", "blue"), film("triangle", "large", "blue")
    square[1::2] = triangle[1::2]
    morphing = tracker.track(square)["blue"]
    assert tracker.aligned_overlap(morphing, np.arange(4), 0.9).max() < 0.82


@pytest.mark.parametrize(
    "clip",
    [np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8, 4), np.uint8), np.zeros((3, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)],
)
def test_bad_clips_are_refused(clip):
    with pytest.raises(UserError, match="uint8"):
        tracker.track(clip)


def test_unknown_colours_are_refused():
    with pytest.raises(UserError, match="beige"):
        tracker.track(film("ball", "large", "green"), ["beige"])


def test_tracking_is_quick():
    clips = [WORLDS["phys2d"].sample(seed).video for seed in TEST_SEEDS[:20]]
    tracker.track(clips[0])
    start = time.process_time()
    for clip in clips:
        tracker.track(clip)
    # 150 clips a second on a free core; a third of it is asked for, since test machines are shared.
    assert len(clips) / (time.process_time() - start) > 50
