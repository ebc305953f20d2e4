"""NaViT: packed equals one by one, samples keep apart, kept tokens keep their places, nothing shown is never NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.models.navit import SIZES, NaViT, NaViTConfig, example, look_up, places, stated, tiny
from tubelet.nn.dropping import BetaRate, keep_tokens
from tubelet.nn.patch import token_grid

SMALL = NaViTConfig(32, 2, 4, patch=(1, 4, 4), max_frames=5, max_side=8, outputs=6)
# Images and clips, wide and tall, (T, H, W); two neighbours of equal size, which attention computes in one call.
SHAPES = [(1, 8, 8), (3, 4, 12), (3, 4, 12), (1, 16, 4), (2, 8, 20)]


@pytest.fixture(params=["absolute-classes", "fractional-contrastive"])
def model(request: pytest.FixtureRequest) -> NaViT:
    positions, head = request.param.split("-")
    return built(positions=positions, head=head)


def built(**settings: Any) -> NaViT:
    """A small network whose positions and classifier bias are as large as after training."""
    torch.manual_seed(0)
    network = NaViT(replace(SMALL, **settings))
    for name, p in network.named_parameters():
        if name.endswith(("table", "bias")):
            nn.init.normal_(p, std=0.5)
    return network


def clips(seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=g) for shape in SHAPES]


def some_kept() -> list[Tensor]:
    """What a Beta-distributed rate leaves of `clips`: of one everything, of one a single token."""
    lengths = [int(np.prod(token_grid(shape, SMALL.patch))) for shape in SHAPES]
    g = torch.Generator().manual_seed(2)
    rates = BetaRate(0.5, 0.9)(lengths, g).tolist()
    kept = [keep_tokens(length, rate, g) for length, rate in zip(lengths, [0.0, *rates[1:-1], 1.0], strict=True)]
    assert (len(kept[0]), len(kept[-1])) == (lengths[0], 1)
    return kept


def test_counts_agree_with_arithmetic() -> None:
    c = SIZES["B/16"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = NaViT(c)
        out = network(*example(c, 1))
    D, L, cells = 768, (224 // 16) ** 2, 16 * 16 * 3
    assert out.shape == (1, 1000)
    # A block: q, k, v and out, an MLP of four widths, the gains of two layer norms and of q and k (64 a head).
    block = 4 * D * D + 8 * D * D + 2 * D + 2 * 64
    # The pooler: a query, q, k, v and out, gains of q and k, a layer norm, an MLP of four widths.
    pooler = D + 4 * D * D + 2 * 64 + D + 8 * D * D
    parameters = cells * D + (32 + 64 + 64) * D + 12 * block + D + pooler + D * 1000 + 1000
    assert sum(p.numel() for p in network.parameters()) == parameters == 93_516_648
    # Per block 12 D^2 a token and two products of L x L x D; the pooler has one query: q, out and MLP act on one row.
    macs = L * cells * D + 12 * (12 * L * D * D + 2 * L * L * D) + (2 * L + 10) * D * D + 2 * L * D + D * 1000
    assert counter.get_total_flops() // 2 == macs == 17_709_060_096


def test_the_size_is_vit_base_with_patches_of_sixteen() -> None:
    c = SIZES["B/16"]
    assert (c.width, c.depth, c.width // c.heads, c.patch) == (768, 12, 64, (1, 16, 16))
    assert stated(c) == "3 x 1 x 224 x 224 pixels (C, T, H, W), patch 1 x 16 x 16"
    assert from_dict(NaViTConfig, to_dict(c)) == c
    assert example(tiny(c), 2)[0].shape == (2, 3, 1, 224, 224)
    assert NaViT(tiny(c))(*example(tiny(c), 2)).shape == (2, 10)


def test_no_bias_but_the_classifiers() -> None:
    assert [name for name, _ in built().named_parameters() if name.endswith("bias")] == ["head.bias"]
    assert [name for name, _ in built(head="contrastive").named_parameters() if name.endswith("bias")] == []


@pytest.mark.parametrize("dropped", [False, True])
def test_packed_equals_one_by_one(model: NaViT, dropped: bool) -> None:
    kept = some_kept() if dropped else None
    weights = torch.randn(len(SHAPES), SMALL.outputs, generator=torch.Generator().manual_seed(4))
    results = []
    for together in (True, False):
        samples = [clip.requires_grad_() for clip in clips()]
        if together:
            out = model.forward_packed(samples, kept)
        elif kept is not None:
            out = torch.cat([model.forward_packed([clip], [k]) for clip, k in zip(samples, kept, strict=True)])
        else:
            out = torch.cat([model(clip[None]) for clip in samples])
        assert out.shape == (len(SHAPES), SMALL.outputs)
        results.append((out, *torch.autograd.grad((out * weights).sum(), [*model.parameters(), *samples])))
    assert results[0][0].std() > 0.1
    for packed, alone in zip(*results, strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_the_order_in_a_pack_is_of_no_account(model: NaViT) -> None:
    samples = clips()
    torch.testing.assert_close(model.forward_packed(samples[::-1]).flip(0), model.forward_packed(samples), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_poisoned_sample_changes_no_other(model: NaViT, poison: float) -> None:
    clean = model.forward_packed(clips())
    samples = clips()
    samples[1].fill_(poison)
    samples = [clip.requires_grad_() for clip in samples]
    out = model.forward_packed(samples)
    others = [0, 2, 3, 4]
    assert not out[1].isfinite().any()
    torch.testing.assert_close(out[others], clean[others], atol=0, rtol=0)
    for grad in torch.autograd.grad(out[others].sum(), [samples[i] for i in others]):
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_what_is_dropped_is_not_seen_and_what_is_kept_is(model: NaViT) -> None:
    image = torch.randn(3, 1, 8, 12)
    kept = [torch.tensor([0, 2, 5])]
    base = model.forward_packed([image], kept)
    for token in range(6):
        changed = image.clone()
        changed[:, :, token // 3 * 4 : token // 3 * 4 + 4, token % 3 * 4 : token % 3 * 4 + 4] += 1
        moved = (model.forward_packed([changed], kept) - base).abs().max()
        assert (moved > 1e-3) if token in (0, 2, 5) else (moved == 0), token


def test_kept_tokens_keep_their_places(model: NaViT) -> None:
    """Only positions tell a token from its neighbour in an even image, and so which two of its tokens are shown."""
    image = torch.ones(3, 1, 8, 12)
    shown = [model.forward_packed([image], [torch.tensor(pair)]) for pair in ([0, 1], [0, 2], [0, 4], [3, 5])]
    for i, one in enumerate(shown):
        for other in shown[:i]:
            assert (one - other).abs().max() > 1e-3
    mixed = model.forward_packed([image], [torch.tensor([5, 0, 2])])
    torch.testing.assert_close(mixed, model.forward_packed([image], [torch.tensor([0, 2, 5])]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward_packed([image], [torch.arange(6)]), model(image[None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["some", "all"])
def test_a_sample_of_which_nothing_is_shown_is_never_nan(model: NaViT, which: str) -> None:
    none = torch.zeros(0, dtype=torch.long)
    kept = [none if which == "all" or i in (0, 3) else torch.arange(2) for i in range(len(SHAPES))]
    out = model.forward_packed(clips(), kept)
    nothing = model.head.bias if model.config.head == "classes" else torch.zeros(SMALL.outputs)
    for row, shown in zip(out, kept, strict=True):
        assert torch.equal(row, nothing) == (not len(shown))
    out.square().sum().backward()
    assert out.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is None or (p.grad.isfinite().all() and float(p.grad.abs().max()) < 1e3), name


def test_no_sample_at_all(model: NaViT) -> None:
    assert model.forward_packed([]).shape == (0, SMALL.outputs)
    assert model.forward_packed([], []).shape == (0, SMALL.outputs)


def test_absolute_positions_are_entries_of_three_tables_summed() -> None:
    network = built()
    at = places((2, 3, 2), network.config)
    seen: list[Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.zeros(1, 3, 2, 12, 8))
    expected = [network.t_table[t] + network.y_table[y] + network.x_table[x] for t in (0, 1) for y in (0, 1, 2) for x in (0, 1)]
    torch.testing.assert_close(seen[0][0], torch.stack(expected))
    assert at[5].tolist() == [0, 2, 1]


@pytest.mark.parametrize("columns", [1, 3, 8, 13])
def test_fractional_positions_interpolate_the_table(columns: int) -> None:
    config, table = replace(SMALL, positions="fractional"), torch.randn(8, 4)
    at = places((1, 1, columns), config)[:, 2]
    read = look_up(table, at)
    # Entry i stands at the fraction i / 8 of the side, patch p at p / columns.
    side, entries = np.arange(columns) / columns, np.arange(8) / 8
    expected = np.stack([np.interp(side, entries, table[:, d].numpy()) for d in range(4)], axis=1)
    torch.testing.assert_close(read, torch.from_numpy(expected).float())
    if columns == 8:
        assert torch.equal(read, table), "a side as long as the table has absolute places"


def test_a_fraction_is_the_same_place_at_every_size() -> None:
    config = replace(SMALL, positions="fractional")
    small, large = places((1, 2, 4), config), places((1, 4, 16), config)
    assert small[6].tolist() == large[2 * 16 + 8].tolist() == [0, 4, 4], "the middle"
    assert places((40, 1, 1), config)[-1, 0] == 4, "no place lies beyond the table"


def test_time_height_and_width_all_matter(model: NaViT) -> None:
    clip = torch.randn(1, 3, 4, 4, 4).repeat_interleave(4, 3).repeat_interleave(4, 4)  # even inside a patch
    base = model(clip)
    for axis in (2, 3, 4):
        assert (model(clip.flip(axis)) - base).abs().max() > 1e-3, axis


def test_an_image_is_a_clip_of_one_frame(model: NaViT) -> None:
    clip = torch.randn(3, 3, 8, 8)
    first = model.forward_packed([clip], [torch.arange(4)])
    torch.testing.assert_close(first, model(clip[None, :, :1]), atol=1e-5, rtol=1e-5)


def test_tubelets_of_several_frames() -> None:
    network = built(patch=(2, 4, 4))
    out = network.forward_packed([torch.randn(3, 5, 4, 8), torch.randn(3, 1, 8, 8)])
    assert out.isfinite().all()
    with pytest.raises(UserError, match="latent frames"):
        network(torch.randn(1, 3, 4, 4, 8))


def test_contrastive_vectors_have_length_one() -> None:
    out = built(head="contrastive").forward_packed(clips())
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(len(SHAPES)))


@pytest.mark.parametrize("head", ["classes", "contrastive"])
@pytest.mark.parametrize("positions", ["absolute", "fractional"])
def test_gradient_reaches_every_parameter(
    positions: Literal["absolute", "fractional"], head: Literal["classes", "contrastive"]
) -> None:
    torch.manual_seed(0)
    network = NaViT(replace(SMALL, positions=positions, head=head))
    (network.forward_packed(clips(), some_kept()) * torch.randn(len(SHAPES), SMALL.outputs)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "try 192"),
        ({"depth": 0}, "at least 1"),
        ({"patch": (1, 0, 8)}, "at least 1"),
        ({"positions": "rotary"}, "absolute or fractional"),
        ({"head": "none"}, "classes or contrastive"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NaViTConfig(**settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    network = built()
    with pytest.raises(UserError, match="latent width must be a multiple of 4, got 7"):
        network(torch.randn(1, 3, 1, 8, 7))
    with pytest.raises(UserError, match="9 columns of patches exceed the 8 learned places"):
        network(torch.randn(1, 3, 1, 4, 36))
    with pytest.raises(UserError, match="6 frames of patches exceed the 5 learned places"):
        network(torch.randn(1, 3, 6, 4, 4))
    with pytest.raises(UserError, match="4 channels, the network takes 3"):
        network(torch.randn(1, 4, 1, 4, 4))
    with pytest.raises(UserError, match="5 clips, 1 lists of kept tokens"):
        network.forward_packed(clips(), [torch.arange(1)])
    assert built(positions="fractional")(torch.randn(1, 3, 6, 4, 36)).isfinite().all(), "fractions fit every size"
