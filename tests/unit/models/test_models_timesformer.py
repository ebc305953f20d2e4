from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module
from tubelet.models.timesformer import SIZES, DividedBlock, TimeSformer, TimeSformerConfig, example, stated, tiny

TINY = tiny(SIZES["B"])


def build(config: TimeSformerConfig = TINY) -> TimeSformer:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    model = TimeSformer(config)
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.1)
    return model


def test_counts() -> None:
    config = SIZES["B"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = TimeSformer(config)
        model(*example(config))
    D, T, L = 768, 8, 196
    weights = sum(p.numel() for p in model.parameters()) - 400 * (D + 1)
    assert weights / 1e6 == pytest.approx(121.26, abs=0.006)
    block = T * L * 5 * D * D + 2 * L * T * T * D  # attention along time and temporal_fc
    block += T * (L + 1) * 4 * D * D + 2 * T * (L + 1) ** 2 * D  # attention in space
    block += (T * L + 1) * 8 * D * D
    assert counter.get_total_flops() // 2 == 12 * block + T * L * D * D + 400 * D


def from_transformers(model: TimeSformer, reference: nn.Module) -> None:
    """Copy the weights of `transformers.TimesformerModel` into ours, whose head is left alone."""
    given = reference.state_dict()
    kernel = given["embeddings.patch_embeddings.projection.weight"]  # (D, C, ph, pw)
    ours = {
        "embed.project.weight": kernel.movedim(1, -1).flatten(1),
        "embed.project.bias": given["embeddings.patch_embeddings.projection.bias"],
        "embed.cls": given["embeddings.cls_token"][0, 0],
        "embed.positions": given["embeddings.position_embeddings"][0],
        "times": given["embeddings.time_embeddings"][0],
        "head.weight": model.head.weight,
        "head.bias": model.head.bias,
    }
    names = {"time_norm": "temporal_layernorm", "time.qkv": "temporal_attention.attention.qkv"}
    names |= {"time.out": "temporal_attention.output.dense", "temporal_fc": "temporal_dense"}
    names |= {"space_norm": "layernorm_before", "space.qkv": "attention.attention.qkv", "space.out": "attention.output.dense"}
    names |= {"mlp_norm": "layernorm_after", "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = given[f"layernorm.{kind}"]
        for i in range(model.config.depth):
            ours |= {f"blocks.{i}.{a}.{kind}": given[f"encoder.layer.{i}.{b}.{kind}"] for a, b in names.items()}
    model.load_state_dict(ours)


def test_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    T, L = TINY.frames, (TINY.size // TINY.patch) ** 2
    torch.manual_seed(1)
    reference = transformers.TimesformerModel(
        transformers.TimesformerConfig(
            image_size=TINY.size,
            patch_size=TINY.patch,
            num_frames=T,
            hidden_size=TINY.width,
            num_hidden_layers=TINY.depth,
            num_attention_heads=TINY.heads,
            intermediate_size=4 * TINY.width,
        )
    )
    for p in reference.parameters():
        nn.init.normal_(p, std=0.2)
    model = TimeSformer(TINY)
    from_transformers(model, reference)
    (video,) = example(TINY, 2)
    theirs = video.clone().requires_grad_()
    video.requires_grad_()
    out, expected = model.tokens(video), reference(theirs.transpose(1, 2)).last_hidden_state
    # The reference has the frames of a place side by side.
    patches = expected[:, 1:].unflatten(1, (L, T)).transpose(1, 2).flatten(1, 2)
    expected = torch.cat([expected[:, :1], patches], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert video.grad is not None
    torch.testing.assert_close(video.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    # The gradients of the weights pass through the same copy.
    grads = {name: p.grad for name, p in reference.named_parameters()}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            assert grads[name] is not None, name
            p.copy_(grads[name])
    expected_grads = TimeSformer(TINY)
    from_transformers(expected_grads, reference)
    for (name, ours), (_, expect) in zip(model.named_parameters(), expected_grads.named_parameters(), strict=True):
        if not name.startswith("head"):
            assert ours.grad is not None, name
            scale = float(expect.detach().abs().max())
            torch.testing.assert_close(ours.grad / scale, expect / scale, atol=1e-5, rtol=0, msg=name)


def test_before_training_frames_are_an_image_model_each() -> None:
    model = TimeSformer(TINY)
    zero = {name for name, p in model.named_parameters() if p.ndim == 2 and p.eq(0).all()}
    assert zero == {"times", "blocks.0.temporal_fc.weight", "blocks.1.temporal_fc.weight"}
    (video,) = example(TINY)
    assert float((model(video) - model(video.flip(2))).detach().abs().max()) < 1e-6
    model = build()
    assert float((model(video) - model(video.flip(2))).detach().abs().max()) > 1e-4


def test_a_block_attends_to_the_place_and_to_the_frame() -> None:
    T, L = 3, 4
    torch.manual_seed(0)
    block = DividedBlock(16, 2)
    x = torch.randn(1, 1 + T * L, 16, requires_grad=True)
    block(x, T)[0, 1 + 1 * L + 2].sum().backward()  # frame 1, place 2
    assert x.grad is not None
    seen = x.grad[0].abs().amax(-1) > 0
    assert seen[0], "the class token"
    # Its own place in every frame reaches it along time; the patches of its frame bring theirs, too.
    assert seen.all()
    x.grad = None
    nn.init.zeros_(block.temporal_fc.weight)
    block(x, T)[0, 1 + 1 * L + 2].sum().backward()
    frames = (x.grad[0].abs().amax(-1) > 0)[1:].view(T, L)
    assert frames.all(1).tolist() == [False, True, False]
    assert frames.any(1).tolist() == [False, True, False]


def test_contract(tmp_path: Path) -> None:
    model = build()
    (video,) = example(TINY, 3)
    video.requires_grad_()
    out = model(video)
    assert out.shape == (3, 5)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in video]), out, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    for name, p in [*model.named_parameters(), ("video", video)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    save_module(tmp_path / "m.safetensors", model)
    other = TimeSformer(from_dict(TimeSformerConfig, to_dict(TINY)))
    load_module(tmp_path / "m.safetensors", other)
    assert torch.equal(other(video), out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"width": 100}, "try 768"), ({"depth": 0}, "at least 1"), ({"size": 225}, "choose a multiple")],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TimeSformerConfig(), **settings)


def test_another_video_is_refused_and_the_stated_one_is_made() -> None:
    with pytest.raises(UserError, match="sample 3 frames"):
        build()(torch.randn(1, 3, 4, 16, 16))
    with pytest.raises(UserError, match="multiples of 8"):
        build()(torch.randn(1, 3, 3, 16, 12))
    assert stated(SIZES["B"]) == "3 x 8 x 224 x 224 video (C, T, H, W), patch 16"
    with torch.device("meta"):
        assert example(SIZES["B"], 2)[0].shape == (2, 3, 8, 224, 224)
