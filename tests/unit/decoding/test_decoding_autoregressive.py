from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.decoding.autoregressive import Context, Sampling, sample
from tubelet.models import videopoet
from tubelet.nn.attention import KeyValues, SelfAttention

V = 11
END, PAD = 3, 0


class Reader(nn.Module):
    """A causal layer between a table and a head: what it says hangs on every token before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(V, 16)
        self.places = nn.Embedding(64, 16)
        self.attention = SelfAttention(16, 2, qk_norm=False)
        self.head = nn.Linear(16, V, bias=False)
        self.seen: list[int] = []

    def forward(self, ids: Tensor, cache: KeyValues | None) -> Tensor:
        self.seen.append(ids.shape[1])
        before = 0 if cache is None or cache.k is None else cache.k.shape[-2]
        x = self.tokens(ids) + self.places(torch.arange(before, before + ids.shape[1]))
        x = x + 3 * self.attention(x, causal=True, past=cache)
        return 2 * self.head(x[:, -1])


@pytest.fixture
def reader() -> Reader:
    return Reader()


def prefix(B: int = 3, P: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (B, P), generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 4), Sampling(0.0)])
def test_with_and_without_a_cache_the_same_tokens_are_drawn(reader: Reader, sampling: Sampling, guided: bool) -> None:
    found = []
    for cache in (None, KeyValues):
        null = Context(reader, prefix(P=2, seed=5), cache) if guided else None
        context = Context(reader, prefix(), cache)
        found.append(sample(context, 20, generators(1, 2, 3), sampling=sampling, unguided=null, scale=2.0 if guided else 1.0))
    assert torch.equal(found[0], found[1])
    assert found[0].shape == (3, 20)
    assert len(found[0].unique()) > 2, "a model that says one thing proves nothing"


def test_a_cache_is_read_once_a_token(reader: Reader) -> None:
    sample(Context(reader, prefix(), KeyValues), 5, generators(1, 2, 3))
    assert reader.seen == [4, 1, 1, 1, 1]
    reader.seen.clear()
    sample(Context(reader, prefix()), 5, generators(1, 2, 3))
    assert reader.seen == [4, 5, 6, 7, 8]


def test_a_batch_is_its_singles_and_a_seed_its_tokens(reader: Reader) -> None:
    null = Context(reader, prefix(P=2, seed=5), KeyValues)
    context = Context(reader, prefix(), KeyValues)
    batch = sample(context, 12, generators(7, 8, 9), unguided=null, scale=1.5, end=END, pad=PAD)
    assert torch.equal(batch, sample(context, 12, generators(7, 8, 9), unguided=null, scale=1.5, end=END, pad=PAD))
    for i, seed in enumerate((7, 8, 9)):
        one = Context(reader, context.prefix[i : i + 1], KeyValues)
        none = Context(reader, null.prefix[i : i + 1], KeyValues)
        alone = sample(one, 12, generators(seed), unguided=none, scale=1.5, end=END, pad=PAD)[0]
        assert torch.equal(batch[i, : len(alone)], alone)
        assert batch[i, len(alone) :].eq(PAD).all()
    assert not torch.equal(sample(context, 12, generators(1, 2, 3)), sample(context, 12, generators(4, 5, 6)))


def constant(logits: Tensor) -> Context[None]:
    """Says the same at every place."""
    return Context(lambda ids, cache: logits.expand(len(ids), -1), torch.zeros(1, 1, dtype=torch.long))


def shares(logits: Tensor, sampling: Sampling, n: int = 4000) -> Tensor:
    drawn = sample(constant(logits), n, generators(0), sampling=sampling)
    return torch.bincount(drawn[0], minlength=len(logits)) / n


def test_tokens_come_by_their_probabilities() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0, 2.0, -1.0, -math.inf])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        found = shares(logits, Sampling(temperature))
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
        assert found[[1, 5]].eq(0).all(), "what cannot be is never drawn, at the end of the sum neither"
    found = shares(logits, Sampling(1.0, top_k=2))
    assert found[[0, 4]].eq(0).all()
    assert float(found[3]) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    assert shares(logits, Sampling(1.0, top_k=1), 50)[3] == 1
    assert shares(logits, Sampling(0.0), 50)[3] == 1


def test_top_k_keeps_k_and_their_ratio() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    probabilities = Sampling(0.8, top_k=5).probabilities(logits)
    assert (probabilities > 0).sum(-1).tolist() == [5, 5, 5]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, dtype=torch.float64))
    best = logits.topk(5).indices
    torch.testing.assert_close(probabilities.gather(1, best), (logits.double().gather(1, best) / 0.8).softmax(-1))
    for whole in (0, 20, 99):
        torch.testing.assert_close(Sampling(1.0, whole).probabilities(logits), logits.double().softmax(-1))


def test_guidance_is_on_logits() -> None:
    yes, no = torch.tensor([1.0, 0.9, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    greedy = Sampling(0.0)
    assert sample(constant(yes), 1, generators(0), sampling=greedy).item() == 0
    # no + 2 (yes - no) = (1, 1.8, 0)
    assert sample(constant(yes), 1, generators(0), sampling=greedy, unguided=constant(no), scale=2.0).item() == 1
    drawn = sample(constant(yes), 4000, generators(0), unguided=constant(no), scale=2.0)
    torch.testing.assert_close(torch.bincount(drawn[0]) / 4000, torch.tensor([1.0, 1.8, 0.0]).softmax(-1), atol=0.03, rtol=0)

    def never(ids: Tensor, cache: None) -> Tensor:
        raise AssertionError("a scale of 1 has nothing to ask")

    sample(constant(yes), 2, generators(0), unguided=Context(never, torch.zeros(1, 1)), scale=1.0)


def test_only_choices_are_drawn(reader: Reader) -> None:
    choices = [range(2, 4), range(9, 11), range(5, 6)]
    for seed in range(20):
        drawn = sample(Context(reader, prefix(), KeyValues), 3, generators(seed, seed + 50, seed + 90), choices=choices)
        assert all(token in choice for row in drawn.tolist() for token, choice in zip(row, choices, strict=True))
    logits = torch.arange(6.0)
    drawn = sample(constant(logits), 4000, generators(0), choices=[range(1, 3)] * 4000, sampling=Sampling(top_k=2))
    assert drawn.eq(2).float().mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03), "k among what may be"


def test_it_stops_at_the_end() -> None:
    def counting(ids: Tensor, cache: None) -> Tensor:
        """The next number of each row."""
        return nn.functional.one_hot(ids[:, -1] + 1, V).float() * 50

    start = torch.tensor([[0], [5], [7]])
    found = sample(Context(counting, start), 9, generators(1, 2, 3), sampling=Sampling(0.0), end=8, pad=0)
    assert found.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]]
    assert sample(Context(counting, start), 2, generators(1, 2, 3), end=8).tolist() == [[1, 2], [6, 7], [8, 0]]
    assert sample(Context(counting, start), 3, generators(1, 2, 3)).tolist() == [[1, 2, 3], [6, 7, 8], [8, 9, 10]]


def test_videopoet_goes_on_from_its_prefix() -> None:
    """Text to video, guided from a row without text, with what may stand at each place: codes come out."""
    torch.manual_seed(0)
    model = videopoet.VideoPoet(videopoet.tiny(videopoet.SIZES["300M"])).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    layout, shape = model.config.layout, (2, 2, 3)
    blank = torch.zeros(shape, dtype=torch.long)
    row, bare = videopoet.text_to_video(layout, blank, 3), videopoet.text_to_video(layout, blank)
    text = Condition(torch.randn(2, 3, model.config.text), torch.tensor([[True] * 3, [True, False, False]]))

    def drawn(rows: slice, cached: bool) -> Tensor:
        cache, condition = model.cache if cached else None, text[rows]
        contexts = [
            Context(model.step(one.prefix, states), one.ids[: one.prefix].expand(len(condition), -1), cache)
            for one, states in ((row, condition), (bare, None))
        ]
        choices = layout.choices(row.ids[row.prefix :])
        return sample(
            contexts[0],
            len(choices),
            generators(4, 5)[rows],
            unguided=contexts[1],
            scale=3.0,
            choices=choices,
            end=videopoet.Special.EOS,
        )

    both = drawn(slice(0, 2), True)
    assert torch.equal(both, drawn(slice(0, 2), False))
    assert torch.equal(both, torch.cat([drawn(slice(0, 1), True), drawn(slice(1, 2), True)]))
    assert both[:, 0].eq(videopoet.Special.BOV_O).all()
    assert both[:, -2:].tolist() == [[videopoet.Special.EOV_O, videopoet.Special.EOS]] * 2
    codes = layout.visual_codes(both[:, 1:-2], shape)
    assert codes.shape == (2, 2, 2, 3)
    assert len(codes.unique()) > 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: sample(c, 0, generators(1, 2, 3)), "limit of 0"),
        (lambda c: sample(c, 1, generators(1)), "3 rows need .* got 1"),
        (lambda c: sample(c, 2, generators(1, 2, 3), choices=[range(3)]), "each of 2 places"),
        (lambda c: sample(c, 1, generators(1, 2, 3), choices=[range(3, 3)]), "not empty"),
        (lambda c: sample(c, 1, generators(1, 2, 3), scale=2.0), "unguided context"),
        (lambda c: sample(c, 1, generators(1, 2, 3), scale=math.nan, unguided=c), "finite"),
        (lambda c: sample(c, 1, generators(1, 2, 3), scale=2.0, unguided=Context(c.step, prefix(2))), "guided from 2"),
        (lambda c: Sampling(-1.0), "temperature"),
        (lambda c: Sampling(top_k=-1), "top_k"),
    ],
)
def test_what_does_not_fit_is_named(reader: Reader, call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(Context(reader, prefix()))  # type: ignore[operator]
