from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.decoding.masked import decode, draw_hidden
from tubelet.models.maskgit import SIZES, BERTBlock, MaskGIT, MaskGITConfig, example, guided, stated, tiny, token_loss
from tubelet.nn.subtokens import MASK

TINY = tiny(SIZES["MLM"])


@pytest.fixture
def model() -> MaskGIT:
    """As after some training: nothing is zero any more, and logits are no whisper."""
    torch.manual_seed(0)
    model = MaskGIT(TINY).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=float(p.eq(1).all()), std=0.3)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (batch, 12), generator=g)
    tokens[:, ::3] = MASK
    hinted = torch.zeros(batch, 12, dtype=torch.bool)
    hinted[:, 1::4] = True
    return tokens, torch.tensor([2, 10, 7])[:batch], hinted


# Counts


def test_counts_are_those_of_the_stated_shape() -> None:
    c = SIZES["MLM"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = MaskGIT(c)
        model(*example(c))
    D, N, L, words = 1024, 24, 1281, 2 * 512
    parameters = sum(p.numel() for p in model.parameters())
    ends = words * D + D + 102 * D + 2 * D + L * D + 2 * D + (D**2 + D + 2 * D) + words
    assert parameters == N * (12 * D**2 + 13 * D) + ends
    assert round(parameters / 1e6) == 306, "the paper prints 307 M without saying what stands around BERT-large's blocks"
    assert counter.get_total_flops() // 2 == N * (12 * L * D**2 + 2 * L**2 * D) + (L - 1) * (D**2 + words * D)
    assert stated(c) == "1280 tokens of 262,144 words, one of 101 classes"


# Against independent arithmetic


@torch.no_grad()
def test_a_block_is_torchs_post_norm_layer() -> None:
    torch.manual_seed(0)
    block = BERTBlock(32, 2, 0.1).eval()

    def gelu(h: Tensor) -> Tensor:  # not `nn.GELU`: torch's fast path would take the exact one for it
        return F.gelu(h, approximate="tanh")

    theirs = nn.TransformerEncoderLayer(32, 2, 128, 0.1, activation=gelu, layer_norm_eps=1e-12, batch_first=True).eval()
    pairs = (
        (theirs.self_attn.in_proj_weight, block.attention.qkv.weight),
        (theirs.self_attn.in_proj_bias, block.attention.qkv.bias),
        (theirs.self_attn.out_proj.weight, block.attention.out.weight),
        (theirs.self_attn.out_proj.bias, block.attention.out.bias),
        *((getattr(theirs.linear1, n), getattr(block.mlp.up, n)) for n in ("weight", "bias")),
        *((getattr(theirs.linear2, n), getattr(block.mlp.down, n)) for n in ("weight", "bias")),
        *((getattr(theirs.norm1, n), getattr(block.attention_norm, n)) for n in ("weight", "bias")),
        *((getattr(theirs.norm2, n), getattr(block.mlp_norm, n)) for n in ("weight", "bias")),
    )
    for a, b in pairs:
        a.copy_(b.normal_(std=0.3))
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(block(x), theirs(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_embeddings_are_summed_and_heads_share_them(model: MaskGIT) -> None:
    """A model without blocks, place by place."""
    bare = MaskGIT(replace(TINY, depth=1)).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "blocks.1." not in k})
    bare.blocks = nn.ModuleList()
    logits = bare(torch.tensor([[3 + 8 * 5, MASK, 7]]), torch.tensor([4]), torch.tensor([[False, False, True]]))
    for place, (tokens, segment) in enumerate((((3, 5), 0), (None, 0), ((7, 0), 1))):
        x = model.mask if tokens is None else model.words[0, tokens[0]] + model.words[1, tokens[1]]
        x = x + model.positions[1 + place] + model.segments.weight[segment]
        x = F.layer_norm(x, (32,), model.norm_in.weight, model.norm_in.bias)
        x = F.gelu(F.linear(x, model.head.weight, model.head.bias), approximate="tanh")
        x = F.layer_norm(x, (32,), model.head_norm.weight, model.head_norm.bias)
        for g in range(2):
            torch.testing.assert_close(logits[0, place, g], model.words[g] @ x + model.bias[g], atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_of_whole_tokens() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 2, 8), torch.randint(64, (2, 5))
    where = torch.tensor([[True, True, False, False, True], [False, False, False, True, False]])
    joint = (logits[..., 1, :, None] + logits[..., 0, None, :]).flatten(-2)  # (B, L, 64): word 0 is the lower digit
    each = F.cross_entropy(joint.transpose(1, 2), ids, reduction="none")
    expected = (each[0][where[0]].mean() + each[1][where[1]].mean()) / 2
    torch.testing.assert_close(token_loss(logits, ids, where, smoothing=0.0), expected)
    assert token_loss(logits, ids, where, smoothing=0.1) != expected
    assert token_loss(logits, ids, torch.zeros(2, 5, dtype=torch.bool)) == 0


# What it promises


@torch.no_grad()
def test_every_input_matters_everywhere(model: MaskGIT) -> None:
    tokens, label, hinted = inputs()
    base = model(tokens, label, hinted)
    assert base.shape == (3, 12, 2, 8)
    changed = tokens.clone()
    changed[:, 11] = 9
    assert ((model(changed, label, hinted) - base).abs().amax((2, 3)) > 1e-5).all(), "both ways"
    hidden = tokens.clone()
    hidden[:, 11] = MASK
    assert (model(hidden, label, hinted) - model(changed, label, hinted)).abs().max() > 1e-3
    assert (model(tokens, label.flip(0), hinted) - base)[0].abs().max() > 1e-3
    assert (model(tokens, label) - base).abs().max() > 1e-3
    assert torch.equal(model(tokens, label), model(tokens, label, torch.zeros_like(hinted)))
    assert torch.equal(model(tokens), model(tokens, torch.full((3,), 10)))
    assert (model(tokens.flip(1), label, hinted.flip(1)).flip(1) - base).abs().max() > 1e-3, "a token knows its place"


@torch.no_grad()
def test_an_image_takes_the_first_places(model: MaskGIT) -> None:
    tokens, label, _ = inputs()
    short = MaskGIT(replace(TINY, length=4)).eval()
    state = model.state_dict()
    short.load_state_dict({**state, "positions": state["positions"][:5]})
    torch.testing.assert_close(model(tokens[:, :4], label), short(tokens[:, :4], label))


@torch.no_grad()
def test_batch_equals_singles(model: MaskGIT) -> None:
    batch = inputs()
    singles = [model(*(one[i : i + 1] for one in batch)) for i in range(3)]
    torch.testing.assert_close(model(*batch), torch.cat(singles), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_guidance_leads_away_from_what_knows_neither_label_nor_hints(model: MaskGIT) -> None:
    tokens, label, hinted = inputs()
    given, null = model(tokens, label, hinted), model(tokens.masked_fill(hinted, MASK))
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(guided(model, tokens, label, hinted, 1.0), given, **close)
    torch.testing.assert_close(guided(model, tokens, label, hinted, 0.0), null, **close)
    torch.testing.assert_close(guided(model, tokens, label, hinted, 3.0), null + 3 * (given - null), **close)
    torch.testing.assert_close(guided(model, tokens, label, scale=1.0), model(tokens, label), **close)


@pytest.fixture
def reader() -> MaskGIT:
    """One that reads prompts."""
    torch.manual_seed(0)
    model = MaskGIT(replace(TINY, text_width=6)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=float(p.eq(1).all()), std=0.3)
    return model


def prompts(batch: int = 3, length: int = 4) -> Condition:
    g = torch.Generator().manual_seed(4)
    mask = torch.arange(length) < torch.tensor([4, 2, 3])[:batch, None]
    return Condition(torch.randn(3, 4, 6, generator=g)[:batch, :length], mask)


@torch.no_grad()
def test_prompts_stand_where_the_class_did(reader: MaskGIT) -> None:
    tokens, _, hinted = inputs()
    text = prompts()
    base = reader(tokens, text, hinted)
    assert base.shape == (3, 12, 2, 8)
    shown = Condition(text.states.masked_fill(~text.mask[..., None], 9.0), text.mask)
    assert torch.equal(reader(tokens, shown, hinted), base), "padding is not seen"
    torch.testing.assert_close(reader(tokens[1:2], Condition(text.states[1:2, :2], text.mask[1:2, :2]), hinted[1:2]), base[1:2])
    other = Condition(text.states.flip(0), text.mask.flip(0))
    assert (reader(tokens, other, hinted) - base)[0].abs().amax((1, 2)).min() > 1e-4, "every place reads them"
    # A prompt of one state is one token in front, as a label is.
    labelled = MaskGIT(replace(TINY, classes=1)).eval()
    state = {name: value for name, value in reader.state_dict().items() if not name.startswith("text_in")}
    one = Condition(text.states[:, :1], torch.ones(3, 1, dtype=torch.bool))
    labels = reader.text_in(one.states)[:2, 0] if reader.text_in is not None else None
    labelled.load_state_dict({**state, "labels.weight": labels})
    torch.testing.assert_close(reader(tokens[:2], one[:2]), labelled(tokens[:2], torch.tensor([0, 1])), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_are_guided_away_from_the_empty_one(reader: MaskGIT) -> None:
    tokens, _, hinted = inputs()
    text = prompts()
    empty = Condition(torch.ones(3, 1, 6), torch.ones(3, 1, dtype=torch.bool))
    given, null = reader(tokens, text, hinted), reader(tokens.masked_fill(hinted, MASK), empty)
    torch.testing.assert_close(
        guided(reader, tokens, text, hinted, 3.0, empty), null + 3 * (given - null), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UserError, match="give it as null"):
        guided(reader, tokens, text, hinted, 3.0)


def test_labels_and_prompts_are_not_taken_for_each_other(model: MaskGIT, reader: MaskGIT) -> None:
    tokens, label, _ = inputs()
    for bad in (label, None, prompts(2), Condition(torch.zeros(3, 2, 5), torch.ones(3, 2, dtype=torch.bool))):
        with pytest.raises(UserError, match="reads 3 prompts of width 6"):
            reader(tokens, bad)
    with pytest.raises(UserError, match="reads labels"):
        model(tokens, prompts())


def test_clips_are_decoded_the_same_alone_and_together(model: MaskGIT) -> None:
    label = torch.tensor([1, 2, 3])

    def decoded(rows: slice) -> Tensor:
        rngs = [torch.Generator().manual_seed(seed) for seed in range(3)[rows]]
        some = label[rows]
        return decode(
            lambda tokens, hinted, progress: guided(model, tokens, some, hinted, 1 + progress),
            torch.full((len(some), 12), MASK),
            rngs,
            steps=4,
        )

    together = decoded(slice(0, 3))
    assert ((together >= 0) & (together < 64)).all()
    for i in range(3):
        assert torch.equal(together[i : i + 1], decoded(slice(i, i + 1)))


def test_it_learns_hidden_tokens() -> None:
    """One clip of two halves that repeat each other, learned until what is hidden is read off the other half."""
    torch.manual_seed(0)
    model = MaskGIT(replace(TINY, dropout=0.0, depth=1))
    rng, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.arange(12).mul(5).remainder(64).expand(8, -1)
    for _ in range(40):
        hidden = draw_hidden(8, 12, rng)
        loss = token_loss(model(ids.masked_fill(hidden, MASK)), ids, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * 2 * torch.tensor(8.0).log()


def test_dropout_acts_in_training_only(model: MaskGIT) -> None:
    batch = inputs()
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"width": 33}, "try 128"), ({"words": 0}, "at least 1"), ({"dropout": 1.0}, "0.1 is the published one")],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(MaskGITConfig, to_dict(TINY) | settings)


def test_inputs_that_do_not_fit_are_named(model: MaskGIT) -> None:
    tokens, label, hinted = inputs()
    for bad, message in (
        ((torch.zeros(1, 13, dtype=torch.long),), "has 13 tokens, this model holds 12"),
        ((tokens, label[:2]), r"labels \(3,\)"),
        ((tokens, label + TINY.classes + 1), "labels are from 0"),
        ((tokens.clamp(min=0) + 64, label), "tokens are from -1 to 63"),
        ((tokens.clamp(max=0) - 2, label), "tokens are from -1 to 63"),
        ((tokens, label, hinted[:, 1:]), r"hints \(3, 12\)"),
    ):
        with pytest.raises(UserError, match=message):
            model(*bad)
