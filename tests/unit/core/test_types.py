"""Plain values: strides, videos, conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tubelet.core.errors import UserError
from tubelet.core.types import Condition, Strides, Video


@given(st.integers(1, 4), st.integers(1, 16), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_strides_and_back(t: int, s: int, k: int, h: int, w: int) -> None:
    strides = Strides(t, s, s)
    assert strides.latent_shape(1 + k * t, h * s, w * s) == (1 + k, h, w)
    assert strides.pixel_shape(1 + k, h, w) == (1 + k * t, h * s, w * s)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((0, 64, 64), "frames must be 1 + a multiple of 4"),
        ((16, 64, 64), "try 13 or 17"),
        ((17, 60, 64), "height must be a positive multiple of 8, got 60: try 56 or 64"),
        ((17, 64, 0), "width must be a positive multiple of 8"),
        ((17, -8, 64), "height"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UserError) as caught:
        Strides(4, 8, 8).latent_shape(*size)
    assert words in str(caught.value)


def test_without_a_stride_in_time_any_number_of_frames_fits_but_none() -> None:
    assert Strides(1, 8, 8).latent_shape(7, 64, 64) == (7, 8, 8)
    with pytest.raises(UserError, match="frames must be at least 1, got 0; ask for more"):
        Strides(1, 8, 8).latent_shape(0, 64, 64)


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(3, axis=3)
    video = Video.from_uint8(frames, 8.0)
    assert video.pixels.shape == (1, 3, 2, 8, 16)
    assert video.pixels.min() == -1
    assert video.pixels.max() == 1
    assert (video.to_uint8()[0] == frames).all()
    assert (video.frames, video.size, len(video)) == (2, (8, 16), 1)


def test_values_outside_are_clipped_not_wrapped() -> None:
    pixels = torch.full((1, 3, 1, 2, 2), 1.5)
    pixels[..., 0] = -1.5
    assert set(np.unique(Video(pixels, 8.0).to_uint8()).tolist()) == {0, 255}


def test_conditions_of_different_lengths_join_with_masked_padding() -> None:
    a = Condition(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    b = Condition(torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
    both = Condition.cat([a, b])
    assert both.states.shape == (3, 5, 4)
    assert both.mask.sum(1).tolist() == [2, 5, 5]
    assert both.states[0, 2:].abs().sum() == 0
    assert len(both[1:]) == 2
