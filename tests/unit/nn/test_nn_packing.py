"""Segments and packs; attention that never looks into a neighbour."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.nn.attention import attention, by_mask
from tubelet.nn.packing import Segments, fill_packs

LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(LENGTHS)
def test_by_segment_is_the_masked_dense_reference(lengths: list[tuple[int, int]]) -> None:
    queries, keys = (tuple(n) for n in zip(*lengths, strict=True))
    segments = Segments(queries, keys)
    g = torch.Generator().manual_seed(len(lengths))
    q, k, v = (torch.randn(1, 2, n, 8, generator=g, requires_grad=True) for n in (sum(queries), sum(keys), sum(keys)))
    out = attention(q, k, v, segments=segments)
    assert out.shape == q.shape
    if not any(n and m for n, m in lengths):
        assert out.eq(0).all()
    else:
        dense = by_mask(q, k, v, segments)
        torch.testing.assert_close(out, dense, atol=1e-6, rtol=1e-5)
        weights = torch.randn(out.shape, generator=g)
        ours = torch.autograd.grad((out * weights).sum(), [q, k, v])
        theirs = torch.autograd.grad((dense * weights).sum(), [q, k, v])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_poisoned_sample_poisons_nobody_else() -> None:
    segments = Segments((3, 4, 3), (2, 5, 2))
    q, k, v = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    clean = attention(q, k, v, segments=segments)
    for x, where in ((q, slice(3, 7)), (k, slice(2, 7)), (v, slice(2, 7))):
        x[:, :, where] = float("nan")
    poisoned = attention(q, k, v, segments=segments)
    assert poisoned[:, :, 3:7].isnan().all()
    torch.testing.assert_close(poisoned[:, :, :3], clean[:, :, :3], atol=0, rtol=0)
    torch.testing.assert_close(poisoned[:, :, 7:], clean[:, :, 7:], atol=0, rtol=0)


def test_a_sample_without_keys_yields_zeros() -> None:
    out = attention(
        torch.randn(1, 1, 5, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), segments=Segments((3, 2), (0, 2))
    )
    assert out[:, :, :3].eq(0).all()
    assert out.isfinite().all()


def test_a_mask_does_not_go_with_segments() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(AssertionError, match="segments alone"):
        attention(q, q, q, causal=True, segments=Segments.of_self([2]))
    with pytest.raises(AssertionError, match="do not fill"):
        attention(q, q, q, segments=Segments.of_self([1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 90), st.floats(0.1, 5))
def test_packs_hold_everything_once_within_the_budget(lengths: list[int], budget: int, ahead: float) -> None:
    packs = fill_packs(lengths, range(len(lengths)), budget, ahead)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= budget for pack in packs)
    assert packs == fill_packs(lengths, range(len(lengths)), budget, ahead)
    waited = [min(pack) for pack in packs]
    assert waited == sorted(waited), "the oldest goes first"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 40))
def test_the_first_pack_is_the_fullest_that_there_is(lengths: list[int], budget: int) -> None:
    packs = fill_packs(lengths, range(len(lengths)), budget, ahead=100)
    others = range(1, len(lengths))
    totals = (lengths[0] + sum(lengths[i] for i in some) for n in range(len(lengths)) for some in combinations(others, n))
    assert sum(lengths[i] for i in packs[0]) == max(total for total in totals if total <= budget)


@pytest.mark.parametrize(("budget", "most"), [(4096, 0.004), (6144, 0.004)])
def test_little_is_left_empty_on_a_realistic_mix(budget: int, most: float) -> None:
    """Images and films of 5 to 33 frames, square and wide, 16 pixels a token."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([16, 24, 28, 36])[torch.randint(4, (4000,), generator=g)]
    frames = torch.tensor([1, 1, 5, 9, 17, 17, 25, 33])[torch.randint(8, (4000,), generator=g)]
    lengths = (sizes * frames).tolist()

    def padding(ahead: float) -> float:
        return 1 - sum(lengths) / (budget * len(fill_packs(lengths, range(len(lengths)), budget, ahead)))

    assert padding(4) < most
    assert padding(1e-9) > 0.5, "one at a time"


def test_an_item_beyond_the_budget_is_refused() -> None:
    with pytest.raises(AssertionError, match="longer than the budget"):
        fill_packs([3, 9], [0, 1], 8)
