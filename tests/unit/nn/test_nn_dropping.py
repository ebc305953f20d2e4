"""Token dropping: the statistics of the rates, and that what is kept is a random, ordered, never empty subset."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import beta, kstest, truncnorm

from tubelet.core.errors import UserError
from tubelet.nn.dropping import BetaRate, ConstantRate, LengthRate, drop_tokens, keep_tokens, scheduled_rate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rates", [ConstantRate(0.5), BetaRate(0.4, 0.8), LengthRate(0.2, 0.8, 16, 256)])
def test_rates_are_one_per_sample_within_bounds_and_follow_the_generator(rates: Callable[..., torch.Tensor]) -> None:
    lengths = [4, 16, 100, 256, 1000]
    drawn = rates(lengths, generator())
    assert (drawn.shape, drawn.dtype) == ((5,), torch.float32)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert torch.equal(drawn, rates(lengths, generator()))
    assert rates([], generator()).shape == (0,)
    if not isinstance(rates, ConstantRate):
        assert not torch.equal(drawn, rates(lengths, generator(1)))


def test_a_constant_rate_is_constant() -> None:
    assert ConstantRate(0.3)([5, 9], generator()).tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(("mean", "high"), [(0.05, 0.9), (0.25, 0.4), (0.5, 0.7), (0.85, 0.9), (0.5, 1.0)])
def test_beta_rates_have_the_stated_moments_and_distribution(mean: float, high: float) -> None:
    rates = BetaRate(mean, high)
    drawn = rates([1] * 20_000, generator()).double()
    m = mean / high
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= high + 1e-6
    a, b = rates.shape
    variance, kurtosis = high**2 * 0.3 * m * (1 - m), float(beta(a, b).stats("k"))
    # Four standard errors of a mean and of a variance.
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * (variance / 20_000) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=4 * ((kurtosis + 2) / 20_000) ** 0.5)
    # Not the moments alone: the distribution is scipy's, on either side of any rate (float32 cannot tell 1 - 1e-9 from 1).
    for rate in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        assert float((drawn <= high * rate).double().mean()) == pytest.approx(beta(a, b).cdf(rate), abs=0.015)


def test_rates_by_length_are_a_truncated_normal_about_a_line() -> None:
    rates = LengthRate(0.1, 0.9, 16, 576)
    for length, mean in ((8, 0.1), (16, 0.1), (296, 0.5), (436, 0.7), (576, 0.9), (999, 0.9)):
        drawn = rates([length] * 4000, generator(length)).double()
        assert float((drawn - mean).abs().max()) <= 0.04 + 1e-6, "nothing beyond two standard deviations"
        assert kstest(((drawn - mean) / 0.02).numpy(), truncnorm(-2, 2).cdf).statistic < 0.03


def test_a_rate_by_length_stays_a_rate_at_the_ends() -> None:
    drawn = LengthRate(0.0, 1.0, 1, 2)([1] * 500 + [2] * 500, generator())
    assert (drawn.min(), drawn.max()) == (0, 1)


@pytest.mark.parametrize("pace", [-1e4, 1e4])
def test_a_schedule_is_its_equation(pace: float) -> None:
    seen = [0.0, 2e4, 5e4, 9e4, 1e5]
    rates = [scheduled_rate(n, 5e4, pace) for n in seen]
    assert rates == pytest.approx([0.2 + 0.6 / (1 + math.exp(-(n - 5e4) / pace)) for n in seen])
    assert rates[2] == pytest.approx(0.5), "half way at the middle"
    assert rates == sorted(rates, reverse=pace < 0), "a negative pace falls"
    assert scheduled_rate(1e12, 5e4, pace) == pytest.approx(0.2 if pace < 0 else 0.8), "no overflow far away"


@pytest.mark.parametrize(
    ("length", "rate", "count"), [(100, 0.0, 100), (100, 0.25, 75), (7, 0.5, 4), (100, 0.999, 1), (5, 1.0, 1), (0, 0.5, 0)]
)
def test_as_many_are_kept_as_the_rate_says_and_never_none(length: int, rate: float, count: int) -> None:
    kept = keep_tokens(length, rate, generator())
    assert (kept.shape, kept.dtype) == ((count,), torch.int64)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert all(0 <= place < length for place in kept.tolist())


def test_every_token_is_kept_equally_often() -> None:
    g, counts = generator(), torch.zeros(10)
    for _ in range(2000):
        counts[keep_tokens(10, 0.6, g)] += 1
    assert float((counts / 2000 - 0.4).abs().max()) < 0.045  # four standard deviations


def test_tokens_keep_their_positions() -> None:
    tokens, positions = torch.arange(20.0)[:, None] * torch.ones(3), torch.arange(20.0)[:, None] + torch.tensor([0.0, 100.0])
    few, where = drop_tokens(tokens, positions, 0.7, generator(3))
    assert (few.shape, where.shape) == ((6, 3), (6, 2))
    assert torch.equal(few[:, 0], where[:, 0])
    assert torch.equal(where[:, 1] - where[:, 0], torch.full((6,), 100.0))
    assert (few[1:, 0] > few[:-1, 0]).all(), "the order stays"
    assert torch.equal(few, drop_tokens(tokens, positions, 0.7, generator(3))[0])
    assert not torch.equal(few, drop_tokens(tokens, positions, 0.7, generator(4))[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: ConstantRate(1.5), "got 1.5; correct"),
        (lambda: ConstantRate(float("nan")), "got nan"),
        (lambda: BetaRate(0.8, 0.5), "0 < mean < high"),
        (lambda: BetaRate(0.0, 0.5), "0 < mean < high"),
        (lambda: LengthRate(0.6, 0.4, 16, 64), "do not rise"),
        (lambda: LengthRate(0.4, 0.6, 64, 64), "do not rise"),
        (lambda: LengthRate(-0.1, 0.6, 16, 64), "lowest drop rate"),
        (lambda: scheduled_rate(0, 1, 0), "negative one for a falling"),
        (lambda: scheduled_rate(0, 1, 1, high=2), "highest drop rate"),
        (lambda: keep_tokens(4, -0.1, generator()), "drop rate must be in"),
    ],
)
def test_bad_rates_are_refused(bad: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bad()
