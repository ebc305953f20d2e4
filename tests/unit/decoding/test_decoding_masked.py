"""Parallel decoding of hidden tokens: how many, which, by whose randomness."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.decoding.masked import commit, decode, draw_hidden, hidden_share
from tubelet.nn.subtokens import MASK, join_ids, split_ids

L, G, V = 20, 2, 8


def rngs(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(batch: int = 1, length: int = L) -> Tensor:
    return torch.full((batch, length), MASK)


class Network:
    """Fixed logits that depend on what is shown; remembers its calls."""

    def __init__(self, sharpness: float = 3.0) -> None:
        g = torch.Generator().manual_seed(0)
        self.base = torch.randn(L, G, V, generator=g) * sharpness
        self.table = torch.randn(V**G + 1, G, V, generator=g)
        self.calls: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, tokens: Tensor, hinted: Tensor, progress: float) -> Tensor:
        self.calls.append((tokens, hinted, progress))
        return self.base + self.table[tokens].mean(1, keepdim=True) + self.table[tokens].roll(1, dims=1)


# Tokens as digits


def test_ids_are_digits_least_significant_first() -> None:
    assert split_ids(torch.tensor([3 + 8 * 5]), 2, 8).tolist() == [[3, 5]]
    ids = torch.tensor([0, 1, 2**9, 2**18 - 1, 123_456])
    assert torch.equal(join_ids(split_ids(ids, 2, 2**9), 2**9), ids)
    every = torch.arange(V**3)
    assert torch.equal(join_ids(split_ids(every, 3, V), V), every)


# Schedule


def test_the_share_falls_as_a_cosine() -> None:
    assert [round(hidden_share(p), 6) for p in (0.0, 0.5, 1.0)] == [1.0, round(math.sqrt(0.5), 6), 0.0]


def test_training_hides_a_cosine_of_a_uniform_share_anywhere() -> None:
    hidden = draw_hidden(4000, 50, torch.Generator().manual_seed(0))
    counts = hidden.sum(-1)
    assert counts.min() >= 1
    # E[cos(pi/2 u)] = 2/pi, the median cos(pi/4); floor takes half a token.
    assert abs(counts.float().mean() / 50 + 0.01 - 2 / math.pi) < 0.02
    assert abs(counts.float().median() / 50 - math.sqrt(0.5)) < 0.03
    places = hidden.float().mean(0)
    assert places.max() - places.min() < 0.06
    assert torch.equal(hidden, draw_hidden(4000, 50, torch.Generator().manual_seed(0)))


def test_a_hint_stands_where_something_is_hidden_and_something_hinted() -> None:
    tokens, hidden = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[True, True, False, False]])
    hints = torch.tensor([[1, MASK, 2, MASK]])
    shown, hinted = commit(tokens, hidden, hints)
    assert shown.tolist() == [[1, MASK, 7, 8]]
    assert hinted.tolist() == [[True, False, False, False]]
    assert commit(tokens, hidden)[0].tolist() == [[MASK, MASK, 7, 8]]
    assert not commit(tokens, hidden)[1].any()


# Decoding


@pytest.mark.parametrize("steps", [1, 3, 8, L])
def test_every_step_keeps_the_share_and_what_it_has_kept(steps: int) -> None:
    network = Network()
    tokens = decode(network, start(), rngs(0), steps)
    assert len(network.calls) == steps
    assert [c[2] for c in network.calls] == [n / steps for n in range(steps)]
    assert ((tokens >= 0) & (tokens < V**G)).all()
    left = [int((shown == MASK).sum()) for shown, *_ in network.calls] + [0]
    assert left[0] == L
    assert all(a > b for a, b in pairwise(left))
    for n in range(1, steps):
        least = steps - n
        assert left[n] == min(max(int(L * math.cos(math.pi / 2 * n / steps)), least), left[n - 1] - 1)
    for (before, *_), after in zip(network.calls, [c[0] for c in network.calls[1:]] + [tokens], strict=True):
        kept = before != MASK
        assert torch.equal(after[kept], before[kept])


def test_without_noise_it_is_greedy_and_keeps_the_surest() -> None:
    network = Network()
    tokens = decode(network, start(), rngs(0), 4, temperature=0.0, choice_temperature=0.0)
    assert torch.equal(tokens, decode(Network(), start(), rngs(99), 4, temperature=0.0, choice_temperature=0.0))
    logits = Network()(start(), start().bool(), 0.0)[0]  # (L, G, V)
    best = join_ids(logits.argmax(-1), V)
    p = logits.softmax(-1).amax(-1).prod(-1)
    left = int(L * math.cos(math.pi / 8))
    surest = p.argsort(descending=True)[: L - left]
    second = network.calls[1][0][0]
    assert (second != MASK).nonzero()[:, 0].tolist() == surest.sort().values.tolist()
    assert torch.equal(second[surest], best[surest])


def test_words_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()

    def fixed(tokens: Tensor, hinted: Tensor, progress: float) -> Tensor:
        return logits.expand(*tokens.shape, 1, 3)

    def shares(temperature: float) -> Tensor:
        tokens = decode(fixed, start(1, 20_000), rngs(0), 1, temperature)
        return torch.bincount(tokens[0], minlength=3) / 20_000

    torch.testing.assert_close(shares(1.0), logits.exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(shares(0.5), (2 * logits).softmax(-1), atol=0.01, rtol=0)


def test_noise_on_the_confidence_varies_which_place_is_kept_first() -> None:
    sure = torch.linspace(0, 12, 4)[None, :, None, None] * torch.tensor([1.0, 0.0])

    def fixed(tokens: Tensor, hinted: Tensor, progress: float) -> Tensor:
        seen.append(tokens)
        return sure.expand(len(tokens), -1, 1, 2)

    firsts, quiet = set(), set()
    for seed in range(40):
        for noise, found in ((30.0, firsts), (0.0, quiet)):
            seen: list[Tensor] = []
            decode(fixed, start(1, 4), rngs(seed), 4, temperature=0.0, choice_temperature=noise)
            found.add(tuple((seen[1] != MASK)[0].tolist()))
    assert quiet == {(False, False, False, True)}
    assert len(firsts) > 2


def test_a_seed_decides_and_a_batch_is_its_singles() -> None:
    together = decode(Network(), start(3), rngs(1, 2, 3), 6)
    assert torch.equal(together, decode(Network(), start(3), rngs(1, 2, 3), 6))
    for row, seed in zip(together, (1, 2, 3), strict=True):
        assert torch.equal(row[None], decode(Network(), start(), rngs(seed), 6))
    assert not torch.equal(together[0], together[1])


def test_hints_are_shown_until_they_are_replaced() -> None:
    network = Network()
    hints = start()
    hints[0, :5] = torch.arange(5)
    tokens = decode(network, hints, rngs(0), 5)
    shown, hinted, _ = network.calls[0]
    assert torch.equal(shown, hints)
    assert hinted[0].tolist() == [True] * 5 + [False] * 15
    for (_, a, _), (_, b, _) in pairwise(network.calls):
        assert not (b & ~a).any(), "a place is a hint until it is chosen, never again"
    assert network.calls[-1][1].sum() < 5
    assert not torch.equal(tokens[0, :5], torch.arange(5)), "a hint binds nobody"


def test_bad_requests_are_named() -> None:
    network = Network()
    for message, call in (
        ("seed one per sample", lambda: decode(network, start(2), rngs(0))),
        ("in 1 to 20 steps, got 21", lambda: decode(network, start(), rngs(0), 21)),
        ("got 0", lambda: decode(network, start(), rngs(0), 0)),
        ("1 and 4.5 are usual", lambda: decode(network, start(), rngs(0), 4, temperature=-1.0)),
        ("1 and 4.5 are usual", lambda: decode(network, start(), rngs(0), 4, choice_temperature=math.nan)),
        ("keep an axis", lambda: decode(lambda t, h, p: torch.zeros(1, L, V), start(), rngs(0), 4)),
    ):
        with pytest.raises(UserError, match=message):
            call()
