"""GLIDE's U-Net against diffusers' blocks of the same kind, and what unCLIP's decoder and upsamplers add to it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.glide import (
    ADM,
    SIZES,
    ADMConfig,
    DecoderCondition,
    DecoderConfig,
    UnCLIPDecoder,
    UnCLIPDecoderConfig,
    build,
    drop_condition,
    example,
    stated,
    tiny,
)

BLOCKS = 2
TEXT = ADMConfig(width=32, multipliers=(1, 2), blocks=BLOCKS, attention=(1,), head=16, context=24, groups=8, size=16)
UPSAMPLER = ADMConfig(width=32, multipliers=(1, 2), blocks=BLOCKS, attention=(), groups=8, seen=3, size=16)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


def perturbed(model: nn.Module) -> Any:
    """As after some training: nothing is zero any more."""
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return model.eval()


# Counts


def test_counts_are_near_the_printed_ones() -> None:
    """Appendix C prints 3.5 B, 700 M and 300 M; GLIDE's section 4.1 some 2.3 B for the pictures and 1.2 B for the text."""
    with torch.device("meta"):
        built = {name: build(config) for name, config in SIZES.items()}
    counted = {name: sum(p.numel() for p in model.parameters()) / 1e9 for name, model in built.items()}
    assert counted["Decoder"] == pytest.approx(3.5, rel=0.03)
    assert counted["Upsampler-256"] == pytest.approx(0.7, rel=0.06)
    assert counted["Upsampler-1024"] == pytest.approx(0.3, rel=0.07)
    decoder = built["Decoder"]
    assert isinstance(decoder, UnCLIPDecoder)
    assert sum(p.numel() for p in decoder.unet.parameters()) / 1e9 == pytest.approx(2.3, rel=0.04)
    text = 24 * (12 * 2048**2 + 13 * 2048) + (50_257 + 256) * 2048 + 2 * 2048
    assert sum(p.numel() for p in decoder.text.parameters()) == text
    assert stated(SIZES["Upsampler-256"]) == "3 x 256 x 256 (C, H, W), beside one of a fourth of the side"
    assert stated(SIZES["Decoder"]) == "3 x 64 x 64 (C, H, W), 256 text tokens, an image embedding of 1024"


def test_upsamplers_have_no_attention() -> None:
    for name in ("Upsampler-256", "Upsampler-1024"):
        with torch.device("meta"):
            names = [key for key, _ in build(SIZES[name]).named_parameters()]
        assert not [key for key in names if "attention" in key]


# Parity with diffusers

NAMES = (
    (r"^time_embedding\.linear_1", "step_in"),
    (r"^time_embedding\.linear_2", "step_out"),
    (r"^conv_norm_out", "norm_out"),
    (r"^mid_block\.attentions\.0", "middle.0.attention"),
    (r"^mid_block\.resnets\.(\d)", r"middle.\1.block"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.\2.block"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", r"up.\1.\2.attention"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", rf"up.\1.{BLOCKS + 1}.block"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"down.{(BLOCKS + 1) * int(m[1]) + int(m[2])}.block"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"down.{(BLOCKS + 1) * int(m[1]) + int(m[2])}.attention"),
    (r"^down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{(BLOCKS + 1) * int(m[1]) + BLOCKS}.block"),
    (r"block\.(norm|conv)1", r"block.\1_in"),
    (r"block\.(norm|conv)2", r"block.\1_out"),
    (r"time_emb_proj", "step"),
    (r"conv_shortcut", "skip"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "out"),
    (r"attention\.to_[qkv]", "attention.qkv"),
    (r"attention\.add_[kv]_proj", "attention.context"),
)


def as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a diffusers U-Net under our names; queries, keys and values in one linear."""
    out: dict[str, Tensor] = {}
    for name, value in theirs.items():
        for old, new in NAMES:
            name = re.sub(old, new, name)  # type: ignore[arg-type]
        out[name] = torch.cat([out[name], value]) if name in out else value
    return out


def reference(config: ADMConfig) -> Any:
    """diffusers' U-Net of that kind with random weights, as Karlo's decoder and upsamplers are built of it."""
    torch.manual_seed(0)
    both: dict[str, Any] = {
        "out_channels": config.out_channels,
        "block_out_channels": (32, 64),
        "layers_per_block": BLOCKS,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
    }
    if config.seen:
        return UNet2DModel(
            **both,
            in_channels=6,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            add_attention=False,
        ).eval()
    return UNet2DConditionModel(
        **both,
        in_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=24,
        attention_head_dim=16,
        class_embed_type="identity",
    ).eval()


@pytest.mark.parametrize("config", [TEXT, UPSAMPLER], ids=["text", "upsampler"])
def test_equals_diffusers_with_gradients(config: ADMConfig) -> None:
    theirs = reference(config)
    ours = ADM(config).eval()
    ours.load_state_dict(as_ours(theirs.state_dict()))
    x, t = torch.randn(3, 3, 16, 8, generator=rng(1)), torch.tensor([999.0, 3.5, 500.0])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    if config.seen:
        low = torch.randn(3, 3, 4, 2, generator=rng(2))
        large = F.interpolate(low, (16, 8), mode="bilinear", align_corners=False)
        mine, yours = ours(a, t, low), theirs(torch.cat([b, large], dim=1), t).sample
    else:
        states, told = torch.randn(3, 5, 24, generator=rng(2)), torch.randn(3, 128, generator=rng(3))
        mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
        mine = ours(a, t, told=told, context=Condition(states, mask))
        yours = theirs(b, t, states, class_labels=told, encoder_attention_mask=mask).sample
    assert yours.std() > 0.1
    torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)

    weight = torch.randn(yours.shape, generator=rng(4)) / yours[0].numel() ** 0.5
    (mine * weight).sum().backward()
    (yours * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    grads = as_ours({name: p.grad for name, p in theirs.named_parameters()})
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# The decoder


def decoder() -> UnCLIPDecoder:
    torch.manual_seed(0)
    config = tiny(SIZES["Decoder"])
    assert isinstance(config, UnCLIPDecoderConfig)
    return perturbed(UnCLIPDecoder(config))


@torch.no_grad()
def test_the_decoder_hears_embedding_and_words_by_two_ways_each() -> None:
    model = decoder()
    x, t, ids, mask, image = example(model.config, 2)
    plain = model(x, t, ids, mask, image)
    assert plain.shape == (2, 6, 16, 16), "noise and variance"
    for changed in (
        model(x, t, ids.flip(1), mask, image),
        model(x, t, ids, mask, image.flip(0)),
        model(x, t * 0, ids, mask, image),
    ):
        assert (changed - plain).abs().max() > 1e-4
    # Without its way into the time an embedding is still heard in the context, and the other way around.
    for part in (model.condition.to_time, model.condition.to_context):
        kept = part.weight.clone()
        part.weight.zero_()
        assert (model(x, t, ids, mask, image) - model(x, t, ids, mask, image.flip(0))).abs().max() > 1e-5
        part.weight.copy_(kept)


@torch.no_grad()
def test_padding_is_not_read_and_a_dropped_caption_is_any_dropped_caption() -> None:
    model = decoder()
    x, t, ids, mask, image = example(model.config, 2)
    mask[1, 3:] = False
    other = ids.clone()
    other[1, 3:] = (ids[1, 3:] + 1) % 50
    torch.testing.assert_close(model(x, t, ids, mask, image), model(x, t, other, mask, image), atol=1e-6, rtol=0)
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(model(x, t, ids, nothing, image), model(x, t, ids.flip(1), nothing, image), atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_upsampler_is_shown_the_smaller_picture_and_takes_any_size() -> None:
    model = perturbed(ADM(UPSAMPLER))
    low = torch.randn(1, 3, 4, 6, generator=rng(1))
    x, t = torch.randn(1, 3, 16, 24, generator=rng(2)), torch.tensor([500.0])
    out = model(x, t, low)
    assert out.shape == (1, 6, 16, 24)
    assert (model(x, t, -low) - out).abs().max() > 1e-3
    # Convolutions alone: what is far away is not seen, so that training on crops is no lie.
    wide = torch.randn(1, 3, 16, 512, generator=rng(3))
    seen = torch.randn(1, 3, 4, 128, generator=rng(4))
    model.norm_out, groups = nn.Identity(), [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    for norm in groups:  # statistics alone look at the whole picture
        norm.forward = lambda h: h  # type: ignore[method-assign]
    changed = wide.clone()
    changed[..., :16] += 1.0
    apart = (model(changed, t, seen) - model(wide, t, seen)).abs().amax((0, 1, 2))
    assert apart[:16].max() > 0
    assert apart[256:].max() == 0


def test_the_condition_is_that_of_diffusers() -> None:
    """Theirs also projects the text, and puts the tokens first, channels slowest."""
    torch.manual_seed(0)
    theirs = UnCLIPTextProjModel(clip_embeddings_dim=12, time_embed_dim=16, cross_attention_dim=8)
    ours = DecoderCondition(DecoderConfig(embed=12, time=16, width=8))
    to_time, to_context = theirs.clip_image_embeddings_project_to_time_embeddings, theirs.clip_extra_context_tokens_proj
    ours.to_time.load_state_dict(to_time.state_dict())
    order = torch.arange(32).view(8, 4).T.flatten()
    ours.to_context.load_state_dict({name: value[order] for name, value in to_context.state_dict().items()})
    image, time, states = unit(2, 12), torch.randn(2, 16), torch.randn(2, 7, 12)
    context, added = theirs(
        image_embeddings=image,
        prompt_embeds=torch.zeros(2, 12),
        text_encoder_hidden_states=states,
        do_classifier_free_guidance=False,
    )
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    out = ours(image, time, context[:, 4:], mask)
    torch.testing.assert_close(out.time, time + added - theirs.embedding_proj.bias, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.context, torch.cat([context[:, 4:], context[:, :4]], dim=1), atol=1e-6, rtol=1e-5)
    assert out.mask.sum(1).tolist() == [11, 7]
    assert out.mask[:, -4:].all()


def test_image_and_caption_are_dropped_independently() -> None:
    image, mask = unit(40_000, 4), torch.ones(40_000, 3, dtype=torch.bool)
    kept, left = drop_condition(image, mask, rng(2))
    no_image, no_caption = kept.eq(0).all(1), ~left.any(1)
    assert torch.equal(kept[~no_image], image[~no_image])
    assert torch.equal(left.any(1), left.all(1))
    shares = [x.float().mean().item() for x in (no_image, no_caption, no_image & ~no_caption)]
    assert shares == pytest.approx([0.1, 0.5, 0.05], abs=0.01)


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ADMConfig(blocks=0), "at least 1"),
        (lambda: ADMConfig(width=33), "divide into 32 groups"),
        (lambda: ADMConfig(attention=(4,)), "levels 0 to 3"),
        (lambda: ADMConfig(head=60), "heads of 60"),
        (lambda: ADMConfig(attention=(), context=8), "no level has any"),
        (lambda: ADMConfig(size=60), "multiple of 8"),
        (lambda: DecoderConfig(tokens=0), "at least 1"),
        (lambda: UnCLIPDecoderConfig(text_depth=0), "at least 1"),
        (lambda: UnCLIPDecoderConfig(unet=ADMConfig()), "even multiple"),
    ],
)
def test_sizes_that_do_not_fit_are_told(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_inputs_that_do_not_fit_are_told() -> None:
    text, upsampler = ADM(TEXT), ADM(UPSAMPLER)
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2)
    states, low = Condition(torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)), torch.randn(2, 3, 4, 4)
    wrong: list[tuple[Any, str]] = [
        (lambda: text(x[:, :2], t, context=states), "takes"),
        (lambda: text(x[..., :15], t, context=states), "multiples of 2"),
        (lambda: text(x, t[:1], context=states), "step numbers"),
        (lambda: text(x, t), "reads states"),
        (lambda: text(x, t, context=Condition(states.states[..., :3], states.mask)), "reads states"),
        (lambda: text(x, t, low, context=states), "no smaller picture"),
        (lambda: text(x, t, told=torch.zeros(2, 3), context=states), "what is told"),
        (lambda: upsampler(x, t), "is shown a picture"),
        (lambda: upsampler(x, t, low[:1]), "is shown a picture"),
        (lambda: upsampler(x, t, low, context=states), "reads no context"),
        (lambda: ADM(replace(TEXT, context=0))(x, t, context=states), "reads no context"),
        (
            lambda: decoder()(x, t, torch.zeros(2, 7).long(), torch.ones(2, 7).bool(), unit(2, 12)),
            "cut it",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message):
            call()
