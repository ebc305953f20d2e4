from __future__ import annotations

import math

import pytest
import torch

from tubelet.nn.positions import RotaryEmbedding, grid_positions, rotate, sincos


def test_grid_positions_run_last_axis_fastest() -> None:
    assert grid_positions(2, 1, 3).tolist() == [[t, 0.0, w] for t in (0.0, 1.0) for w in (0.0, 1.0, 2.0)]


def test_rotation_depends_on_relative_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 12, 20, generator=generator).double() for _ in "qk")
    rope, grid = RotaryEmbedding((4, 6, 6)), grid_positions(3, 2, 2)

    def scores(positions: torch.Tensor) -> torch.Tensor:
        angles = rope(positions)
        return rotate(q, angles) @ rotate(k, angles).transpose(-1, -2)

    base = scores(grid)
    torch.testing.assert_close(scores(grid + torch.tensor([5.0, -3.25, 0.5])), base, atol=1e-5, rtol=0)
    for axis in range(3):
        stretched = grid.clone()
        stretched[:, axis] *= 2
        assert (scores(stretched) - base).abs().max() > 0.1, f"axis {axis} has no effect"


def test_rotation_keeps_length_and_leaves_the_rest_alone() -> None:
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, RotaryEmbedding((4, 4, 4))(torch.rand(4, 3) * 50))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 12:], x[..., 12:])


def test_one_pair_turns_by_its_angle() -> None:
    turned = rotate(torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), RotaryEmbedding((2,))(torch.tensor([[0.7]])))
    torch.testing.assert_close(turned.flatten(), torch.tensor([math.cos(0.7), math.sin(0.7)]))


def test_positions_may_differ_per_sample() -> None:
    rope, positions = RotaryEmbedding((4, 2, 2)), torch.rand(2, 5, 3) * 9
    x = torch.randn(2, 3, 5, 8)
    singles = torch.cat([rotate(x[i : i + 1], rope(positions[i])) for i in range(2)])
    torch.testing.assert_close(rotate(x, rope(positions)), singles)


def test_sincos_values() -> None:
    out = sincos(4, torch.tensor([[0.0, 3.0]]))
    expected = [math.sin(3), math.sin(3 / 100), math.cos(3), math.cos(3 / 100)]
    torch.testing.assert_close(out, torch.tensor([[[0.0, 0.0, 1.0, 1.0], expected]]))


def test_odd_widths_are_refused() -> None:
    with pytest.raises(AssertionError, match="even"):
        RotaryEmbedding((3, 2, 2))
    with pytest.raises(AssertionError, match="even"):
        sincos(5, torch.zeros(1))


def test_each_coordinate_turns_its_own_share_of_the_head() -> None:
    """Frequencies 100^(-2i/width) of t, then of h, then of w: what shipped weights were trained with."""
    cos, sin = RotaryEmbedding((2, 4, 4))(torch.tensor([[1.0, 2.0, 3.0]]))
    angles = torch.tensor([1.0, 2.0, 0.2, 3.0, 0.3])
    torch.testing.assert_close(cos.flatten(), angles.cos())
    torch.testing.assert_close(sin.flatten(), angles.sin())
