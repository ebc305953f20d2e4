from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module
from tubelet.models.vivit import (
    SIZES,
    DotProductAttention,
    FlatViViT,
    SelfAttentionBlock,
    TubeletEmbedding,
    ViViT,
    ViViTConfig,
    central_frame,
    example,
    inflate,
    repeat_positions,
    stated,
    tiny,
    uniform_frames,
)

# Millions of parameters (the large model's counted, not published), GMACs as published and GMACs by hand from the
# configuration: matrix products alone, which are within 1 % of the paper's figures.
PUBLISHED = {
    "B/16x2": (88.9, 455.2, 451.5),
    "B/16x2-FE": (115.1, 284.4, 283.3),
    "B/16x2-FSA": (117.3, 372.3, 371.1),
    "B/16x2-FDP": (88.9, 277.1, 276.2),
    "B/16x2-AVG": (86.7, 283.9, 282.9),
    "L/16x2": (307.5, 1446.0, 1436.0),
    "L/16x2-FE": (354.9, 995.3, 988.2),
}
KINDS = [tiny(SIZES[name]) for name in ("B/16x2", "B/16x2-FE", "B/16x2-FSA", "B/16x2-FDP", "B/16x2-AVG")]
KINDS += [
    replace(KINDS[0], embedding="frames"),
    replace(KINDS[1], pool="mean", frames=7),
    replace(KINDS[0], tubelet=(1, 8, 8), frames=3),
]


def trained(model: nn.Module) -> nn.Module:
    """As after some training: nothing is zero any more."""
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.1)
    return model


def build(config: ViViTConfig) -> ViViT:
    torch.manual_seed(0)
    model = trained(ViViT(config))
    assert isinstance(model, ViViT)
    return model


def counted(config: ViViTConfig) -> tuple[int, int]:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = ViViT(config)
        model(*example(config))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_published_ones(size: str) -> None:
    parameters, macs = counted(SIZES[size])
    millions, published, by_hand = PUBLISHED[size]
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert macs / 1e9 == pytest.approx(published, rel=0.01)
    assert macs / 1e9 == pytest.approx(by_hand, abs=0.06)


def test_model_4_adds_nothing_to_model_1() -> None:
    joint, _ = counted(replace(SIZES["B/16x2"], pool="mean"))
    assert counted(SIZES["B/16x2-FDP"])[0] == joint


def test_tables_of_positions() -> None:
    with torch.device("meta"):
        joint, factorised = ViViT(SIZES["B/16x2"]), ViViT(SIZES["B/16x2-FE"])
    assert joint.encoder.positions.shape == (16 * 196 + 1, 768)
    assert factorised.encoder.positions.shape == (197, 768)
    assert factorised.temporal is not None
    assert factorised.temporal.positions.shape == (17, 768)


def from_transformers(model: ViViT, reference: nn.Module) -> None:
    """Copy the weights of `transformers.VivitForVideoClassification` into Model 1."""
    given = reference.state_dict()
    kernel = given["vivit.embeddings.patch_embeddings.projection.weight"]  # (D, C, pt, ph, pw)
    ours = {
        "embedding.map.weight": kernel.permute(0, 2, 3, 4, 1).flatten(1),
        "embedding.map.bias": given["vivit.embeddings.patch_embeddings.projection.bias"],
        "encoder.cls": given["vivit.embeddings.cls_token"][0, 0],
        "encoder.positions": given["vivit.embeddings.position_embeddings"][0],
    }
    names = {"attention.out": "attention.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    names |= {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
    for kind in ("weight", "bias"):
        ours |= {f"encoder.norm.{kind}": given[f"vivit.layernorm.{kind}"], f"head.{kind}": given[f"classifier.{kind}"]}
        for i in range(model.config.depth):
            theirs = f"vivit.layers.{i}"
            qkv = [given[f"{theirs}.attention.{x}_proj.{kind}"] for x in "qkv"]
            ours[f"encoder.blocks.{i}.attention.qkv.{kind}"] = torch.cat(qkv)
            ours |= {f"encoder.blocks.{i}.{a}.{kind}": given[f"{theirs}.{b}.{kind}"] for a, b in names.items()}
    model.load_state_dict(ours)


def test_model_1_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = KINDS[0]
    torch.manual_seed(1)
    reference = transformers.VivitForVideoClassification(
        transformers.VivitConfig(
            image_size=config.size,
            num_frames=config.frames,
            tubelet_size=config.tubelet,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            num_labels=config.classes,
        )
    )
    for p in reference.parameters():
        nn.init.normal_(p, std=0.2)
    model = ViViT(config)
    from_transformers(model, reference)
    (video,) = example(config, 2)
    theirs = video.clone().requires_grad_()
    video.requires_grad_()
    out, expected = model(video), reference(theirs.transpose(1, 2)).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert video.grad is not None
    torch.testing.assert_close(video.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    # The gradients of the weights pass through the same copy.
    grads = {name: p.grad for name, p in reference.named_parameters()}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            assert grads[name] is not None
            p.copy_(grads[name])
    expected_grads = ViViT(config)
    from_transformers(expected_grads, reference)
    for (name, ours), (_, expect) in zip(model.named_parameters(), expected_grads.named_parameters(), strict=True):
        assert ours.grad is not None, name
        scale = float(expect.detach().abs().max())
        torch.testing.assert_close(ours.grad / scale, expect / scale, atol=1e-5, rtol=0, msg=name)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over the whole sequence with everything outside `mask` removed, `(B, N, L, d)`."""
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def places(T: int, L: int) -> tuple[Tensor, Tensor]:
    """Which of T*L tokens, frame by frame, stand in one frame and at one place: two `(T*L, T*L)` masks."""
    frame, place = torch.arange(T * L) // L, torch.arange(T * L) % L
    return frame[:, None] == frame, place[:, None] == place


def test_model_4_is_dense_attention_with_time_in_the_first_heads() -> None:
    T, L, N = 3, 4, 4
    layer = DotProductAttention(16, N, T)
    x = torch.randn(2, T * L, 16)
    q, k, v = layer.qkv(x).view(2, T * L, 3, N, 4).permute(2, 0, 3, 1, 4)
    frame, place = places(T, L)
    mask = torch.stack([place, place, frame, frame])
    expected = layer.out(masked(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_model_3_is_dense_attention_in_space_then_in_time() -> None:
    T, L, N = 3, 4, 2
    block = SelfAttentionBlock(16, N, T)
    x = torch.randn(2, T * L, 16)
    expected = x
    for norm, layer, mask in zip((block.space_norm, block.time_norm), (block.space, block.time), places(T, L), strict=True):
        q, k, v = layer.qkv(norm(expected)).view(2, T * L, 3, N, 8).permute(2, 0, 3, 1, 4)
        expected = expected + layer.out(masked(q, k, v, mask).transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.mlp_norm(expected))
    torch.testing.assert_close(block(x), expected)


def test_model_3_starts_without_attention_along_time() -> None:
    model = ViViT(KINDS[2])
    blocks = [block for block in model.modules() if isinstance(block, SelfAttentionBlock)]
    assert len(blocks) == 2
    for block in blocks:
        assert block.time(torch.randn(2, 3, 32)).eq(0).all()
        assert not block.space(torch.randn(2, 3, 32)).eq(0).all()
    for p in (model.head.weight, *(block.time.out.weight for block in blocks)):
        nn.init.normal_(p, std=0.1)
    model(*example(model.config)).square().sum().backward()
    assert all(block.time.qkv.weight.grad.abs().sum() > 0 for block in blocks)


def test_model_2_sees_frames_apart_and_then_together() -> None:
    model = build(KINDS[1])
    (video,) = example(model.config)
    other = video.clone()
    other[:, :, 2:4] = torch.randn_like(other[:, :, 2:4])
    same = (model.frame_features(video) - model.frame_features(other)).abs().amax(-1)[0]
    assert same[1] > 1e-2
    assert same[[0, 2]].max() < 1e-5
    flipped = video.flip(2)
    assert not torch.allclose(model(video), model(flipped), atol=1e-3), "order matters"
    average = build(replace(KINDS[4], tubelet=(1, 8, 8)))
    torch.testing.assert_close(average(video), average(flipped), atol=1e-5, rtol=0)


def test_maps_over_time_rebuild_the_attention() -> None:
    model = build(KINDS[1])
    (video,) = example(model.config, 2)
    maps = model.time_maps(video)
    assert maps.shape == (2, 2, 4, 4, 4)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 4))
    assert model.temporal is not None
    block: Any = model.temporal.blocks[0]
    x = block.attention_norm(model.temporal.embed(model.frame_features(video)))
    v = block.attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (4, -1)).transpose(1, 2)
    rebuilt = block.attention.out((maps[:, 0] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, block.attention(x))
    with pytest.raises(UserError, match="no temporal encoder; use kind encoder"):
        build(KINDS[0]).time_maps(video)


def test_a_tubelet_map_is_a_strided_convolution() -> None:
    embedding = TubeletEmbedding(8, (2, 4, 4))
    kernel = embedding.map.weight.unflatten(1, (2, 4, 4, 3)).permute(0, 4, 1, 2, 3)
    video = torch.randn(2, 3, 5, 8, 12)  # the fifth frame fills no tubelet
    expected = nn.functional.conv3d(video, kernel, embedding.map.bias, stride=(2, 4, 4)).flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(embedding(video), expected)


@pytest.mark.parametrize("pt", [2, 3])
def test_tubelets_from_a_flat_map(pt: int) -> None:
    flat, tubelet = TubeletEmbedding(8, (1, 4, 4)), TubeletEmbedding(8, (pt, 4, 4))
    video = torch.randn(2, 3, 2 * pt, 8, 8)
    tubelet.map.bias = flat.map.bias
    tubelet.map.weight = nn.Parameter(central_frame(flat.map.weight.detach(), pt))
    torch.testing.assert_close(tubelet(video), flat(video)[:, pt // 2 :: pt])
    tubelet.map.weight = nn.Parameter(inflate(flat.map.weight.detach(), pt))
    torch.testing.assert_close(tubelet(video), flat(video).unflatten(1, (2, pt)).mean(2))


def test_positions_of_an_image_model_are_repeated() -> None:
    table = torch.arange(5.0)[:, None]
    assert repeat_positions(table, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_uniform_frames() -> None:
    assert uniform_frames(32, 8) == [4, 7, 11, 14, 18, 21, 25, 28]
    assert uniform_frames(4, 4) == uniform_frames(4, 9) == [0, 1, 2, 3]
    model = build(KINDS[5])
    (video,) = example(model.config)
    kept = uniform_frames(6, 3)
    other = torch.randn_like(video)
    other[:, :, kept] = video[:, :, kept]
    assert torch.equal(model(video), model(other))


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.kind}-{c.embedding}-{c.pool}-{c.frames}")
def test_contract(config: ViViTConfig, tmp_path: Path) -> None:
    assert ViViT(config)(*example(config)).eq(0).all(), "the head is zero at the start"
    model = build(config)
    (video,) = example(config, 3)
    video.requires_grad_()
    out = model(video)
    assert out.shape == (3, config.classes)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in video]), out, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    for name, p in [*model.named_parameters(), ("video", video)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    save_module(tmp_path / "m.safetensors", model)
    other = ViViT(from_dict(ViViTConfig, to_dict(config)))
    load_module(tmp_path / "m.safetensors", other)
    assert torch.equal(other(video), out)


def test_the_worlds_fit() -> None:
    for frames in (16, 17):
        config = ViViTConfig(64, 1, 2, "encoder", frames=frames, size=64, tubelet=(1, 16, 16), classes=3)
        assert build(config)(torch.randn(1, 3, frames, 64, 64)).shape == (1, 3)
        assert ViViTConfig(frames=frames, size=64).grid == (8, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "try 768"),
        ({"depth": 0}, "at least 1"),
        ({"size": 225}, "choose a multiple"),
        ({"frames": 1}, "do not fill a tubelet"),
        ({"kind": "dot-product"}, "set pool to mean"),
        ({"kind": "dot-product", "pool": "mean", "heads": 3}, "even number"),
        ({"kind": "both"}, "choose one of them"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(ViViTConfig, to_dict(ViViTConfig()) | settings)


def test_another_video_is_refused_and_the_stated_one_is_made() -> None:
    with pytest.raises(UserError, match=r"\(B, 3, 6, 16, 16\), got \(1, 3, 5, 16, 16\); resize or sample"):
        build(KINDS[0])(torch.randn(1, 3, 5, 16, 16))
    assert stated(SIZES["B/16x2"]) == "3 x 32 x 224 x 224 video (C, T, H, W), tubelet 2 x 16 x 16"
    with torch.device("meta"):
        assert example(SIZES["B/16x2"], 2)[0].shape == (2, 3, 32, 224, 224)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_flat_variant(pool: Any) -> None:
    model = FlatViViT(16, 8, 5, 3, dim=24, depth=2, heads=2, pool=pool, in_channels=1, dim_head=8, scale_dim=2)
    assert model.positions.shape == (1, 3, 5, 24)
    block = 2 * 48 + 24 * 48 + 16 * 24 + 24 + 24 * 48 + 48 + 48 * 24 + 24
    weights = 64 * 24 + 24 + 15 * 24 + 2 * 24 + 4 * block + 2 * 48 + 48 + 24 * 5 + 5
    assert sum(p.numel() for p in model.parameters()) == weights
    video = torch.randn(2, 1, 3, 16, 16)
    out = model(video)
    assert out.shape == (2, 5)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in video]), out, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        model.positions.copy_(model.positions[:, :1].expand_as(model.positions).clone())
    torch.testing.assert_close(model(video), model(video.flip(2)), atol=1e-5, rtol=1e-4)


def test_flat_variant_needs_its_own_number_of_frames() -> None:
    model = FlatViViT(16, 8, 5, 3, dim=24, depth=1, heads=2, dropout=0.5, emb_dropout=0.5)
    with pytest.raises(UserError, match="resize or sample the clip"):
        model(torch.randn(1, 3, 2, 16, 16))
    video = torch.randn(1, 3, 3, 16, 16)
    assert not torch.equal(model(video), model(video))
    assert torch.equal(model.eval()(video), model(video))
    with pytest.raises(UserError, match="choose a multiple"):
        FlatViViT(15, 8, 5, 3)
