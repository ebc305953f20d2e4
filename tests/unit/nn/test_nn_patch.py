from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.nn.patch import patch_positions, patchify, token_grid, unpatchify


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_round_trip(patch: tuple[int, int, int], k: int) -> None:
    z = torch.randn(2, 3, 1 + k * patch[0], 4, 6)
    tokens, grid = patchify(z, patch), token_grid((z.shape[2], 4, 6), patch)
    assert grid == (1 + k, 4 // patch[1], 6 // patch[2])
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], patch[0] * patch[1] * patch[2] * 3)
    assert torch.equal(unpatchify(tokens, grid, patch), z)


def test_order_inside_a_token_and_the_first_patch_repeats_frame_zero() -> None:
    z = torch.arange(2 * 3 * 2 * 2).reshape(1, 2, 3, 2, 2).float()
    tokens = patchify(z, (2, 2, 2))
    for token, frames in ((0, (0, 0)), (1, (1, 2))):
        expected = [z[0, c, f, y, x].item() for f in frames for y in range(2) for x in range(2) for c in range(2)]
        assert tokens[0, token].tolist() == expected


def test_an_image_is_the_first_patch_of_a_video() -> None:
    z = torch.randn(1, 4, 5, 4, 4)
    assert torch.equal(patchify(z[:, :, :1], (4, 2, 2)), patchify(z, (4, 2, 2))[:, :4])


def test_positions_are_the_centres_of_what_a_token_covers() -> None:
    grid, patch = (3, 2, 2), (4, 2, 3)
    cells = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(4.0), torch.arange(6.0), indexing="ij"))
    centres = patchify(cells[None], patch).unflatten(-1, (-1, 3)).mean(2)[0]
    torch.testing.assert_close(patch_positions(grid, patch), centres)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4, 4), "latent frames must be 1 . a multiple of 2, got 4: try 3 or 5"),
        ((0, 4, 4), "got 0: try 1 or 3"),
        ((3, 5, 4), "latent height must be a multiple of 2, got 5: try 4 or 6"),
        ((3, 4, 0), "latent width must be a multiple of 2, got 0: try 2 or 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        patchify(torch.zeros(1, 1, *shape), (2, 2, 2))


def test_tokens_must_fill_the_grid() -> None:
    with pytest.raises(AssertionError, match="do not fill"):
        unpatchify(torch.zeros(1, 5, 4), (1, 2, 2), (1, 2, 2))
