from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.errors import UserError
from tubelet.models.coca import (
    COUNTED_TOKENS,
    EPS,
    SIZES,
    CaptionBlock,
    CoCa,
    CoCaConfig,
    CoCaOutput,
    caption,
    example,
    losses,
    stated,
    tiny,
)
from tubelet.nn.attention import CrossAttention, SelfAttention
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.packing import Segments
from tubelet.nn.pooling import AttentionPool

TINY = tiny(SIZES["CoCa"])  # 36 x 36 px in 2 x 2 patches, 6 queries, ids below 48
START, END = 1, 2
# Table 1 in millions: encoder, decoder, all. The largest is printed as 1B, 1.1B and 2.1B, and comes out 4 % above that.
PUBLISHED = {"CoCa-Base": (86, 297, 383), "CoCa-Large": (303, 484, 787), "CoCa": (1000, 1100, 2100)}


@pytest.fixture(params=["cascade", "parallel"])
def model(request: pytest.FixtureRequest) -> CoCa:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    model = CoCa(replace(TINY, pooling=request.param))
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return model


def batch(n: int = 3, frames: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images or videos, captions of 7, 5, 3 tokens and their mask."""
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(n, 3, *([frames] if frames else []), 36, 36, generator=g)
    mask = torch.arange(7) < torch.tensor([7, 5, 3])[:n, None]
    ids = torch.where(mask, torch.randint(3, 48, (n, 7), generator=g), 0)
    ids[:, 0] = START
    return pixels, ids, mask


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_counts_agree_with_arithmetic_and_with_the_paper(size: str) -> None:
    config = SIZES[size]
    D, M, L = config.width, config.queries, COUNTED_TOKENS
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = CoCa(config)
        model(*example(config))
    n, hidden = config.image_depth, config.image_hidden
    cells = (config.image // config.patch) ** 2
    macs = cells * 3 * config.patch**2 * D + n * (cells * (4 * D * D + 2 * D * hidden) + 2 * cells**2 * D)
    macs += (2 * cells + 2 * M) * D * D + 2 * cells * M * D + (2 * M + 2) * D * D + 2 * M * D  # both poolers
    n, hidden = config.text_depth, config.text_hidden
    macs += n * ((L + 1) * (4 * D * D + 2 * D * hidden) + 2 * (L + 1) ** 2 * D)
    macs += n * (L * (6 * D * D + 2 * D * hidden) + M * 2 * D * D + 2 * L * L * D + 2 * L * M * D) + L * D * config.vocab
    assert counter.get_total_flops() == 2 * macs
    encoder, decoder = numbers(model.image), numbers(model.unimodal) + numbers(model.multimodal)
    assert numbers(model.multimodal.blocks[0]) == 8 * D * D + 2 * D * hidden + 15 * D + hidden
    published = PUBLISHED[size]
    # The paper's sum is encoder and decoder; the poolers, 8 D^2 and a table of queries, come on top of it.
    counts = (encoder / 1e6, decoder / 1e6, (encoder + decoder) / 1e6)
    if size == "CoCa":
        assert counts == pytest.approx(published, rel=0.08)
    else:
        assert counts[0] == pytest.approx(published[0], abs=1)
        assert (round(counts[1]), round(counts[2])) == published[1:]
    poolers = 8 * D * D + 8 * D + (M + 1) * D + 4 * D
    assert numbers(model) == encoder + decoder + poolers + 1
    assert model.unimodal.tokens.weight is not model.multimodal.head.weight, "untied"


def test_the_stated_input_is_the_one_counted() -> None:
    assert stated(SIZES["CoCa"]) == "3 x 288 x 288 image (C, H, W), patch 18, 64 text tokens"
    assert [x.shape for x in example(TINY, 2)] == [(2, 3, 36, 36), (2, 64)]
    assert (SIZES["CoCa"].image // SIZES["CoCa"].patch) ** 2 == 256


Pairs = list[tuple[nn.Parameter, nn.Parameter, slice]]


def of_layer(own: nn.Linear | nn.LayerNorm, other: nn.Linear | nn.LayerNorm) -> Pairs:
    return [(own.weight, other.weight, slice(None)), (own.bias, other.bias, slice(None))]


def of_self(own: SelfAttention, other: nn.MultiheadAttention) -> Pairs:
    stacked = [(own.qkv.weight, other.in_proj_weight, slice(None)), (own.qkv.bias, other.in_proj_bias, slice(None))]
    return stacked + of_layer(own.out, other.out_proj)


def of_cross(own: CrossAttention, other: nn.MultiheadAttention) -> Pairs:
    q, kv = slice(0, other.embed_dim), slice(other.embed_dim, None)
    apart = [(own.q.weight, other.in_proj_weight, q), (own.q.bias, other.in_proj_bias, q)]
    apart += [(own.kv.weight, other.in_proj_weight, kv), (own.kv.bias, other.in_proj_bias, kv)]
    return apart + of_layer(own.out, other.out_proj)


def copied(pairs: Pairs) -> None:
    """Random weights of the reference, far from its initial ones, into ours."""
    torch.manual_seed(4)
    for other in {id(other): other for _, other, _ in pairs}.values():
        other.data.add_(torch.randn_like(other) * 0.2)
    for own, other, where in pairs:
        own.data.copy_(other.data[where])


def same_gradients(pairs: Pairs) -> None:
    for own, other, where in pairs:
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad, other.grad[where], atol=1e-5 * float(other.grad.abs().max()), rtol=1e-4)


def test_a_pooler_equals_torchs_attention() -> None:
    reference, pool = nn.MultiheadAttention(32, 4, batch_first=True), AttentionPool(32, 4, queries=5)
    pairs = of_cross(pool.attention, reference)
    copied(pairs)
    context, mask = torch.randn(2, 7, 32), torch.arange(7) < torch.tensor([[7], [3]])
    query = pool.queries.detach().clone().requires_grad_()
    expected, _ = reference(query.expand(2, -1, -1), context, context, key_padding_mask=~mask, need_weights=False)
    found = pool(context, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected.square().mean().backward()
    found.square().mean().backward()
    same_gradients(pairs)
    torch.testing.assert_close(pool.queries.grad, query.grad, atol=1e-5, rtol=1e-4)


def test_a_pooler_of_a_pack_pools_each_sample_alone() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(16, 2, queries=3, context_dim=8, qk_norm=True, bias=False)
    lengths = [4, 4, 0, 2]
    context = torch.randn(1, sum(lengths), 8)
    packed = pool(context, segments=Segments.of_self(lengths))
    assert packed.shape == (1, 12, 16)
    singles = torch.cat([pool(one) for one in context.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, singles, atol=1e-6, rtol=0)
    assert packed[0, 6:9].eq(0).all(), "nothing to see"
    assert packed[0, :6].abs().min(-1).values.max() > 0


@pytest.mark.parametrize("causal", [False, True])
def test_a_unimodal_block_equals_torchs_encoder_layer(causal: bool) -> None:
    reference = nn.TransformerEncoderLayer(32, 4, 40, 0.0, "gelu", EPS, batch_first=True, norm_first=True)
    block = EncoderBlock(32, 4, 40, eps=EPS)
    pairs = of_self(block.attention, reference.self_attn) + of_layer(block.attention_norm, reference.norm1)
    pairs += of_layer(block.mlp_norm, reference.norm2) + of_layer(block.mlp.up, reference.linear1)
    pairs += of_layer(block.mlp.down, reference.linear2)
    copied(pairs)
    assert numbers(block) == numbers(reference)
    x, future = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, found = reference(x, src_mask=future if causal else None), block(x, causal=causal)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected.square().mean().backward()
    found.square().mean().backward()
    same_gradients(pairs)


def test_a_multimodal_block_equals_torchs_decoder_layer() -> None:
    reference = nn.TransformerDecoderLayer(32, 4, 40, 0.0, "gelu", EPS, batch_first=True, norm_first=True)
    block = CaptionBlock(32, 4, 40)
    pairs = of_self(block.attention, reference.self_attn) + of_cross(block.cross, reference.multihead_attn)
    pairs += of_layer(block.attention_norm, reference.norm1) + of_layer(block.cross_norm, reference.norm2)
    pairs += of_layer(block.mlp_norm, reference.norm3) + of_layer(block.mlp.up, reference.linear1)
    pairs += of_layer(block.mlp.down, reference.linear2)
    copied(pairs)
    assert numbers(block) == numbers(reference)
    x, memory, future = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, found = reference(x, memory, tgt_mask=future), block(x, memory)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected.square().mean().backward()
    found.square().mean().backward()
    same_gradients(pairs)


def test_the_contrast_reads_the_captions_pool_only_in_a_cascade(model: CoCa) -> None:
    pixels, _, _ = batch()
    memory, image = model.look(pixels)
    assert memory.shape == (3, 6, 32)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    image.square().sum(0)[0].backward()
    reached = model.caption_pool.queries.grad
    if model.config.pooling == "cascade":
        assert reached is not None
        assert reached.abs().sum() > 0
    else:
        assert reached is None


def test_a_caption_sees_neither_its_future_nor_the_class_token(model: CoCa) -> None:
    pixels, ids, mask = batch()
    base = model(pixels, ids, mask)
    later = ids.clone()
    later[:, 2] = (ids[:, 2] + 1) % 48
    moved = model(pixels, later, mask)
    torch.testing.assert_close(moved.logits[:, :2], base.logits[:, :2], atol=1e-6, rtol=0)
    assert (moved.logits - base.logits)[:, 2:3].abs().amax((1, 2)).min() > 1e-3
    assert (moved.text - base.text).abs().amax(1).min() > 1e-4, "the class token sees every token"
    model.unimodal.cls.data.normal_()
    other = model(pixels, ids, mask)
    assert torch.equal(other.logits, base.logits)
    assert (other.text - base.text).abs().max() > 1e-3


def test_padding_changes_nothing(model: CoCa) -> None:
    pixels, ids, mask = batch()
    base = model(pixels, ids, mask)
    other = model(pixels, torch.where(mask, ids, 40), mask)
    torch.testing.assert_close(other.text, base.text, atol=1e-6, rtol=0)
    torch.testing.assert_close(other.logits[mask], base.logits[mask], atol=1e-6, rtol=0)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = model(pixels[i : i + 1], ids[i : i + 1, :length])
        torch.testing.assert_close(alone.text, base.text[i : i + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.logits[0], base.logits[i, :length], atol=1e-4, rtol=0)
    assert losses(base, ids, mask)["loss"] == losses(base, torch.where(mask, ids, 40), mask)["loss"]


def test_only_the_second_half_sees_the_image(model: CoCa) -> None:
    pixels, ids, mask = batch()
    base, other = model(pixels, ids, mask), model(pixels.flip(0), ids, mask)
    assert torch.equal(base.text, other.text)
    assert (base.logits - other.logits)[0].abs().max() > 1e-3
    torch.testing.assert_close(other.image, base.image.flip(0), atol=1e-6, rtol=0)


def test_losses_are_two_parts_captioning_to_one_of_contrast() -> None:
    g = torch.Generator().manual_seed(5)
    image, text = (F.normalize(torch.randn(3, 8, generator=g), dim=-1) for _ in range(2))
    logits, scale = torch.randn(3, 4, 9, generator=g), torch.tensor(1 / 0.07)
    ids = torch.randint(0, 9, (3, 4), generator=g)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    captioning = []
    for i, length in enumerate((4, 2, 1)):
        for t in range(length - 1):
            captioning.append(-logits[i, t].log_softmax(-1)[ids[i, t + 1]])
    similar = scale * image @ text.T
    contrastive = -(similar.log_softmax(0).diagonal() + similar.log_softmax(1).diagonal()).mean() / 2
    found = losses(CoCaOutput(image, text, logits, scale), ids, mask)
    torch.testing.assert_close(found["captioning"], torch.stack(captioning).mean())
    torch.testing.assert_close(found["contrastive"], contrastive)
    torch.testing.assert_close(found["loss"], 2 * torch.stack(captioning).mean() + contrastive)
    none = losses(CoCaOutput(image, text, logits[:, :1], scale), ids[:, :1], mask[:, :1])
    assert float(none["captioning"]) == 0
    assert float(CoCa(TINY).logit_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_new_model_knows_nothing_of_the_next_token() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        found = losses(CoCa(TINY)(*batch()), batch()[1], batch()[2])
    assert float(found["captioning"]) == pytest.approx(math.log(48), abs=1.0)


def test_captions_are_what_teaching_would_have_said(model: CoCa) -> None:
    pixels, _, _ = batch()
    ids = caption(model, pixels, START, END, limit=9)
    assert ids.shape[1] <= 9
    assert ids[:, 0].eq(START).all()
    said = model(pixels, ids).logits.argmax(-1)
    for row, best in zip(ids, said, strict=True):
        stop = int((row == END).nonzero()[0]) if (row == END).any() else len(row) - 1
        assert torch.equal(row[1 : stop + 1], best[:stop])
    assert caption(model, pixels, START, END, limit=1).tolist() == [[START]] * 3
    with pytest.raises(UserError, match="limit of 0"):
        caption(model, pixels, START, END, limit=0)


def test_a_caption_stops_at_its_end_and_is_what_it_would_be_alone(model: CoCa) -> None:
    pixels, _, _ = batch()
    first = caption(model, pixels, START, -1, limit=6)
    assert first.shape == (3, 6), "an end that never comes"
    end = int(first[0, 2])  # stops the first row at its third token, the others where they say it
    ids = caption(model, pixels, START, end, limit=6, pad=0)
    for i in range(3):
        alone = caption(model, pixels[i : i + 1], START, end, limit=6)[0]
        assert torch.equal(ids[i, : len(alone)], alone)
        assert ids[i, len(alone) :].eq(0).all()
    assert ids[0, : int((first[0] == end).nonzero()[0]) + 1][-1] == end
    assert caption(model, pixels[:1], START, int(first[0, 1]), limit=6).shape == (1, 2), "nothing left to say"


def test_frames_are_encoded_alone_and_pooled_together(model: CoCa) -> None:
    video, ids, mask = batch(3, frames=3)
    memory, image = model.look(video)
    assert memory.shape == (3, 6, 32)
    for one, other in zip(model.look(video.flip(2)), (memory, image), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for one, other in zip(model.look(video[:, :, :1]), model.look(video[:, :, 0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    still = video[:, :, :1].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(model.look(still)[1], model.look(video[:, :, 0])[1], atol=1e-5, rtol=0)
    assert model(video, ids, mask).logits.shape == (3, 7, 48)
    frames = torch.stack([model.look(video[:, :, t])[1] for t in range(3)], dim=1)
    mean = model.embed_frames(video)
    torch.testing.assert_close(mean, F.normalize(frames.mean(1), dim=-1), atol=1e-5, rtol=0)
    assert (mean - image).abs().max() > 1e-3


def test_poolers_may_be_told_the_order_of_frames() -> None:
    torch.manual_seed(0)
    model = CoCa(replace(TINY, frames=3))
    video, _, _ = batch(2, frames=3)
    assert (model.look(video.flip(2))[1] - model.look(video)[1]).abs().max() > 1e-3
    assert model.look(video[:, :, :2])[0].shape == (2, 6, 32)
    with pytest.raises(UserError, match="there are places for 3"):
        model.look(batch(2, frames=4)[0])


def test_blocks_may_read_all_frames_together() -> None:
    torch.manual_seed(0)
    model = CoCa(replace(TINY, frames=3, video_depth=1))
    video, ids, mask = batch(2, frames=3)
    plain = model.look(video)[0]
    # One frame changes what the decoder is told of the others: tokens were compared before they were pooled.
    assert model.video is not None
    tokens = torch.randn(1, 8, 32)
    other = tokens.clone()
    other[:, 0] = torch.randn(32)  # a shift alone would be normed away
    assert (model.video(tokens)[:, 1:] - model.video(other)[:, 1:]).abs().max() > 1e-4
    assert (model.look(video.flip(2))[0] - plain).abs().max() > 1e-3
    losses(model(video, ids, mask), ids, mask)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.video.parameters())
    still = CoCa(replace(TINY, video_depth=1))
    for one, alone in zip(still.look(video[:, :, :1]), still.look(video[:, :, 0]), strict=True):
        torch.testing.assert_close(one, alone, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="video_depth at least 0"):
        replace(TINY, video_depth=-1)


def test_another_image_size_is_read(model: CoCa) -> None:
    assert model.look(torch.randn(2, 3, 72, 54))[0].shape == (2, 6, 32)
    with pytest.raises(UserError, match="multiples of 18"):
        model.look(torch.randn(2, 3, 36, 37))
    with pytest.raises(UserError, match="rearrange"):
        model.look(torch.randn(3, 36, 36))


def test_gradient_reaches_every_parameter(model: CoCa) -> None:
    pixels, ids, mask = batch(3, frames=2)
    losses(model(pixels, ids, mask), ids, mask)["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_built_on_meta_then_filled_equals_built_in_place(model: CoCa) -> None:
    with torch.device("meta"):
        late = CoCa(model.config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    torch.manual_seed(3)
    model.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "at least 1"),
        ({"width": 100}, "12 heads need .* got 100; try 768"),
        ({"image": 300}, "try 306"),
        ({"pooling": "max"}, "cascade or parallel"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CoCaConfig(**settings)  # type: ignore[arg-type]


def test_images_and_captions_must_pair_up() -> None:
    pixels, ids, _ = batch()
    with pytest.raises(UserError, match="3 images and 2 captions"):
        CoCa(TINY)(pixels, ids[:2])
