"""Signs, tokens and entropies against dense arithmetic over every word of small vocabularies, and against another's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tubelet.codecs.quantize import (
    batch_entropy,
    penalties,
    quantize,
    to_ids,
    to_signs,
    token_entropy,
    word_probabilities,
)
from tubelet.core.errors import UserError


def latents(tokens: int, bits: int, scale: float = 1.0) -> Tensor:
    return torch.randn(tokens, bits, generator=torch.Generator().manual_seed(bits), dtype=torch.float32) * scale


def dense(z: Tensor, temperature: float) -> Tensor:
    """Softmax of -|z - c|^2 / temperature over all words c, `(N, 2^d)` float64, word n the one with the bits of n."""
    bits = z.shape[-1]
    words = torch.tensor([[1.0 if n >> i & 1 else -1.0 for i in range(bits)] for n in range(2**bits)], dtype=torch.float64)
    distance = (z.double()[:, None] - words).square().sum(-1)
    return (-distance / temperature).softmax(-1)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


# Parity


def reversed_bits(ids: Tensor, bits: int) -> Tensor:
    """Tokens whose bits are read from the other end."""
    return sum(((ids >> i) & 1) << (bits - 1 - i) for i in range(bits))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_vector_quantize_pytorch_with_gradients(bits: int, temperature: float) -> None:
    """Theirs counts from the most significant bit, and cuts probabilities at 1e-5, which so small latents do not reach."""
    from vector_quantize_pytorch import LFQ

    theirs = LFQ(dim=bits, codebook_size=2**bits, entropy_loss_weight=1.0, commitment_loss_weight=1.0).train()
    a, b = (latents(3 * 20, bits, 0.2).view(3, 20, bits).requires_grad_() for _ in range(2))
    (signs, ids, loss), parts = theirs(a, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(quantize(b), signs)
    assert torch.equal(reversed_bits(to_ids(b), bits), ids)
    assert torch.equal(to_signs(reversed_bits(ids, bits), bits), theirs.indices_to_codes(ids))
    ours = penalties(b, temperature)
    torch.testing.assert_close(token_entropy(b, temperature), parts.per_sample_entropy, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch_entropy(b, temperature), parts.batch_entropy, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["commitment"], parts.commitment, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours["entropy"] + ours["commitment"], loss, atol=2e-5, rtol=1e-4)
    (grad_a,), (grad_b,) = (torch.autograd.grad(one, [z]) for one, z in ((loss, a), (sum(ours.values()), b)))
    torch.testing.assert_close(grad_b, grad_a, atol=1e-6, rtol=1e-3)


# Signs and tokens


def test_bits_count_from_the_least_significant_and_zero_is_unset() -> None:
    z = torch.tensor([[0.1, -3.0, 2.0], [-1.0, 0.0, 0.0], [5.0, 5.0, 5.0], [-0.0, 1e-30, -1.0]])
    assert to_ids(z).tolist() == [1 + 4, 0, 7, 2]
    assert quantize(z).tolist() == [[1, -1, 1], [-1, -1, -1], [1, 1, 1], [-1, 1, -1]]


@pytest.mark.parametrize("bits", [1, 5, 12])
def test_every_word_returns(bits: int) -> None:
    ids = torch.arange(2**bits).view(2, -1)
    signs = to_signs(ids, bits)
    assert signs.abs().eq(1).all()
    assert torch.equal(to_ids(signs), ids)
    assert len(signs.flatten(0, 1).unique(dim=0)) == 2**bits


def test_tokens_of_18_bits_return() -> None:
    ids = torch.tensor([0, 1, 2**17, 2**18 - 1, 174_763])
    assert torch.equal(to_ids(to_signs(ids, 18)), ids)
    z = latents(1000, 18)
    assert torch.equal(to_signs(to_ids(z), 18), quantize(z))


def test_tokens_outside_are_refused() -> None:
    for ids in (torch.tensor([3, 8]), torch.tensor([-1, 2])):
        with pytest.raises(UserError, match=r"tokens of 3 bits lie in \[0, 8\)"):
            to_signs(ids, 3)


def test_the_gradient_passes_the_sign_as_it_is() -> None:
    z = (latents(50, 6) * 1e-3).requires_grad_()
    weight = latents(50, 6, 3.0)
    out = quantize(z)
    assert out.detach().abs().eq(1).all(), "exactly one, whatever z is"
    (out * weight).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, weight)


# Entropies


@pytest.mark.parametrize(("bits", "temperature"), itertools.product((1, 4, 7), (0.3, 1.0, 5.0)))
def test_entropies_are_those_of_the_dense_softmax(bits: int, temperature: float) -> None:
    z = latents(23, bits)
    p = dense(z, temperature)
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(word_probabilities(z, temperature), p.mean(0), **close)
    torch.testing.assert_close(token_entropy(z, temperature), entropy(p).mean(), **close)
    torch.testing.assert_close(batch_entropy(z, temperature), entropy(p.mean(0)), **close)
    expected = entropy(p).mean() - entropy(p.mean(0))
    torch.testing.assert_close(penalties(z, temperature)["entropy"], expected, **close)
    assert torch.equal(penalties(z.view(23, 1, bits), temperature)["entropy"], penalties(z, temperature)["entropy"])


def test_gradients_are_those_of_the_dense_softmax() -> None:
    z = latents(9, 5).requires_grad_()
    theirs = z.detach().clone().requires_grad_()
    penalties(z, 1.0)["entropy"].backward()
    p = dense(theirs, 1.0)
    (entropy(p).mean() - entropy(p.mean(0))).backward()
    torch.testing.assert_close(z.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_the_batch_has_less_entropy_than_its_bits_where_they_go_together() -> None:
    z = latents(64, 1, 5.0).expand(-1, 6)  # six copies of one bit
    assert batch_entropy(z) < 1.01 * math.log(2)
    assert sum(batch_entropy(z[:, i : i + 1]) for i in range(6)) > 5.9 * math.log(2)


def test_certain_and_spread_latents_reach_the_least_penalty_with_finite_gradients() -> None:
    z = to_signs(torch.arange(64), 6).requires_grad_()  # every word once, far from the sign's edge
    entropy_, commitment = penalties(z).values()
    torch.testing.assert_close(entropy_, torch.tensor(-6 * math.log(2)))
    assert commitment == 0
    entropy_.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    same = to_signs(torch.zeros(64, dtype=torch.long), 6)
    assert penalties(same)["entropy"].abs() < 1e-6, "one word for all: nothing is gained"


def test_2_to_the_18_words_stay_affordable() -> None:
    """The tokens of one clip, 5 x 16 x 16: the largest tensor is the vocabulary, not the vocabulary times the tokens."""
    z = latents(1280, 18).requires_grad_()
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = penalties(z, 1.0)["entropy"]
    loss.backward()
    assert largest <= 1280 * 2**9
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    # A bit that is told from the others by its position alone: its marginal is the mean of its own sigmoid.
    p = word_probabilities(z.detach(), 1.0).view(2, 2**8, 2**9)
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    torch.testing.assert_close(p[1].sum(), (4 * z.detach()[:, 17]).sigmoid().mean(), atol=1e-5, rtol=0)


def test_too_many_words_are_refused() -> None:
    with pytest.raises(UserError, match="use 24 bits or fewer"):
        batch_entropy(torch.zeros(2, 25))


def test_commitment_is_the_distance_to_the_signs() -> None:
    z = torch.tensor([[0.5, -2.0]], requires_grad=True)
    loss = penalties(z)["commitment"]
    assert loss == (0.25 + 1.0) / 2
    loss.backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[-0.5, -1.0]]
