"""VDT's blocks and its mixture; what is known beside the noise; masks of cells as pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tubelet.core.types import Strides
from tubelet.diffusion.paths import VPLinear, zero_terminal_snr
from tubelet.diffusion.solvers import SOLVERS
from tubelet.generate.layouts import Chain
from tubelet.tasks.given import Given, kept
from tubelet.tasks.masks import MASKS, RELEASED, draw_name
from tubelet.tasks.region import cells, in_pixels


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_blocks_leave_half_of_the_middle_frames_to_make() -> None:
    g, begins, ends = rng(), set(), set()
    for _ in range(200):
        mask = MASKS["blocks"]((17, 8, 8), g)
        made = mask.flatten(1).any(1).nonzero()[:, 0].tolist()
        assert made == list(range(made[0], made[-1] + 1))
        assert bool((mask[made] == mask[made[0]]).all()), "the same blocks in every frame"
        assert 24 <= mask[made[0]].sum() <= 32
        begins.add(made[0])
        ends.add(16 - made[-1])
    assert begins == ends == {0, 1, 2, 3}


def test_blocks_are_blocks_and_not_scattered_cells() -> None:
    g = rng()
    for _ in range(100):
        mask = MASKS["blocks"]((1, 8, 8), g)[0]
        beside = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        neighbours = beside[:-2, 1:-1] + beside[2:, 1:-1] + beside[1:-1, :-2] + beside[1:-1, 2:]
        assert (neighbours[mask > 0] == 0).float().mean() < 0.1


def test_a_frame_too_small_for_blocks_is_made_as_a_whole() -> None:
    assert MASKS["blocks"]((5, 1, 1), rng()).all()


def test_the_released_mixture_is_one_film_in_five_of_blocks_and_the_six_recipes_alike() -> None:
    assert list(RELEASED) == ["predict", "backward", "interpolate", "unconditional", "one_frame", "some_frames", "blocks"]
    assert sum(RELEASED.values()) == pytest.approx(1)
    g = rng()
    names = [draw_name(RELEASED, g) for _ in range(1500)]
    assert 0.16 < names.count("blocks") / 1500 < 0.24
    assert all(0.1 < names.count(name) / 1500 < 0.17 for name in RELEASED if name != "blocks")


@pytest.mark.parametrize("strides", [Strides(1, 8, 8), Strides(4, 2, 4)])
def test_pixels_of_cells_are_those_that_lead_back_to_them(strides: Strides) -> None:
    small = (torch.rand(2, 5, 3, 4, generator=rng()) < 0.5).float()
    wide = in_pixels(small, strides)
    assert wide.shape == (2, *strides.pixel_shape(5, 3, 4))
    assert torch.equal(cells(wide, strides), small)


def test_what_is_known_beside_the_noise_is_noised_as_the_rest_and_comes_out_as_it_went_in() -> None:
    path = zero_terminal_snr(VPLinear())
    clean, mask = torch.randn(2, 3, 5, 4, 4, generator=rng()), torch.ones(2, 5, 4, 4)
    mask[:, :2] = 0
    noise, seen = torch.randn(clean.shape, generator=rng(1)), []

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        seen.append((z, sigma))
        return 0.1 * z

    sigmas = Chain(path, "v", spacing="trailing").levels(6)
    film = SOLVERS["ddim"].solve(kept(denoise, Given(clean, mask)), noise, sigmas, path=path)
    assert torch.equal(film[:, :, :2], clean[:, :, :2])
    assert len(seen) == 6
    for z, sigma in seen:
        assert sigma.ndim == 0, "one level for all"
        noised = path.alpha(sigma) * clean + path.noise(sigma) * noise
        torch.testing.assert_close(z[:, :, :2], noised[:, :, :2].to(z.dtype), atol=1e-4, rtol=1e-4)
