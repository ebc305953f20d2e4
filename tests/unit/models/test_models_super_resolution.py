"""VideoPoet's super-resolution: windows, what it reads and does not, its guidance and its noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.super_resolution import (
    COUNTED_TEXT,
    SIZES,
    STAGES,
    SuperResolution,
    SuperResolutionConfig,
    example,
    guided,
    masked_loss,
    resampled,
    stated,
)
from tubelet.nn.subtokens import MASK
from tubelet.nn.window_rows import from_windows, to_windows

FINE = SuperResolutionConfig(32, 4, 1, ((1, 8, 2), (1, 2, 4), (2, 4, 2)), text=24, factor=6)


def fine(config: SuperResolutionConfig = FINE) -> tuple[SuperResolution, Tensor, Tensor, Condition]:
    """A model as after some training; codes (2, 2, 8, 4) of which a part is masked; coarse codes; text."""
    g = torch.Generator().manual_seed(6)
    torch.manual_seed(0)
    model = SuperResolution(config)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    codes, coarse = torch.randint(0, 36, (2, 2, 8, 4), generator=g), torch.randint(0, 36, (2, 2, 4, 2), generator=g)
    codes[torch.rand(codes.shape, generator=g) < 0.5] = MASK
    states = torch.randn(2, 4, config.text, generator=torch.Generator().manual_seed(3))
    return model, codes, coarse, Condition(states, torch.ones(2, 4, dtype=torch.bool))


def test_windows_are_cut_and_joined_again() -> None:
    grid = torch.arange(2 * 2 * 4 * 6).view(2, 2, 4, 6, 1)
    rows = to_windows(grid, (2, 2, 3))
    assert rows.shape == (2 * 4, 12, 1)
    assert torch.equal(rows[1].flatten(), grid[0, :, :2, 3:].flatten())
    assert torch.equal(rows[4].flatten(), grid[1, :, :2, :3].flatten())
    assert torch.equal(from_windows(rows, (2, 2, 3), grid.shape), grid)
    with pytest.raises(UserError, match="does not divide"):
        to_windows(grid, (1, 3, 3))


@torch.no_grad()
def test_a_layer_looks_within_its_window_and_three_look_everywhere() -> None:
    model, codes, coarse, text = fine()
    assert [block.window for block in model.blocks] == list(FINE.windows)
    x, below = torch.randn(1, 2, 8, 4, 32), torch.randn(1, 2, 4, 2, 32)
    keep, states, mask = torch.ones(1, dtype=torch.bool), torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)
    for block, (t, h, w) in zip(model.blocks, FINE.windows, strict=True):
        base = block(x, below, keep, states, mask)
        moved = x.clone()
        moved[0, 1, 5, 3] = torch.randn(32) * 3
        inside = torch.zeros(2, 8, 4, dtype=torch.bool)
        inside[1 // t * t : 1 // t * t + t, 5 // h * h : 5 // h * h + h, 3 // w * w : 3 // w * w + w] = True
        assert torch.equal((block(moved, below, keep, states, mask) - base).abs().amax(-1)[0] > 1e-5, inside)
        moved = below.clone()
        moved[0, 1, 2, 1] = torch.randn(32) * 3  # stands for rows 4 and 5, columns 2 and 3
        assert torch.equal((block(x, moved, keep, states, mask) - base).abs().amax(-1)[0] > 1e-5, inside)
    other = codes.clone()
    other[0, 1, 5, 3] = (codes[0, 1, 5, 3] + 1) % 36
    moved = (model(other, coarse, text) - model(codes, coarse, text)).abs().amax((-1, -2))
    assert (moved[0] > 1e-6).all()
    assert moved[1].eq(0).all()


@torch.no_grad()
def test_what_is_hidden_is_not_read_and_singles_are_the_batch() -> None:
    model, codes, coarse, text = fine()
    keep = torch.tensor([True, False])
    base = model(codes, coarse, text, keep)
    assert base.shape == (2, 2, 8, 4, 2, 6)
    moved = (model(codes, (coarse + 1) % 36, text, keep) - base).abs().amax((1, 2, 3, 4, 5))
    assert moved[0] > 1e-3
    assert moved[1] == 0
    mute = Condition(text.states, torch.tensor([[True] * 4, [False] * 4]))
    without = model(codes, coarse, mute)
    moved = (model(codes, coarse, Condition(text.states.flip(2), mute.mask)) - without).abs().amax((1, 2, 3, 4, 5))
    assert moved[0] > 1e-3
    assert moved[1] == 0
    for i in range(2):
        alone = model(codes[i : i + 1], coarse[i : i + 1], text[i : i + 1], keep[i : i + 1])
        torch.testing.assert_close(alone, base[i : i + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_masked_is_unlike_any_code() -> None:
    model, codes, coarse, text = fine()
    base = model(codes, coarse, text)
    at = tuple((codes[0] == MASK).nonzero()[0].tolist())
    for code in range(36):
        other = codes.clone()
        other[(0, *at)] = code
        assert (model(other, coarse, text) - base)[0].abs().max() > 1e-3


def test_the_masked_loss_is_of_the_hidden_codes() -> None:
    model, codes, coarse, text = fine()
    hidden = codes == MASK
    goals = torch.randint(0, 36, codes.shape, generator=torch.Generator().manual_seed(1))
    logits = model(torch.where(hidden, codes, goals), coarse, text)
    found = masked_loss(logits, goals, hidden)
    said = logits.log_softmax(-1)
    expected = -sum(
        said[(*at, 0, int(goals[at]) % 6)] + said[(*at, 1, int(goals[at]) // 6)] for at in map(tuple, hidden.nonzero().tolist())
    ) / (2 * int(hidden.sum()))
    torch.testing.assert_close(found, torch.as_tensor(expected))
    assert torch.equal(masked_loss(logits, torch.where(hidden, goals, 0), hidden), found)
    found.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("stage", STAGES)
def test_stages_fit_their_grids(stage: str) -> None:
    T, H, W = map(int, stage.split("x"))
    with torch.device("meta"), torch.no_grad():
        model = SuperResolution(SuperResolutionConfig(64, 4, 1, STAGES[stage]))
        codes, coarse = torch.zeros(1, T, H, W, dtype=torch.long), torch.zeros(1, T, H // 2, W // 2, dtype=torch.long)
        text = Condition(torch.zeros(1, 64, 2048), torch.ones(1, 64, dtype=torch.bool))
        assert model(codes, coarse, text).shape == (1, T, H, W, 2, 512)
    assert all(H % h == 0 and W % w == 0 and T % t == 0 for t, h, w in STAGES[stage])
    assert (STAGES[stage][0][1], STAGES[stage][1][2], STAGES[stage][2][0]) == (H, W, T), "each is whole along its axis"


def test_super_resolution_names_what_does_not_fit() -> None:
    model, codes, coarse, text = fine()
    with pytest.raises(UserError, match="half the height"):
        model(codes, coarse[:, :, :2], text)
    most = FINE.factor**2
    for bad, message in (
        ((codes.abs() + most, coarse), f"codes are from -1 to {most - 1}"),
        ((codes, coarse - most), "coarse codes are from 0"),
    ):
        with pytest.raises(UserError, match=message):
            model(*bad, text)
    for wrong, message in (
        ({"width": 24}, "multiple of 16"),
        ({"depth": 0}, "at least 1"),
        ({"windows": ((1, 2, 2),) * 2}, "three windows"),
        ({"windows": ((1, 3, 2),) * 3}, "even height"),
    ):
        with pytest.raises(UserError, match=message):
            SuperResolutionConfig(**{**vars(FINE), **wrong})


def test_noise_draws_a_share_of_each_sample_s_codes_anew() -> None:
    codes, share = torch.full((4, 10, 20, 20), 7), torch.tensor([0.0, 0.25, 0.5, 1.0])
    noisy = resampled(codes, share, 16, torch.Generator().manual_seed(0))
    assert torch.equal(noisy[0], codes[0])
    changed = (noisy != codes).float().mean((1, 2, 3))
    torch.testing.assert_close(changed, share * 15 / 16, atol=0.02, rtol=0)
    assert torch.equal(noisy[3].unique(), torch.arange(16)), "any code may come"
    again, other = (resampled(codes, share, 16, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)


@torch.no_grad()
def test_guidance_by_text_and_by_coarse_codes_is_a_sum_of_three() -> None:
    model, codes, coarse, text = fine()
    null = Condition(torch.zeros(2, 2, FINE.text), torch.tensor([[True, False]] * 2))
    hide = torch.zeros(2, dtype=torch.bool)
    both, seen, nothing = model(codes, coarse, text), model(codes, coarse, null), model(codes, coarse, null, hide)
    cases: list[tuple[float, float, Tensor, int]] = [
        (1.0, 1.0, both, 1),
        (4.0, 1.0, seen + 4 * (both - seen), 2),
        (8.0, 2.0, nothing + 2 * (seen - nothing) + 8 * (both - seen), 3),
        (1.0, 0.0, nothing + both - seen, 3),
    ]
    for text_scale, coarse_scale, expected, branches in cases:
        asked: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, inputs, asked=asked: asked.append(len(inputs[0])))
        found = guided(model, codes, coarse, text, null, text_scale, coarse_scale)
        hook.remove()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert asked == [2 * branches], "what a scale of 1 does not need is not computed"
    assert torch.equal(guided(model, codes, coarse, text, None, 1.0, 1.0), both)
    with pytest.raises(UserError, match="needs empty prompts"):
        guided(model, codes, coarse, text)


@pytest.mark.parametrize("size", SIZES)
def test_stages_of_super_resolution_are_about_as_large_as_the_paper_s(size: str) -> None:
    config = SIZES[size]
    D, layers, n = config.width, 3 * config.depth, config.factor
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = SuperResolution(config)
        codes, coarse, text = example(config)
        model(codes, coarse, text)
    L, K = codes[0].numel(), COUNTED_TEXT
    weights = layers * (4 + 4 + 4 + 8) * D * D
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx({"SR-1B": 1e9, "SR-500M": 5e8}[size], rel=0.05)
    assert weights < parameters < 1.02 * weights
    # Queries, outputs and MLPs of all places, keys and values of a quarter of them and of the text, and the products.
    linear = layers * D * D * (L * (4 + 2 + 2 + 8) + 2 * (L / 4) + 2 * K) + 2 * n * D * L + K * config.text * D
    windows = [t * h * w for t, h, w in config.windows]
    products = sum(2 * L * D * (window + window / 4 + K) for window in windows) * config.depth
    assert counter.get_total_flops() == 2 * (linear + products)
    T, H, W = codes.shape[1:]
    assert stated(config) == f"64 text tokens, {T} x {H // 2} x {W // 2} video tokens below {T} x {H} x {W}, 262,144 ids"
    assert f"{T}x{H}x{W}" == {"SR-1B": "5x56x32", "SR-500M": "5x112x64"}[size]
