"""Token dropping: how much of each sample a network is shown in training, and which tokens those are.

After NaViT (Dehghani et al. 2023, sections 2.2 and 3.3, appendices B.6 and B.7). In a pack samples need not have one length, so
the share that is dropped may differ from sample to sample: some are seen whole, as they will be after training, the
others cost less. A rate is the dropped share of a sample's tokens, in [0, 1].

What draws rates is called with the samples' token counts and a generator and answers `(S,)`, float32 on the CPU. A rate that
changes over training is `scheduled_rate`, put into one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.errors import UserError


@dataclass(frozen=True)
class ConstantRate:
    """The same rate for every sample. Raises UserError unless it lies in [0, 1]."""

    rate: float

    def __post_init__(self) -> None:
        _check("the drop rate", self.rate)

    def __call__(self, lengths: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.full((len(lengths),), self.rate)  # (S,)


@dataclass(frozen=True)
class BetaRate:
    """A rate of its own for every sample: `high` times a Beta variable, `mean` on average (appendix B.6).

    The Beta variable has mean m = mean / high and variance 0.3 m (1 - m), 0.3 of the largest that a mean m allows. Raises
    UserError unless 0 < mean < high <= 1.
    """

    mean: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 < self.mean < self.high <= 1.0:
            raise UserError(f"drop rates need 0 < mean < high <= 1, got mean {self.mean} and high {self.high}; correct them")

    @property
    def shape(self) -> tuple[float, float]:
        """The Beta distribution's alpha and beta: a variance of v m (1 - m) means that alpha + beta = 1 / v - 1."""
        m, total = self.mean / self.high, 1 / 0.3 - 1
        return m * total, (1 - m) * total

    def __call__(self, lengths: Sequence[int], generator: torch.Generator) -> Tensor:
        # Johnk's rejection (1964): torch's own Beta takes no generator, and alpha + beta = 7/3 keeps rejections few.
        alpha, beta = self.shape
        u = torch.full((len(lengths),), torch.nan, dtype=torch.float64)  # (S,)
        while (missing := u.isnan()).any():
            a, b = 1.0 - torch.rand(2, len(lengths), generator=generator, dtype=torch.float64)  # (S,), (S,) in (0, 1]
            x, y = a ** (1 / alpha), b ** (1 / beta)
            u = torch.where(missing & (x + y <= 1.0), x / (x + y), u)
        return (u * self.high).float()


@dataclass(frozen=True)
class LengthRate:
    """Long samples lose more: a truncated normal about a mean that is linear in the number of tokens (appendix B.6).

    The mean is `low` at `shortest` tokens and `high` at `longest`, constant beyond; the standard deviation is 0.02, and nothing
    lies more than two of them away. Raises UserError unless 0 <= low <= high <= 1 and 0 < shortest < longest.
    """

    low: float
    high: float
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        _check("the lowest drop rate", self.low)
        _check("the highest drop rate", self.high)
        if self.low > self.high or not 0 < self.shortest < self.longest:
            raise UserError(
                f"drop rates from {self.low} at {self.shortest} tokens to {self.high} at {self.longest} do not rise; "
                "give low <= high and 0 < shortest < longest"
            )

    def __call__(self, lengths: Sequence[int], generator: torch.Generator) -> Tensor:
        share = (torch.tensor(lengths, dtype=torch.float32) - self.shortest) / (self.longest - self.shortest)  # (S,)
        mean = self.low + (self.high - self.low) * share.clamp(0.0, 1.0)
        # The inverse of the normal's distribution function, on the stretch between -2 and 2 standard deviations.
        v = torch.rand(len(lengths), generator=generator) * 2 - 1
        return (mean + 0.02 * math.sqrt(2) * torch.erfinv(v * math.erf(math.sqrt(2)))).clamp(0.0, 1.0)  # (S,)


def scheduled_rate(seen: float, middle: float, pace: float, low: float = 0.2, high: float = 0.8) -> float:
    """The rate after `seen` samples (or steps): low + (high - low) sigmoid((seen - middle) / pace), appendix B.7.

    `middle` and `pace` are in the unit of `seen`; a negative pace falls from high to low, which is what helps (figure 8: 76.5 %
    against 75.8 % of a fixed rate and 72.2 % of a rising one). Raises UserError when pace is 0 or a rate is outside [0, 1].
    """
    _check("the lowest drop rate", low)
    _check("the highest drop rate", high)
    if pace == 0:
        raise UserError("the pace of a drop schedule must not be 0; give a negative one for a falling rate")
    # tanh, not exp: it does not overflow far from the middle.
    return low + (high - low) * 0.5 * (1 + math.tanh((seen - middle) / (2 * pace)))


def keep_tokens(length: int, rate: float, generator: torch.Generator) -> Tensor:
    """Places of a random subset of `length` tokens, `(K,)` int64, rising: what remains at a drop rate.

    K is length * (1 - rate), rounded, but at least 1: a sample never vanishes. Indexing tokens and their positions with it lets
    every kept token keep its own position. Raises UserError when the rate is outside [0, 1].
    """
    _check("a drop rate", rate)
    count = min(length, max(1, round(length * (1 - rate))))
    return torch.randperm(length, generator=generator)[:count].sort().values  # (K,)


def drop_tokens(tokens: Tensor, positions: Tensor, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random subset of one sample's `tokens (L, D)` and their `positions (L, axes)`, in order: `(K, D)`, `(K, axes)`.

    K and errors as in `keep_tokens`.
    """
    assert len(tokens) == len(positions), f"{len(tokens)} tokens, {len(positions)} positions"
    kept = keep_tokens(len(tokens), rate, generator).to(tokens.device)
    return tokens[kept], positions[kept.to(positions.device)]


def _check(name: str, rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"{name} must be in [0, 1], got {rate}; correct it")
