"""Space-to-depth and the causal layers of `nn/conv.py` against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tubelet.nn.conv import (
    CausalMix,
    ExpandFrames,
    MergeFrames,
    ResidualBlock,
    Stream,
    depth_to_space,
    fold_frames,
    space_to_depth,
    unfold_frames,
)


@pytest.mark.parametrize("size", [2, 4])
def test_space_to_depth_is_a_bijection_of_patches(size: int) -> None:
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    deep = space_to_depth(x, size)
    assert deep.shape == (2, 3 * size * size, 8 // size, 12 // size)
    torch.testing.assert_close(depth_to_space(deep, size), x)
    patch = x[1, :, size : 2 * size, :size].permute(1, 2, 0).flatten()  # (y, x, C)
    torch.testing.assert_close(deep[1, :, 1, 0], patch)
    reference = F.pixel_unshuffle(x, size).unflatten(1, (3, size * size)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(deep, reference)
    assert deep.is_contiguous(memory_format=torch.channels_last)


def test_folding_frames() -> None:
    x = torch.randn(2, 3, 5, 4, 4)
    folded = fold_frames(x)
    torch.testing.assert_close(folded[1 * 5 + 2], x[1, :, 2])
    torch.testing.assert_close(unfold_frames(folded, 2), x)


def test_residual_block_keeps_frames_and_cells_apart_in_its_norm() -> None:
    block = ResidualBlock(8)
    with torch.no_grad():
        block.up.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # 1x1 convolutions
        block.down.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        x = torch.randn(3, 8, 4, 4)
        changed = x.clone()
        changed[1, :, 2, 2] *= 100
        difference = (block(changed) - block(x)).abs().amax(1) > 0
    assert difference.nonzero().tolist() == [[1, 2, 2]]


def test_causal_mix_starts_as_the_identity_and_is_a_causal_window() -> None:
    mix = CausalMix(4, 3)
    x = torch.randn(2 * 6, 4, 2, 2)
    torch.testing.assert_close(mix(x, 2), x)
    torch.nn.init.normal_(mix.mix.weight)
    y = mix(x, 2).unflatten(0, (2, 6))
    changed = x.clone()
    changed[2] += torch.randn(4, 2, 2)  # clip 0, frame 2
    moved = (mix(changed, 2).unflatten(0, (2, 6)) - y).abs().amax((2, 3, 4)) > 1e-6
    assert moved.nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_merge_and_expand_group_frames(stride: int) -> None:
    torch.manual_seed(0)
    merge, expand = MergeFrames(3, 5, stride), ExpandFrames(5, 3, stride)
    x = torch.randn(2, 1 + 2 * stride, 2, 2, 3)
    z = merge(x)
    assert z.shape == (2, 3, 2, 2, 5)
    group = torch.cat([x[:, 1 + stride + i] for i in range(stride)], dim=-1)
    torch.testing.assert_close(z[:, 2], merge.group(group))
    first = merge.first if merge.first is not None else merge.group
    torch.testing.assert_close(z[:, 0], first(x[:, 0]))
    y = expand(z)
    assert y.shape == x.shape
    torch.testing.assert_close(y[:, -1], expand.group(z[:, 2])[..., -3:])
    stream = Stream()
    head = merge(x[:, :1], stream)
    stream.begun = True
    torch.testing.assert_close(torch.cat([head, merge(x[:, 1:], stream)], dim=1), z)
