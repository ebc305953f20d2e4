from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.unet import SIZES, UNet, UNetConfig, ddpm_waves, example, stated, tiny
from tubelet.nn.adaln_zero import timestep_waves
from tubelet.nn.image_blocks import CellAttention, ResBlock, SpatialTransformer

DDPM, STABLE = tiny(SIZES["DDPM-CIFAR"]), tiny(SIZES["SD-UNet"])
# Every kind of layer once, in two levels instead of four.
SHALLOW = {
    "ddpm": replace(DDPM, multipliers=(1, 2), attention=(1,), dropout=0.0),
    "stable": replace(STABLE, multipliers=(1, 2), attention=(0,)),
}


def perturbed(model: UNet) -> UNet:
    """As after some training: nothing is zero any more."""
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return model


def inputs(config: UNetConfig, batch: int = 3, rows: int = 4, columns: int = 8) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, rows, columns, generator=g)
    t = torch.tensor([999.0, 3.5, 500.0])[:batch]
    if not config.context:
        return x, t
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return x, t, Condition(torch.randn(batch, 5, config.context, generator=g), mask)


@pytest.fixture(params=SHALLOW)
def model(request: pytest.FixtureRequest) -> UNet:
    torch.manual_seed(0)
    return perturbed(UNet(SHALLOW[request.param])).eval()


# Counts


def counted(config: UNetConfig) -> tuple[int, int]:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet(config)
        model(*example(config))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def test_counts_are_the_published_ones() -> None:
    ddpm, stable = counted(SIZES["DDPM-CIFAR"])[0], counted(SIZES["SD-UNet"])[0]
    assert ddpm == 35_746_307
    assert round(ddpm / 1e6, 1) == 35.7
    assert stable == 859_520_964
    assert round(stable / 1e6, 1) == 859.5
    wide = counted(replace(SIZES["DDPM-CIFAR"], learn_sigma=True))[0]
    assert wide - ddpm == 3 * (9 * 128 + 1), "three channels more of the last convolution"


def test_compute_is_what_the_layers_say() -> None:
    """Counted by hand, layer by layer, for two levels of one block."""
    for kind, c in SHALLOW.items():
        side = c.size
        fine, coarse, w, d = side**2, (side // 2) ** 2, c.width, 2 * c.width

        def block(cells: int, width: int, out: int, w: int = w) -> int:
            return cells * (9 * width * out + 9 * out * out + (width * out if width != out else 0)) + 4 * w * out

        def look(cells: int, width: int, c: UNetConfig = c) -> int:
            own = cells * 4 * width**2 + 2 * cells**2 * width
            if not c.context:
                return own
            cross = 2 * cells * width**2 + 2 * 77 * c.context * width + 2 * 77 * cells * width
            return own + cross + cells * (2 * width**2 + 12 * width**2)

        ends = fine * 9 * c.channels * w * 2 + w * 4 * w + 16 * w * w
        down = block(fine, w, w) + coarse * 9 * w * w + block(coarse, w, d)
        middle = 2 * block(coarse, d, d) + look(coarse, d)
        up = (
            block(coarse, 2 * d, d) + block(coarse, d + w, d) + fine * 9 * d * d + block(fine, d + w, w) + block(fine, 2 * w, w)
        )
        attends = 3 * look(coarse, d) if kind == "ddpm" else 3 * look(fine, w)
        assert counted(c)[1] == ends + down + middle + up + attends, kind


def test_the_stated_input_is_the_one_counted() -> None:
    assert stated(SIZES["DDPM-CIFAR"]) == "3 x 32 x 32 (C, H, W)"
    assert stated(SIZES["SD-UNet"]) == "4 x 64 x 64 (C, H, W), 77 tokens of width 768"
    x, t, context = example(STABLE, 2)  # type: ignore[misc]
    assert (x.shape, t.shape, context.states.shape) == ((2, 4, 16, 16), (2,), (2, 77, 24))
    assert context.mask.all()
    assert len(example(DDPM)) == 2


# Parity with diffusers

NAMES = (
    (r"^time_embedding\.linear_1", "step_in"),
    (r"^time_embedding\.linear_2", "step_out"),
    (r"^conv_norm_out", "norm_out"),
    (r"^mid_block\.attentions\.0", "middle.0.attention"),
    (r"^mid_block\.resnets\.(\d)", r"middle.\1.block"),
    (r"^(up|down)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.cells.\3.block"),
    (r"^(up|down)_blocks\.(\d)\.attentions\.(\d)", r"\1.\2.cells.\3.attention"),
    (r"^(up|down)_blocks\.(\d)\.(?:up|down)samplers\.0", r"\1.\2.resample"),
    (r"block\.(norm|conv)1", r"block.\1_in"),
    (r"block\.(norm|conv)2", r"block.\1_out"),
    (r"time_emb_proj", "step"),
    (r"conv_shortcut", "skip"),
    (r"group_norm", "norm"),
    (r"proj_in", "into"),
    (r"proj_out", "out"),
    (r"transformer_blocks\.0\.norm1", "attention_norm"),
    (r"transformer_blocks\.0\.norm2", "cross_norm"),
    (r"transformer_blocks\.0\.norm3", "mlp_norm"),
    (r"transformer_blocks\.0\.attn1", "attention"),
    (r"transformer_blocks\.0\.attn2", "cross"),
    (r"transformer_blocks\.0\.ff\.net\.0\.proj", "mlp.up"),
    (r"transformer_blocks\.0\.ff\.net\.2", "mlp.down"),
    (r"attention\.(to_[qkv]|to_out)", r"attention.attention.\1"),  # a CellAttention holds its attention under that name
    (r"attention\.attention\.attention", "attention.attention"),
    (r"to_out\.0", "out"),
)


def as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a diffusers U-Net under our names and in our shapes."""
    out: dict[str, Tensor] = {}
    for name, value in theirs.items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        joined = re.sub(r"cross\.to_[kv]", "cross.kv", re.sub(r"cross\.to_q", "cross.q", name))
        joined = re.sub(r"attention\.to_[qkv]", "attention.qkv", joined)
        if re.search(r"attention\.(into|out)\.weight$", joined) and value.ndim == 4:
            value = value.flatten(1)  # a 1x1 convolution
        out[joined] = torch.cat([out[joined], value]) if joined in out else value
    return out


def reference(kind: str) -> Any:
    """diffusers' U-Net of that kind with random weights, of the sizes of SHALLOW with two blocks a level."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    both = {"block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 8}
    if kind == "ddpm":
        from diffusers.models.unets.unet_2d import UNet2DModel

        return UNet2DModel(
            **both,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
            norm_eps=1e-6,
            attention_head_dim=None,
        ).eval()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        **both,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,  # which is the number of heads there
    ).eval()


@pytest.mark.parametrize("kind", SHALLOW)
def test_equals_diffusers_with_gradients(kind: str) -> None:
    theirs = reference(kind)
    config = replace(SHALLOW[kind], blocks=2)
    ours = UNet(config).eval()
    ours.load_state_dict(as_ours(theirs.state_dict()))
    x, t, *context = inputs(config, 3, 8, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    more = {}
    if context:
        more = {"encoder_hidden_states": context[0].states, "encoder_attention_mask": context[0].mask}
    mine, yours = ours(a, t, *context), theirs(b, t, **more).sample
    assert yours.std() > 0.1
    torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)

    weight = torch.randn(yours.shape, generator=torch.Generator().manual_seed(2)) / yours[0].numel() ** 0.5
    (mine * weight).sum().backward()
    (yours * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    grads = as_ours({name: p.grad for name, p in theirs.named_parameters()})
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_waves_are_those_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 3.5, 999.0])
    first = get_timestep_embedding(t, 32, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(ddpm_waves(t, 32), first, atol=1e-6, rtol=0)
    second = get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_waves(t, 320), second, atol=1e-6, rtol=0)
    slowest = ddpm_waves(t, 32)[:, 15]
    torch.testing.assert_close(slowest, (t / 10_000).sin(), atol=1e-6, rtol=0)


# The start


@pytest.mark.parametrize("kind", SHALLOW)
def test_the_last_layer_of_every_residual_and_the_output_start_at_zero(kind: str) -> None:
    torch.manual_seed(0)
    model = UNet(SHALLOW[kind]).eval()
    x, t, *context = inputs(SHALLOW[kind])
    assert model(x, t, *context).eq(0).all()
    h = torch.randn(2, 64, 4, 4)
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 2 + 2 + 4
    assert all(m.conv_out.weight.eq(0).all() for m in blocks)
    same = next(m for m in blocks if isinstance(m.skip, nn.Identity) and m.norm_in.num_channels == 64)
    assert torch.equal(same(h, torch.randn(2, 128)), h), "the block starts as the identity"
    looks = [m for m in model.modules() if isinstance(m, (CellAttention, SpatialTransformer))]
    assert len(looks) == 1 + 3
    middle = model.middle[0].get_submodule("attention")
    assert torch.equal(middle(h, Condition(context[0].states[:2], context[0].mask[:2])) if context else middle(h), h)


def test_ddpm_starts_uniform_by_its_fans() -> None:
    torch.manual_seed(0)
    model = UNet(replace(SHALLOW["ddpm"], width=64))
    attention = next(m for m in model.modules() if isinstance(m, CellAttention)).attention
    for weight, fans in ((model.step_in.weight, 64 + 256), (model.conv_in.weight, 27 + 576), (attention.qkv.weight, 2 * 128)):
        assert float(weight.detach().abs().max()) == pytest.approx((6 / fans) ** 0.5, rel=0.02)
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("kind", SHALLOW)
def test_built_on_meta_then_filled_equals_built_in_place(kind: str) -> None:
    with torch.device("meta"):
        late = UNet(SHALLOW[kind])
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    now = UNet(SHALLOW[kind])
    for one in (late, now):
        torch.manual_seed(3)
        one.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# What both kinds promise


def test_any_side_that_halves_fits(model: UNet) -> None:
    c = model.config
    for rows, columns in ((2, 2), (4, 6), (10, 2)):
        x, t, *context = inputs(c, 2, rows, columns)
        out = model(x, t, *context)
        assert out.shape == x.shape
        assert out.isfinite().all()
    assert UNet(replace(c, learn_sigma=True))(*inputs(c)).shape == (3, 2 * c.channels, 4, 8)


def test_gradient_reaches_every_parameter(model: UNet) -> None:
    x, t, *context = inputs(model.config, 3, 8, 8)
    x.requires_grad_()
    model(x, t, *context).square().mean().backward()
    for name, p in [*model.named_parameters(), ("x", x)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-6, name


@torch.no_grad()
def test_batch_equals_singles(model: UNet) -> None:
    x, t, *context = inputs(model.config)
    singles = [model(x[i : i + 1], t[i : i + 1], *(c[i : i + 1] for c in context)) for i in range(3)]
    torch.testing.assert_close(model(x, t, *context), torch.cat(singles), atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_input_matters(model: UNet) -> None:
    x, t, *context = inputs(model.config)
    base = model(x, t, *context)
    assert (model(x, t.flip(0), *context) - base)[0].abs().max() > 1e-3
    far = x.clone()
    far[:, :, -1, -1] += 3
    assert (model(far, t, *context) - base)[:, :, 0, 0].abs().max() > 1e-4, "the middle sees the whole image"
    if context:
        states, mask = context[0].states.clone(), context[0].mask
        states[~mask] = 1e3
        torch.testing.assert_close(model(x, t, Condition(states, mask)), base, atol=1e-5, rtol=0)
        states[:, 0] += 1
        assert (model(x, t, Condition(states, mask)) - base).abs().amax((1, 2, 3)).min() > 1e-4


def test_dropout_is_in_every_block_and_in_training_only() -> None:
    torch.manual_seed(0)
    model = perturbed(UNet(replace(SHALLOW["ddpm"], dropout=0.1)))
    x, t = inputs(model.config)
    assert [b.get_submodule("block.dropout").p for b in model.blocks] == [0.1] * 8  # type: ignore[union-attr]
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_blocks_are_named_in_the_order_in_which_they_run(model: UNet) -> None:
    seen: list[nn.Module] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(module))
    model(*inputs(model.config))
    assert len(seen) == len(model.blocks)
    assert all(a is b for a, b in zip(seen, model.blocks, strict=True))


@torch.no_grad()
def test_half_precision_is_close(model: UNet) -> None:
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
        ({"width": 30}, "divide into 8 groups, got 30; try 32"),
        ({"blocks": 0}, "at least 1"),
        ({"multipliers": ()}, "at least 1"),
        ({"context": -1}, "context at least 0"),
        ({"attention": (0, 4)}, r"levels 0 to 3, got \(0, 4\)"),
        ({"heads": 3}, "3 heads do not divide"),
        ({"dropout": 1.0}, "share in"),
        ({"size": 12}, "multiple of 8, got 12; try 64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(UNetConfig, to_dict(DDPM) | settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    for kind, cases in (
        (
            "ddpm",
            (
                (lambda x, t: (x[:, :2], t), r"takes \(B, 3, H, W\), got \(3, 2, 4, 8\)"),
                (lambda x, t: (x[0], t), r"takes \(B, 3, H, W\)"),
                (lambda x, t: (x[..., :3], t), "multiples of 2, got 4 x 3"),
                (lambda x, t: (x[..., :0], t), "multiples of 2, got 4 x 0"),
                (lambda x, t: (x, t[0]), "3 images need 3 step numbers"),
                (
                    lambda x, t: (x, t, Condition(torch.zeros(3, 5, 24), torch.ones(3, 5).bool())),
                    "reads no context; leave it out",
                ),
            ),
        ),
        (
            "stable",
            (
                (lambda x, t, c: (x, t), "reads a context of width 24; give it"),
                (lambda x, t, c: (x, t, Condition(c.states[..., :8], c.mask)), r"must be \(3, M, 24\) .* got \(3, 5, 8\)"),
                (lambda x, t, c: (x, t, c[:2]), r"got \(2, 5, 24\) and \(2, 5\)"),
                (lambda x, t, c: (x, t, Condition(c.states, c.mask[:, :4])), r"got \(3, 5, 24\) and \(3, 4\)"),
            ),
        ),
    ):
        model = UNet(SHALLOW[kind])
        for spoil, message in cases:
            with pytest.raises(UserError, match=message):
                model(*spoil(*inputs(model.config)))  # type: ignore[operator]
