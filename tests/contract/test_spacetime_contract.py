"""What the spacetime transformer promises, at a tiny size and for every way of taking text."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tubelet.catalogue import MODELS
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.core.weights import load_module, save_module
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.blocks import SpacetimeBlock
from tubelet.nn.patch import patch_positions, token_grid
from tubelet.nn.positions import RotaryEmbedding, grid_positions

# Sizes that differ only in width and depth are one tiny model: each is built once.
TINY: dict[SpacetimeConfig, str] = {}
for _name, _entry in ((name, entry) for name, entry in MODELS.items() if name.startswith("Spacetime")):
    for _text in ("cross", "joint"):
        TINY.setdefault(replace(_entry.tiny(_entry.config), text=_text), f"{_name}-{_text}")


@pytest.fixture(params=list(TINY), ids=list(TINY.values()))
def fresh(request: pytest.FixtureRequest) -> Spacetime:
    torch.manual_seed(0)
    return Spacetime(request.param)


@pytest.fixture
def model(fresh: Spacetime) -> Spacetime:
    """As after some training: nothing is zero any more."""
    for p in fresh.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return fresh


def inputs(config: SpacetimeConfig, batch: int = 3, k: int = 2, h: int = 2, w: int = 3) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    pt, ph, pw = config.patch
    z = torch.randn(batch, config.in_channels, 1 + k * pt, h * ph, w * pw, generator=g)
    states = torch.randn(batch, 5, config.text_width, generator=g)
    mask = torch.arange(5) < torch.tensor([5, 3, 0])[:batch, None]
    return z, torch.rand(batch, generator=g), Condition(states, mask)


def test_output_is_zero_at_the_start(fresh: Spacetime) -> None:
    assert fresh(*inputs(fresh.config)).eq(0).all()


@pytest.mark.parametrize("size", [(0, 1, 1), (0, 2, 3), (1, 3, 1), (3, 2, 2)])
def test_any_size(model: Spacetime, size: tuple[int, int, int]) -> None:
    z, sigma, condition = inputs(model.config, 3, *size)
    out = model(z, sigma, condition)
    assert out.shape == z.shape
    assert out.dtype == z.dtype
    assert out.isfinite().all()
    assert out.std() > 0.01


def test_sizes_that_do_not_fit(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    with pytest.raises(UserError, match="latent width"):
        model(z[..., :-1], sigma, condition)
    if model.config.patch[0] > 1:
        with pytest.raises(UserError, match="latent frames"):
            model(z[:, :, :-1], sigma, condition)


@pytest.mark.parametrize("per", ["sample", "frame", "cell"])
def test_gradient_reaches_every_parameter(model: Spacetime, per: str) -> None:
    z, sigma, condition = inputs(model.config)
    if per != "sample":
        sigma = torch.rand(z.shape[0], *(z.shape[2:3] if per == "frame" else z.shape[2:]))
    z.requires_grad_()
    condition.states.requires_grad_()
    model(z, sigma, condition).square().mean().backward()
    for name, p in [*model.named_parameters(), ("z", z), ("text", condition.states)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    assert condition.states.grad is not None
    assert condition.states.grad[~condition.mask].eq(0).all()


def test_batch_equals_singles(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    singles = [model(z[i : i + 1], sigma[i : i + 1], condition[i : i + 1]) for i in range(len(z))]
    torch.testing.assert_close(model(z, sigma, condition), torch.cat(singles), atol=1e-5, rtol=0)


def test_padded_text_equals_unpadded(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    states, mask = condition.states.clone(), condition.mask
    states[~mask] = float("nan")
    padded = model(z, sigma, Condition(states, mask))
    for i, length in enumerate(mask.sum(1).tolist()):
        single = Condition(condition.states[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(model(z[i : i + 1], sigma[i : i + 1], single), padded[i : i + 1], atol=1e-5, rtol=0)


def test_an_empty_prompt_is_never_nan(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    empty = Condition(condition.states, torch.zeros_like(condition.mask))
    out = model(z, sigma, empty)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(z, sigma, empty).isfinite().all()


def test_every_input_matters(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    base = model(z, sigma, condition)
    assert (model(z, 1 - sigma, condition) - base).abs().max() > 1e-3
    other = model(z, sigma, Condition(condition.states.flip(0), condition.mask))
    assert (other - base)[0].abs().max() > 1e-3
    moved = z.clone()
    moved[:, :, -1, -1, -1] += 3
    assert (model(moved, sigma, condition) - base)[:, :, 0, 0, 0].abs().max() > 1e-4


def test_equal_levels_per_frame_or_cell_equal_one_level(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    base = model(z, sigma, condition)
    for shape in (z.shape[2:3], z.shape[2:]):
        spread = sigma.view(-1, *[1] * len(shape)).expand(-1, *shape)
        torch.testing.assert_close(model(z, spread, condition), base, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(z, sigma[0], condition), model(z, sigma[:1].expand(3), condition), atol=0, rtol=0)


def test_levels_per_frame_equal_levels_per_cell(model: Spacetime) -> None:
    z, _, condition = inputs(model.config)
    frames = torch.rand(3, z.shape[2], generator=torch.Generator().manual_seed(2))
    cells = frames[:, :, None, None].expand(-1, -1, *z.shape[3:])
    torch.testing.assert_close(model(z, frames, condition), model(z, cells, condition), atol=1e-5, rtol=0)


def test_positions_can_be_given(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    size = z.shape[2], z.shape[3], z.shape[4]
    own = patch_positions(token_grid(size, model.config.patch), model.config.patch)
    base = model(z, sigma, condition)
    torch.testing.assert_close(model(z, sigma, condition, positions=own), base, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(z, sigma, condition, positions=own.expand(3, -1, -1)), base, atol=1e-6, rtol=0)
    for other in (own * 2, own + 7.5):
        assert (model(z, sigma, condition, positions=other) - base).abs().max() > 1e-3


def mixed(config: SpacetimeConfig) -> tuple[list[Tensor], list[Tensor], Condition]:
    """Four samples of three sizes, with one noise level, one per frame, one per cell; one of them has no words."""
    g = torch.Generator().manual_seed(3)
    pt, ph, pw = config.patch
    sizes = [(1 + 2 * pt, 2 * ph, 3 * pw), (1, 4 * ph, pw), (1 + 2 * pt, 2 * ph, 3 * pw), (1 + pt, ph, 2 * pw)]
    z = [torch.randn(config.in_channels, *size, generator=g) for size in sizes]
    sigma = [
        torch.tensor(0.3),
        torch.rand(1, generator=g),
        torch.rand(sizes[2][0], generator=g),
        torch.rand(sizes[3], generator=g),
    ]
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 2])[:, None]
    return z, sigma, Condition(torch.randn(4, 5, config.text_width, generator=g), mask)


def test_packed_equals_one_by_one(model: Spacetime) -> None:
    z, sigma, condition = mixed(model.config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    packed = model.forward_packed(z, sigma, condition)
    singles = [model(one[None], s[None], condition[i : i + 1])[0] for i, (one, s) in enumerate(zip(z, sigma, strict=True))]
    for ours, theirs in zip(packed, singles, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(sum(o.square().sum() for o in outs), parameters) for outs in (packed, singles)]  # type: ignore[arg-type]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_a_poisoned_sample_changes_no_other_of_its_pack(model: Spacetime) -> None:
    z, sigma, condition = mixed(model.config)
    clean = model.forward_packed(z, sigma, condition)
    z[1] = z[1] * float("nan")
    poisoned = model.forward_packed(z, sigma, condition)
    assert poisoned[1].isnan().any()
    for i in (0, 2, 3):
        assert torch.equal(poisoned[i], clean[i])
    assert model.forward_packed([], [], condition[:0]) == []
    with pytest.raises(UserError, match="one of each per sample"):
        model.forward_packed(z, sigma[:2], condition)


def test_saved_and_loaded(model: Spacetime, tmp_path: Path) -> None:
    save_module(tmp_path / "model.safetensors", model)
    other = Spacetime(model.config)
    load_module(tmp_path / "model.safetensors", other)
    assert torch.equal(other(*inputs(model.config)), model(*inputs(model.config)))


def test_half_precision_is_close(model: Spacetime) -> None:
    z, sigma, condition = inputs(model.config)
    base = model(z, sigma, condition)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(z, sigma, condition)
    narrow = copy.deepcopy(model).bfloat16()(z, sigma, condition)
    for out in (autocast, narrow):
        assert out.dtype == z.dtype
        assert (out - base).square().mean() < 2e-3 * base.square().mean()


@pytest.mark.parametrize("text", ["cross", "joint"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_block_equals_eager(text: Literal["cross", "joint"], backend: str) -> None:
    """In one graph, forward and gradient; Inductor's own code forward only, which is what is slow to build."""
    torch.manual_seed(0)
    torch.compiler.reset()
    block = SpacetimeBlock(32, 2, cross=text == "cross")
    torch.nn.init.normal_(block.modulation)
    x, rope = torch.randn(2, 6, 32, requires_grad=True), RotaryEmbedding((4, 6, 6))(grid_positions(1, 2, 3))
    context = torch.randn(2, 4, 32) if text == "cross" else None
    mask = torch.arange(6 if context is None else 4) < torch.tensor([[2], [4]])
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for groups in (1, 3) if backend == "aot_eager" else (1,):
        modulation = torch.randn(2, groups, 192)
        with torch.set_grad_enabled(backend == "aot_eager"):
            ours, theirs = (f(x, modulation, rope, context, mask) for f in (block, compiled))
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
        if backend == "aot_eager":
            grads = [torch.autograd.grad(out.square().sum(), [x, *block.parameters()]) for out in (ours, theirs)]
            torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-4)
