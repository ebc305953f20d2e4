from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tubelet.nn.attention import CrossAttention, KeyValues, SelfAttention, attention, fused, use_backend
from tubelet.nn.positions import RotaryEmbedding, grid_positions, rotate


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention written out in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    whole = torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool) if mask is None else mask.expand(*q.shape[:-1], -1)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:-1])).tolist():
        b, n, i = index
        seen = whole[b, n, i].nonzero()[:, 0]
        if len(seen):
            scores = (k[b, n, seen] @ q[b, n, i]) / math.sqrt(q.shape[-1])
            weights = (scores - scores.max()).exp()
            out[b, n, i] = (weights / weights.sum()) @ v[b, n, seen]
    return out


def qkv(L: int = 5, M: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, 8, generator=generator) for n in (L, M, M))  # type: ignore[return-value]


def test_matches_a_plain_softmax() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v).double(), plain(q, k, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (1, 1, 5, 7), (2, 3, 5, 7)])
def test_mask_matches_a_plain_softmax(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    torch.testing.assert_close(attention(q, k, v, mask=mask).double(), plain(q, k, v, mask), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("L", "M"), [(5, 5), (2, 6), (1, 6)])
def test_causal_counts_from_the_end(L: int, M: int) -> None:
    q, k, v = qkv(L, M)
    mask = torch.tensor([[j <= i + M - L for j in range(M)] for i in range(L)])
    torch.testing.assert_close(attention(q, k, v, causal=True).double(), plain(q, k, v, mask), atol=2e-6, rtol=0)
    open_to_even = torch.arange(M) % 2 == 0
    both = attention(q, k, v, mask=open_to_even, causal=True).double()
    torch.testing.assert_close(both, plain(q, k, v, mask & open_to_even), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_zero_forward_and_backward(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv())
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2:] = True
    out = attention(q, k, v, mask=mask)
    assert out[1].eq(0).all()
    assert out[0, :, :2].eq(0).all()
    assert out[0, :, 2:].ne(0).any()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad[1].eq(0).all()


def test_no_keys_at_all_gives_zeros() -> None:
    q, k, v = qkv(5, 0)
    assert attention(q, k, v).eq(0).all()
    assert attention(q, k, v, mask=torch.ones(2, 1, 1, 0, dtype=torch.bool)).shape == q.shape


def test_self_attention_module_matches_its_parts() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(24, 3)
    x, rope = torch.randn(2, 6, 24), RotaryEmbedding((4, 2, 2))(grid_positions(1, 2, 3))
    q, k, v = (t.reshape(2, 6, 3, 8).transpose(1, 2) for t in layer.qkv(x).split(24, dim=-1))

    def unit(t: Tensor) -> Tensor:
        return t / t.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    out = plain(rotate(unit(q), rope), rotate(unit(k), rope), v).transpose(1, 2).reshape(2, 6, 24)
    torch.testing.assert_close(layer(x, rope), out.float() @ layer.out.weight.T, atol=1e-5, rtol=0)


def test_past_streams_exactly() -> None:
    torch.manual_seed(0)
    layer, x, past = SelfAttention(16, 2), torch.randn(1, 6, 16), KeyValues()
    whole = layer(x, causal=True)
    pieces = [layer(part, causal=True, past=past) for part in x.split([1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-6, rtol=0)


def test_cross_attention_ignores_padding_and_survives_an_empty_context() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(16, 2, 12)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    out = layer(x, context, mask)
    torch.testing.assert_close(out[:1], layer(x[:1], context[:1, :2]), atol=1e-6, rtol=0)
    assert out[1].eq(0).all()
    assert layer(x, context[:, :0], mask[:, :0]).eq(0).all()


def test_cross_attention_turns_queries_only() -> None:
    torch.manual_seed(0)
    layer, rope = CrossAttention(16, 2, 12), RotaryEmbedding((4, 2, 2))(torch.rand(5, 3) * 4)
    x, context = torch.randn(1, 5, 16), torch.randn(1, 4, 12)
    q = rotate(layer.q_norm(layer.q(x).view(1, 5, 2, 8).transpose(1, 2)), rope)
    k, v = (t.view(1, 4, 2, 8).transpose(1, 2) for t in layer.kv(context).chunk(2, dim=-1))
    out = plain(q, layer.k_norm(k), v).transpose(1, 2).reshape(1, 5, 16).float() @ layer.out.weight.T
    torch.testing.assert_close(layer(x, context, rope=rope), out, atol=1e-5, rtol=0)


def test_a_backend_can_be_replaced_from_outside() -> None:
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(mask)
        return fused(q, k, v, mask)

    q, k, v = qkv()
    use_backend(counted)
    try:
        assert torch.equal(attention(q, k, v), fused(q, k, v, None))
    finally:
        use_backend(fused)
    attention(q, k, v)
    assert calls == [None]


@pytest.mark.parametrize("make", [lambda: SelfAttention(10, 3), lambda: CrossAttention(10, 3, 4)])
def test_width_must_divide_into_heads(make: object) -> None:
    with pytest.raises(AssertionError, match="3 heads"):
        make()  # type: ignore[operator]
