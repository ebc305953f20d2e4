from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.models.dit import DiT, DiTConfig
from tubelet.models.vdt import CONDITIONINGS, SIZES, VDT, VDTBlock, VDTConfig, example, stated, tiny
from tubelet.nn.adaln_zero import sincos_line

TINY = tiny(SIZES["S/2"])


def perturbed(model: VDT) -> VDT:
    """As after some training: nothing is zero any more."""
    for p in model.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return model


def built(conditioning: Any = "mask") -> VDT:
    torch.manual_seed(0)
    return perturbed(VDT(replace(TINY, conditioning=conditioning)))


@pytest.fixture(params=CONDITIONINGS)
def model(request: pytest.FixtureRequest) -> VDT:
    return built(request.param)


def inputs(config: VDTConfig, batch: int = 3, T: int = 4) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, T, 4, 6, generator=g)
    t, label = torch.tensor([999.0, 3.5, 500.0])[:batch], torch.tensor([2, 10, 7])[:batch]
    if config.conditioning != "mask":
        return [x, t, label, torch.randn(batch, 4, 2, 4, 6, generator=g), None]
    mask = torch.rand(batch, T, 4, 6, generator=g) < 0.4
    return [x, t, label, torch.randn(batch, 4, T, 4, 6, generator=g), mask]


# Golden numbers


def wave(shape: Sequence[int], phase: float, scale: float) -> Tensor:
    """Values that any program can make again."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(i * 0.7 + phase) * torch.cos(i * 0.013 + phase)).view(*shape).float()


@torch.no_grad()
def test_answers_are_those_of_the_released_code() -> None:
    """Numbers of RERV/VDT's `models.py`, run on these weights under its own names; ours differed by 1.2e-6 at most.

    Its label is always 0, its films are square, its latents come frames first.
    """
    model = VDT(VDTConfig(width=24, depth=2, heads=3, patch=2, in_channels=4, classes=10))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(wave(parameter.shape, float(number), 0.3) + float(name.endswith("norm.weight")))
    out = model(wave((2, 4, 4, 8, 8), 0.5, 1.5), torch.tensor([3.0, 741.0]), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 8, 4, 8, 8)
    found = [out.mean(), out.square().mean(), (out * wave(out.shape, 1.0, 1.0)).sum() / 100]
    torch.testing.assert_close(torch.stack(found), torch.tensor([0.034916, 2.689193, -0.05450878]), atol=1e-5, rtol=1e-5)
    single = out.flatten()[[0, 517, 1900, 3000, 4095]]
    torch.testing.assert_close(single, torch.tensor([1.293188, 0.080965, 1.666764, 0.405416, -0.26563]), atol=1e-5, rtol=1e-5)


# Counts


def counted(config: VDTConfig) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the built module."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = VDT(config)
        model(*example(config))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(("size", "millions", "labels"), [("S/2", 41.4, 0.4), ("L/2", 859.7, 1.2)])
def test_counts_are_those_of_the_released_code(size: str, millions: float, labels: float) -> None:
    c = SIZES[size]
    D, N, cells, L, T = c.width, c.depth, 16, 256, 16
    parameters, macs = counted(c)
    assert (round((parameters - 1001 * D) / 1e6, 1), round(1001 * D / 1e6, 1)) == (millions, labels)
    embedders, head = cells * D + D + (257 * D + D**2 + D) + 1001 * D, 2 * D**2 + 2 * D + 2 * cells * (D + 1)
    assert parameters == N * (18 * D**2 + 15 * D + 5 * D**2 + 7 * D) + embedders + head
    spatial, temporal = T * (12 * L * D**2 + 2 * L**2 * D) + 6 * D**2, L * (5 * T * D**2 + 2 * T**2 * D)
    assert macs == N * (spatial + temporal) + 3 * T * L * cells * D + 256 * D + 3 * D**2


def test_what_each_conditioning_adds() -> None:
    D, base = 32, counted(TINY)[0]
    assert counted(replace(TINY, conditioning="concat"))[0] == base
    assert counted(replace(TINY, conditioning="adaln"))[0] == base + 2 * (D**2 + D)
    assert counted(replace(TINY, conditioning="cross-attention"))[0] == base + 2 * (4 * D**2 + 4 * D + 2 * D)


def test_the_stated_input_is_the_one_counted() -> None:
    assert stated(SIZES["L/2"]) == "4 x 16 x 32 x 32 latents (C, T, H, W), 8 frames known, patch 2 x 2"
    x, _, label, clean, mask = example(SIZES["L/2"], 3)
    assert mask is not None
    assert (x.shape, label.shape, clean.shape, mask.shape) == ((3, 4, 16, 32, 32), (3,), x.shape, (3, 16))
    assert mask.sum(1).tolist() == [8, 8, 8]
    x, _, _, clean, mask = example(replace(SIZES["L/2"], conditioning="concat"))
    assert (x.shape[2], clean.shape[2], mask) == (8, 8, None)


# Against independent arithmetic


def plain_attention(x: Tensor, qkv: torch.nn.Linear, out: torch.nn.Linear, heads: int) -> Tensor:
    """Attention over `(L, D)`, head after head."""
    q, k, v = F.linear(x, qkv.weight, qkv.bias).chunk(3, dim=-1)
    d = q.shape[-1] // heads
    rows = []
    for n in range(heads):
        at = slice(n * d, (n + 1) * d)
        rows.append((q[:, at] @ k[:, at].T / d**0.5).softmax(-1) @ v[:, at])
    return F.linear(torch.cat(rows, dim=-1), out.weight, out.bias)


@torch.no_grad()
def test_a_block_is_time_without_then_space_with_the_condition() -> None:
    torch.manual_seed(0)
    D, T, L, heads = 32, 3, 5, 2
    block = VDTBlock(D, heads)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, c = torch.randn(1, T * L, D), torch.randn(1, 1, D)
    cells = x[0].view(T, L, D).clone()
    norm = block.temporal_norm
    for place in range(L):
        h = F.layer_norm(cells[:, place], (D,), norm.weight, norm.bias, 1e-5)
        h = plain_attention(h, block.temporal.qkv, block.temporal.out, heads)
        cells[:, place] += F.linear(h, block.temporal_out.weight, block.temporal_out.bias)
    space = block.spatial
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = space.adaln.out(F.silu(c[0, 0])).split(D)
    for frame in range(T):
        h = F.layer_norm(cells[frame], (D,), eps=1e-6) * (1 + scale_a) + shift_a
        cells[frame] += gate_a * plain_attention(h, space.attention.qkv, space.attention.out, heads)
        h = F.layer_norm(cells[frame], (D,), eps=1e-6) * (1 + scale_m) + shift_m
        cells[frame] += gate_m * space.mlp.down(F.gelu(space.mlp.up(h), approximate="tanh"))
    torch.testing.assert_close(block(x, c, T)[0], cells.flatten(0, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_temporal_attention_every_frame_is_a_dit() -> None:
    model = built()
    for block in model.blocks:
        torch.nn.init.zeros_(block.temporal_out.weight)
        torch.nn.init.zeros_(block.temporal_out.bias)
    state = {n.replace(".spatial.", "."): v for n, v in model.state_dict().items() if ".temporal" not in n}
    x, t, label, *_ = inputs(model.config)
    assert x is not None
    out = model(x, t, label)
    times = sincos_line(32, 4)
    for frame in range(4):
        image = DiT(DiTConfig(32, 2, 2, classes=10))
        image.load_state_dict(state | {"patch_in.bias": state["patch_in.bias"] + times[frame]})
        torch.testing.assert_close(out[:, :, frame], image(x[:, :, frame], t, label), atol=1e-5, rtol=0)


# What is known


@torch.no_grad()
def test_the_mask_has_the_polarity_of_the_paper() -> None:
    model = built()
    x, t, label, clean, mask = inputs(model.config)
    assert x is not None
    assert clean is not None
    assert mask is not None
    seen = x * (1 - mask[:, None].float()) + clean * mask[:, None].float()
    base = model(x, t, label, clean, mask)
    torch.testing.assert_close(base, model(seen, t, label), atol=1e-6, rtol=0)
    assert torch.equal(model(x, t, label, clean, mask.float()), base)
    assert (model(x, t, label, clean, ~mask) - base).abs().max() > 1e-2

    wide = mask[:, None].expand_as(x)
    poisoned = torch.where(wide, clean, torch.nan)
    assert torch.equal(model(x, t, label, poisoned, mask), base), "clean is not looked at where the mask is 0"
    assert torch.equal(model(torch.where(wide, torch.nan, x), t, label, clean, mask), base), "nor x where it is 1"

    nothing, everything = torch.zeros(3, 4), torch.ones(3, 4)
    assert torch.equal(model(x, t, label, clean, nothing), model(x, t, label))
    assert torch.equal(model(x, t, label, clean, everything), model(clean, t, label))
    frames = torch.tensor([1, 0, 1, 0]).expand(3, -1)
    cells = frames[:, :, None, None].expand(-1, -1, 4, 6)
    assert torch.equal(model(x, t, label, clean, frames), model(x, t, label, clean, cells))


@torch.no_grad()
def test_concatenation_is_a_mask_that_knows_the_beginning() -> None:
    """The same weights, the same tokens, the same places; only that the known frames' output is not returned."""
    ours, masked = built("concat"), built("mask")
    x, t, label, clean, _ = inputs(ours.config)
    assert x is not None
    assert clean is not None
    whole = torch.cat([clean, torch.randn_like(x)], dim=2)
    noised = torch.cat([torch.randn_like(clean), x], dim=2)
    known = (torch.arange(6) < 2).expand(3, -1)
    torch.testing.assert_close(ours(x, t, label, clean), masked(noised, t, label, whole, known)[:, :, 2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("conditioning", ["adaln", "cross-attention", "concat"])
@torch.no_grad()
def test_earlier_frames_of_any_number_matter(conditioning: Any) -> None:
    model = built(conditioning)
    x, t, label, clean, _ = inputs(model.config)
    assert clean is not None
    base = model(x, t, label, clean)
    assert base.shape == (3, 8, 4, 4, 6)
    moved = clean.clone()
    moved[:, :, 0, 0, 0] += 5
    assert (model(x, t, label, moved) - base).abs().max() > 1e-4
    assert (model(x, t, label, clean.flip(2)) - base).abs().max() > 1e-4, "their order counts"
    assert model(x, t, label, clean[:, :, :1]).shape == base.shape
    assert model(x, t, label, clean.repeat(1, 1, 4, 1, 1)).shape == base.shape


# The start


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_output_is_exactly_zero_at_the_start_but_time_is_attended_to(conditioning: Any) -> None:
    torch.manual_seed(0)
    model = VDT(replace(TINY, conditioning=conditioning))
    assert model(*inputs(model.config)).eq(0).all()
    block, x, c = model.blocks[0], torch.randn(1, 8, 32), torch.randn(1, 1, 32)
    assert isinstance(block, VDTBlock)
    assert torch.equal(block.spatial(x, c, 2), x), "the DiT block starts as the identity"
    assert (block(x, c, 2) - x).abs().mean() > 0.1, "temporal attention does not start at zero"
    assert torch.equal(block(x, c, 2), block(x, -c, 2)), "nor does the condition touch it"


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_built_on_meta_then_filled_equals_built_in_place(conditioning: Any) -> None:
    config = replace(TINY, conditioning=conditioning)
    with torch.device("meta"):
        late = VDT(config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    now = VDT(config)
    torch.manual_seed(3)
    now.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# What every conditioning promises


def test_shape_and_dtype_of_the_output(model: VDT) -> None:
    for T in (1, 5):
        out = model(*inputs(model.config, 3, T))
        assert out.shape == (3, 8, T, 4, 6)
        assert out.std() > 0.01
    small = VDT(replace(model.config, learn_sigma=False))
    assert small(*inputs(model.config)).shape == (3, 4, 4, 4, 6)


def test_gradient_reaches_every_parameter_and_input(model: VDT) -> None:
    x, t, label, clean, mask = inputs(model.config)
    assert x is not None
    assert clean is not None
    x.requires_grad_()
    clean.requires_grad_()
    model(x, t, label, clean, mask).square().mean().backward()
    for name, p in [*model.named_parameters(), ("x", x), ("clean", clean)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    if mask is not None:
        assert x.grad is not None
        assert torch.equal(x.grad.abs().sum(1) > 0, ~mask)


@torch.no_grad()
def test_batch_equals_singles(model: VDT) -> None:
    batch = inputs(model.config)
    singles = [model(*(None if one is None else one[i : i + 1] for one in batch)) for i in range(3)]
    torch.testing.assert_close(model(*batch), torch.cat(singles), atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_input_matters(model: VDT) -> None:
    x, t, label, clean, mask = inputs(model.config)
    assert x is not None
    assert t is not None
    assert label is not None
    base = model(x, t, label, clean, mask)
    assert (model(x, t.flip(0), label, clean, mask) - base)[0].abs().max() > 1e-4
    assert (model(x, t, label.flip(0), clean, mask) - base)[0].abs().max() > 1e-4
    assert torch.equal(model(x, t, None, clean, mask), model(x, t, torch.full((3,), 10), clean, mask))
    plain = [clean, mask] if clean is None or mask is None else [clean, torch.zeros_like(mask)]
    base = model(x, t, label, *plain)
    for axis in (2, 3, 4):
        assert (model(x.flip(axis), t, label, *plain).flip(axis) - base).abs().max() > 1e-3, "a token knows where it is"
    moved = x.clone()
    moved[:, :, -1, -1, -1] += 5
    reached = (model(moved, t, label, *plain) - base).abs().amax((0, 1))  # (T, H, W)
    assert reached[0, 0, 0] > 1e-6, "the other corner of another frame, over two blocks"


@torch.no_grad()
def test_half_precision_is_close(model: VDT) -> None:
    base = model(*inputs(model.config))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs(model.config))
    for out in (autocast, copy.deepcopy(model).bfloat16()(*inputs(model.config))):
        assert out.dtype == base.dtype
        assert (out - base).square().mean() < 2e-3 * base.square().mean()


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 33}, "try 128"),
        ({"heads": 0}, "at least 1"),
        ({"conditioning": "film"}, "mask, adaln, cross-attention, concat"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(VDTConfig, to_dict(TINY) | settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    masked, concat = VDT(TINY), VDT(replace(TINY, conditioning="concat"))
    x, t, label, clean, mask = inputs(TINY)
    assert x is not None
    assert t is not None
    assert label is not None
    assert clean is not None
    assert mask is not None
    for model, bad, message in (
        (masked, (x[:, :3], t), r"must be \(B, 4, T, H, W\), got \(3, 3, 4, 4, 6\)"),
        (masked, (x[..., :5], t), "latent width must be a multiple of 2, got 5"),
        (masked, (x, t[:2]), "3 step numbers and 3 labels"),
        (masked, (x, t, label[0]), "one of each per clip"),
        (masked, (x, t, label + TINY.classes + 1), "labels are from 0"),
        (masked, (x, t, label, clean), "pass both, or neither"),
        (masked, (x, t, label, None, mask), "pass both, or neither"),
        (masked, (x, t, label, clean[:, :, 1:], mask), "clean has the same shape"),
        (masked, (x, t, label, clean, mask[:, 0]), r"mask is \(3, 4\) or \(3, 4, 4, 6\)"),
        (concat, (x, t, label), "pass at least one as clean"),
        (concat, (x, t, label, clean[:, :, :0]), "pass at least one as clean"),
        (concat, (x, t, label, clean[..., :4]), r"from \(3, 4, K, 4, 6\) earlier frames"),
        (concat, (x, t, label, clean, mask), "leave the mask out"),
    ):
        with pytest.raises(UserError, match=message):
            model(*bad)
