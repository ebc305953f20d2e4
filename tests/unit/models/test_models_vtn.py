from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module
from tubelet.models.vtn import SIZES, VTN, TemporalEncoder, VTNConfig, example, stated, tiny
from tubelet.nn.longformer import GlobalWindowAttention, LongformerBlock

TINY = tiny(SIZES["B"])


def build(config: VTNConfig = TINY) -> VTN:
    torch.manual_seed(0)
    model = VTN(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def test_counts() -> None:
    config = SIZES["B"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = VTN(config)
        model(*example(config))
    D, T, L = 768, 250, 197
    vit = 12 * (12 * D * D + 13 * D) + 769 * D + L * D + D + 2 * D
    assert sum(p.numel() for p in model.spatial.parameters()) == vit == 85_798_656
    layer = 7 * D * (D + 1) + 8 * D * D + 5 * D + 4 * D
    head = 2 * D + D * (D + 1) + 400 * (D + 1)
    assert sum(p.numel() for p in model.parameters()) == vit + 3 * layer + D + 288 * D + 2 * D + head
    frame = 12 * (12 * L * D * D + 2 * L * L * D) + 196 * D * D
    chunks = -(-T // 18)
    layer = (1 + T) * 14 * D * D + D * D + 2 * (1 + T) * D + 2 * chunks * 18 * 37 * D
    assert counter.get_total_flops() // 2 == T * frame + 3 * layer + D * D + 400 * D


def dense(layer: GlobalWindowAttention, x: Tensor) -> Tensor:
    """The same attention with every product computed: a band, the global token's row and its column."""
    N, d = layer.heads, x.shape[-1] // layer.heads
    q, k, v = layer.qkv(x).unflatten(-1, (3, N, d)).permute(2, 0, 3, 1, 4)
    i = torch.arange(x.shape[1])
    mask = ((i[:, None] - i).abs() <= layer.reach) | (i == 0)
    out = ((q @ k.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    q = layer.global_q(x[:, :1]).unflatten(-1, (N, d)).transpose(1, 2)
    k, v = layer.global_kv(x).unflatten(-1, (2, N, d)).permute(2, 0, 3, 1, 4)
    first = ((q @ k.mT / d**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return layer.out(torch.cat([first, out[:, 1:]], dim=1))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 8, 9, 21])
@pytest.mark.parametrize("window", [2, 4, 6])
def test_chunks_equal_dense_attention_under_the_band(frames: int, window: int) -> None:
    torch.manual_seed(0)
    layer = GlobalWindowAttention(16, 2, window)
    x = torch.randn(3, 1 + frames, 16, requires_grad=True)
    out, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_window_reaches_as_far_as_it_says() -> None:
    torch.manual_seed(0)
    block = LongformerBlock(16, 2, 32, 4)
    x = torch.randn(1, 1 + 12, 16, requires_grad=True)
    block(x)[0, 6, 0].backward()  # frame 5
    assert x.grad is not None
    assert (x.grad[0].abs().amax(-1) > 1e-7).nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 8]


def test_cost_grows_linearly_and_250_frames_pass() -> None:
    config = replace(TINY, positions=288, window=18)
    macs = []
    for T in (252, 504):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            TemporalEncoder(config)(torch.randn(1, T, config.width))
        macs.append(counter.get_total_flops() // 2)
    # Only the class token's own row and its share of the projections do not double.
    assert 1.98 < macs[1] / macs[0] < 2
    out = TemporalEncoder(config)(torch.randn(2, 250, config.width))
    assert out.shape == (2, config.width)
    assert out.isfinite().all()


def from_transformers(encoder: TemporalEncoder, reference: nn.Module) -> None:
    """Copy the weights of `transformers.LongformerModel`; its table of token types is added to the positions."""
    given = reference.state_dict()
    table = given["embeddings.position_embeddings.weight"] + given["embeddings.token_type_embeddings.weight"][0]
    table[-2] += given["embeddings.token_type_embeddings.weight"][1] - given["embeddings.token_type_embeddings.weight"][0]
    ours = {"positions": table, "cls": encoder.cls}
    names = {"attention.global_q": "attention.self.query_global", "attention.out": "attention.output.dense"}
    names |= {"attention_norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    names |= {"mlp_norm": "output.LayerNorm"}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = given[f"embeddings.LayerNorm.{kind}"]
        for i in range(len(encoder.blocks)):
            theirs = f"encoder.layer.{i}"
            ours |= {f"blocks.{i}.{a}.{kind}": given[f"{theirs}.{b}.{kind}"] for a, b in names.items()}
            for name, parts in (("qkv", ("query", "key", "value")), ("global_kv", ("key_global", "value_global"))):
                joined = torch.cat([given[f"{theirs}.attention.self.{part}.{kind}"] for part in parts])
                ours[f"blocks.{i}.attention.{name}.{kind}"] = joined
    encoder.load_state_dict(ours)


@pytest.mark.parametrize("frames", [11, 17])
def test_temporal_encoder_agrees_with_transformers(frames: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    reference = transformers.LongformerModel(
        transformers.LongformerConfig(
            attention_window=[TINY.window] * TINY.temporal_depth,
            vocab_size=TINY.positions,
            pad_token_id=TINY.positions - 1,
            hidden_size=TINY.width,
            num_hidden_layers=TINY.temporal_depth,
            num_attention_heads=TINY.heads,
            intermediate_size=TINY.temporal_hidden,
            max_position_embeddings=TINY.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    ).double()  # what processors round differently is far below every tolerance
    for name, p in reference.named_parameters():
        nn.init.normal_(p, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    encoder = TemporalEncoder(TINY).double()
    from_transformers(encoder, reference)
    x = torch.randn(2, frames, TINY.width, dtype=torch.float64, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    first = torch.zeros(2, 1 + frames, dtype=torch.long)
    first[:, 0] = 1
    numbers = torch.cat([torch.tensor([TINY.positions - 2]), torch.arange(frames)]).expand(2, -1)
    expected = reference(
        inputs_embeds=torch.cat([encoder.cls.detach().expand(2, 1, -1), theirs], dim=1),
        attention_mask=torch.ones(2, 1 + frames),
        global_attention_mask=first,
        token_type_ids=first,
        position_ids=numbers,
    ).last_hidden_state[:, 0]
    out = encoder(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0.01
    torch.testing.assert_close(x.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    # The gradients of the weights pass through the same copy; that of a token type is already in those of its positions.
    grads = {name: p.grad for name, p in reference.named_parameters() if "token_type" not in name}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            grad = grads.get(name)
            p.copy_(torch.zeros_like(p) if grad is None else grad)
    expected_grads = TemporalEncoder(TINY).double()
    from_transformers(expected_grads, reference)
    for (name, ours), (_, expect) in zip(encoder.named_parameters(), expected_grads.named_parameters(), strict=True):
        if name != "cls":
            assert ours.grad is not None, name
            scale = float(expect.detach().abs().max()) or 1.0
            torch.testing.assert_close(ours.grad / scale, expect / scale, atol=1e-5, rtol=0, msg=name)
    assert encoder.cls.grad is not None
    torch.testing.assert_close(encoder.cls.grad, expected_grads.positions[-2].detach(), atol=1e-5, rtol=1e-4)


def test_contract(tmp_path: Path) -> None:
    model = build()
    (video,) = example(TINY, 3)
    video.requires_grad_()
    out = model(video)
    assert out.shape == (3, 5)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in video]), out, atol=1e-4, rtol=1e-4)
    out.square().mean().backward()
    # The class token alone leaves the last block, and it looks through the global projections.
    unused = {"temporal.blocks.1.attention.qkv.weight", "temporal.blocks.1.attention.qkv.bias"}
    for name, p in [*model.named_parameters(), ("video", video)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad.abs().sum() > 0) == (name not in unused), name
    save_module(tmp_path / "m.safetensors", model)
    other = VTN(from_dict(VTNConfig, to_dict(TINY)))
    load_module(tmp_path / "m.safetensors", other)
    assert torch.equal(other(video), out)


def test_numbers_of_frames_are_their_places() -> None:
    model = build()
    (video,) = example(TINY, 2)
    few = video[:, :, ::4]
    torch.testing.assert_close(model(few), model(few, torch.arange(3)))
    assert not torch.allclose(model(few), model(few, torch.arange(0, 12, 4)), atol=1e-3)
    each = torch.stack([torch.arange(3), torch.arange(0, 12, 4)])
    torch.testing.assert_close(model(few, each)[1], model(few, each[1])[1])
    torch.testing.assert_close(model(few, each + TINY.positions - 2), model(few, each))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "try 768"),
        ({"depth": 0}, "at least 1"),
        ({"size": 225}, "choose a multiple"),
        ({"window": 5}, "must be even"),
        ({"positions": 2}, "at least 3 rows"),
        ({"head_dropout": 1.0}, "below 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(VTNConfig, to_dict(VTNConfig()) | settings)


def test_another_video_is_refused_and_the_stated_one_is_made() -> None:
    with pytest.raises(UserError, match="T at least 1"):
        build()(torch.randn(1, 3, 0, 16, 16))
    with pytest.raises(UserError, match="multiples of 8"):
        build()(torch.randn(1, 3, 2, 16, 12))
    assert stated(SIZES["B"]) == "3 x 250 x 224 x 224 video (C, T, H, W), patch 16"
    with torch.device("meta"):
        assert example(SIZES["B"], 2)[0].shape == (2, 3, 250, 224, 224)
