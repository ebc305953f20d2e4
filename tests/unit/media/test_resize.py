"""Resizing keeps range, means and aspect as it says."""

from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.media.resize import FITS, MODES, resize


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (16, 40), (64, 64), (31, 17), (1, 1)])
def test_shape_range_and_flat_fields(fit, mode, size) -> None:
    pixels = torch.rand(2, 3, 4, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = resize(pixels, size, fit=fit, mode=mode)
    assert small.shape == (2, 3, 4, *size)
    assert float(small.min()) >= -1
    assert float(small.max()) <= 1
    flat = resize(torch.full((1, 3, 2, 24, 40), 0.25), size, fit=fit, mode=mode, background=0.25)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), rtol=0, atol=1e-6)


def test_frames_and_samples_do_not_mix() -> None:
    pixels = torch.rand(2, 3, 3, 20, 20)
    whole = resize(pixels, (7, 9))
    for sample in range(2):
        for frame in range(3):
            one = resize(pixels[sample : sample + 1, :, frame : frame + 1], (7, 9))
            torch.testing.assert_close(whole[sample, :, frame], one[0, :, 0], rtol=0, atol=1e-6)


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard is grey from afar; picking pixels would leave it black or white."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().mul(2).sub(1)
    for mode in MODES:
        small = resize(board.expand(1, 3, 1, 64, 64), (8, 8), mode=mode)
        assert float(small.abs().max()) < 0.05


def test_area_is_the_mean_of_what_a_cell_covers() -> None:
    pixels = torch.rand(1, 3, 2, 12, 20)
    expected = pixels.reshape(1, 3, 2, 3, 4, 5, 4).mean((4, 6))
    torch.testing.assert_close(resize(pixels, (3, 5), mode="area"), expected)


def test_crop_keeps_the_middle_and_pad_keeps_all() -> None:
    pixels = torch.full((1, 3, 1, 16, 32), -0.5)
    pixels[..., 8:24] = 0.5
    assert bool((resize(pixels, (16, 16)) == 0.5).all())
    padded = resize(pixels, (32, 32), fit="pad")
    assert bool((padded[..., :8, :] == -1).all())
    assert bool((padded[..., 24:, :] == -1).all())
    torch.testing.assert_close(padded[..., 8:24, :], pixels, rtol=0, atol=1e-6)
    assert float(resize(pixels, (16, 16), fit="stretch")[0, 0, 0, 0, 0]) == pytest.approx(-0.5, abs=0.01)


def test_a_turned_picture_is_resized_alike() -> None:
    pixels = torch.rand(1, 3, 1, 24, 36)
    turned = resize(pixels.transpose(3, 4), (20, 12)).transpose(3, 4)
    torch.testing.assert_close(resize(pixels, (12, 20)), turned, rtol=0, atol=1e-5)


def test_wrong_input() -> None:
    pixels = torch.zeros(1, 3, 1, 8, 8)
    for wish in ({"size": (0, 4)}, {"size": (4, 4), "fit": "squeeze"}, {"size": (4, 4), "mode": "nearest"}):
        with pytest.raises(UserError):
            resize(pixels, **wish)
    with pytest.raises(AssertionError):
        resize(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8), (4, 4))
