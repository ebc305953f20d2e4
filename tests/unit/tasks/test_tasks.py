"""Known cells come out as they went in, what is to be made is made, and every task says the same in one form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.diffusion.paths import RECTIFIED_FLOW, uniform_sigmas
from tubelet.diffusion.solvers import SOLVERS
from tubelet.tasks.edit import blend, edit
from tubelet.tasks.frames import between, connect, extend, extend_backward, from_image, windows
from tubelet.tasks.given import Given, conditioned
from tubelet.tasks.loop import cyclic
from tubelet.tasks.masks import MASKS, check_shares, draw_name
from tubelet.tasks.region import cells, inpaint, put_back


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, frames, 4, 4, generator=rng(seed))


TASKS = {
    "image": lambda: from_image(clip(1), 5),
    "between": lambda: between(clip(1), clip(1, 1), 5),
    "extend": lambda: extend(clip(3), 5),
    "extend_hazy": lambda: extend(clip(3), 5, haze=0.1),
    "backward": lambda: extend_backward(clip(2), 5),
    "connect": lambda: connect(clip(2), clip(1, 1), 2),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler", "heun"])
def test_known_cells_come_out_as_they_went_in(name: str, solver: str) -> None:
    given = TASKS[name]()
    assert given.clean.shape == (2, 3, 5, 4, 4)
    noise = torch.randn(given.clean.shape, generator=rng(9))
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        seen.append((z, sigma))
        return z * 0.5 + 1

    sigmas = uniform_sigmas(4)
    film = SOLVERS[solver].solve(conditioned(denoise, given, noise), given.start(noise), sigmas, path=RECTIFIED_FLOW)
    known = (given.mask == 0)[:, None].expand_as(film)
    assert known.any()
    torch.testing.assert_close(film[known], given.clean[known], atol=1e-6, rtol=0)
    assert not torch.allclose(film[~known], noise[~known])
    for z, sigma in seen:
        assert sigma.shape == given.mask.shape
        level = min(given.haze, float(sigma.max()))
        torch.testing.assert_close(sigma[given.mask == 0].unique(), torch.tensor([level], dtype=sigma.dtype))
        shown = (1 - level) * given.clean + level * noise
        torch.testing.assert_close(z[known].float(), shown[known], atol=1e-6, rtol=0)


def test_parts_stand_where_they_belong() -> None:
    a, b = clip(2), clip(1, 1)
    given = connect(a, b, 2)
    assert given.mask[0, :, 0, 0].tolist() == [0, 0, 1, 1, 0]
    assert torch.equal(given.clean[:, :, :2], a)
    assert torch.equal(given.clean[:, :, 4:], b)
    assert extend_backward(a, 5).mask[0, :, 0, 0].tolist() == [1, 1, 1, 0, 0]
    assert between(b, b, 4).mask[0, :, 0, 0].tolist() == [0, 1, 1, 0]


def test_nothing_to_make_or_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="nothing is left to make"):
        extend(clip(5), 5)
    with pytest.raises(UserError, match="at least 1 latent frame"):
        between(clip(1), clip(1), 2)
    with pytest.raises(UserError, match="of one size"):
        connect(clip(1), clip(1)[..., :2], 2)
    with pytest.raises(UserError, match="must be finite"):
        from_image(clip(1) * float("nan"), 3)
    with pytest.raises(UserError, match="mask \\(B, T, H, W\\)"):
        Given(clip(2), torch.ones(2, 2, 4, 3))
    with pytest.raises(UserError, match="strength in"):
        edit(clip(2), 0.0)


def test_an_edit_starts_between_the_film_and_noise() -> None:
    film, noise = clip(3), clip(3, 5)
    torch.testing.assert_close(edit(film, 0.25).start(noise), 0.75 * film + 0.25 * noise)
    mixed = blend(film, noise, 0.5).clean
    assert torch.equal(mixed[:, :, 0], film[:, :, 0])
    assert torch.equal(mixed[:, :, -1], noise[:, :, -1])
    with pytest.raises(UserError, match="one size"):
        blend(film, clip(2), 0.5)


def test_a_loop_is_the_same_film_wherever_it_is_cut() -> None:
    """A network that smooths along time with zero ends leaves a seam; turned films have none in expectation."""

    def smooth(z: Tensor, sigma: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, 0, 0, 0, 1, 1))
        return (padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]) / 3

    flat = torch.ones(1, 1, 8, 1, 1)
    sigma = torch.tensor(0.5)
    once = smooth(flat, sigma)[0, 0, :, 0, 0]
    assert once[0] < 0.7 < once[3]
    turned = cyclic(smooth, 8, [rng()])
    mean = torch.stack([turned(flat, sigma) for _ in range(400)]).mean(0)[0, 0, :, 0, 0]
    assert float(mean.max() - mean.min()) < 0.06
    frames = torch.arange(8.0).view(1, 1, 8, 1, 1)
    two = torch.cat([frames, frames + 1])
    assert torch.equal(cyclic(lambda z, s: z, 8, [rng(1), rng(2)])(two, sigma), two)
    seen: list[Tensor] = []
    cyclic(lambda z, s: seen.append(z) or z, 8, [rng(1), rng(2)])(two, sigma)
    alone: list[Tensor] = []
    cyclic(lambda z, s: alone.append(z) or z, 8, [rng(2)])(two[1:], sigma)
    assert torch.equal(seen[0][1:], alone[0]), "a batch of two is two singles"


def test_windows_cover_a_film_and_overlap() -> None:
    spans = windows(170, 17, 2)
    assert spans[0] == (0, 17)
    assert spans[-1][1] == 170
    assert all(after[0] == before[1] - 2 for before, after in itertools.pairwise(spans))
    assert windows(5, 17, 2) == [(0, 5)]
    with pytest.raises(UserError, match="cannot overlap"):
        windows(20, 4, 4)


@pytest.mark.parametrize("strides", [Strides(1, 8, 8), Strides(4, 8, 8)])
def test_a_cell_is_made_anew_if_any_of_its_pixels_is(strides: Strides) -> None:
    mask = torch.zeros(1, 9, 16, 24)
    mask[0, 6, 8, 17] = 1.0
    small = cells(mask, strides)
    T = 9 if strides.t == 1 else 3
    assert small.shape == (1, T, 2, 3)
    assert small.sum() == 1
    assert small[0, 6 if strides.t == 1 else 2, 1, 2] == 1
    first = torch.zeros(1, 9, 16, 24)
    first[0, 0] = 1.0
    assert cells(first, strides)[0].flatten(1).amax(1).tolist() == [1.0] + [0.0] * (T - 1)


def test_inpainting_keeps_what_is_outside() -> None:
    film, mask = torch.rand(1, 3, 5, 16, 16), torch.zeros(1, 5, 16, 16)
    mask[:, :, 4:9, 4:9] = 1
    given = inpaint(torch.randn(1, 8, 5, 2, 2), mask, Strides(1, 8, 8))
    assert given.mask[0, 0].tolist() == [[1, 1], [1, 1]]
    back = put_back(torch.zeros_like(film), film, mask)
    assert back[:, :, :, 4:9, 4:9].eq(0).all()
    assert torch.equal(back[..., 9:], film[..., 9:])
    with pytest.raises(UserError, match="covers nothing"):
        inpaint(torch.randn(1, 8, 5, 2, 2), mask * 0, Strides(1, 8, 8))
    with pytest.raises(UserError, match="of the film's size"):
        inpaint(torch.randn(1, 8, 5, 2, 3), mask, Strides(1, 8, 8))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 4, 6), (17, 8, 8)])
def test_a_training_mask_always_leaves_something_to_make(name: str, size: tuple[int, int, int]) -> None:
    for seed in range(12):
        mask = MASKS[name](size, rng(seed))
        assert mask.shape == size
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()
        assert torch.equal(mask, MASKS[name](size, rng(seed)))
    if size[0] == 17 and name != "unconditional":
        assert any((MASKS[name](size, rng(seed)) == 0).any() for seed in range(12))


def test_masks_are_drawn_by_their_shares() -> None:
    g = rng()
    names = [draw_name({"first": 3.0, "box": 1.0, "last": 0.0}, g) for _ in range(800)]
    assert 0.7 < names.count("first") / 800 < 0.8
    assert names.count("last") == 0
    with pytest.raises(UserError, match="no mask 'middle'"):
        check_shares({"middle": 1.0})
    with pytest.raises(UserError, match="not all 0"):
        check_shares({"first": 0.0})
