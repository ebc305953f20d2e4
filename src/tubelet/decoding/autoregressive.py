"""Autoregressive decoding: one token after the other, each drawn from what a model says of the next.

The model is a function `step(ids, cache) -> logits`, so nothing here knows what a token stands for. Temperature and the k most
likely as in Fan et al. 2018 ("Hierarchical Neural Story Generation", section 5.3); guidance on logits as in Ho & Salimans 2022,
for tokens as in Muse (Chang et al. 2023, section 2.7).

Every row has its own generator and takes one number of it a token, so a row of a batch is what it would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tubelet.core.errors import UserError

CacheT = TypeVar("CacheT")
Step = Callable[[Tensor, "CacheT | None"], Tensor]
"""`(ids (B, L), cache) -> logits (B, V)` of the token behind the last. Without a cache, ids are the whole row; with one, only
what it does not hold yet, and the step puts them into it."""


@dataclass(frozen=True)
class Context(Generic[CacheT]):
    """What is gone on from: a model's `step`, the given ids `prefix (B, P)`, and what makes an empty cache, if it keeps one."""

    step: Step[CacheT]
    prefix: Tensor
    cache: Callable[[], CacheT] | None = None


class _Reader(Generic[CacheT]):
    """A context and what it has read: with a cache no token is read twice."""

    def __init__(self, context: Context[CacheT]) -> None:
        self.context = context
        self.cache = None if context.cache is None else context.cache()
        self.read = 0

    def logits(self, output: Tensor) -> Tensor:
        """`output (B, K)`, what was drawn so far, to logits of the next `(B, V)`, at least float32."""
        row = torch.cat([self.context.prefix, output], dim=1)  # (B, P + K)
        logits = self.context.step(row if self.cache is None else row[:, self.read :], self.cache)
        self.read = row.shape[1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises UserError on a temperature below 0 or `top_k` below 0.

    `temperature` divides the logits; 0 takes the most likely token and draws no number. `top_k`: only among the k most likely,
    0 for all; as many more as are equal to the k-th.
    """

    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"the temperature must be finite and at least 0, got {self.temperature}; 1 is what was learned")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0, got {self.top_k}; 0 draws among all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(..., V)` to what is drawn from, `(..., V)` in float64. A temperature of 0 has no probabilities."""
        assert self.temperature > 0, "the most likely token is not drawn"
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]  # (..., 1)
            logits = logits.masked_fill(logits < least, -torch.inf)
        return (logits.double() / self.temperature).softmax(-1)

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Logits `(B, V)` to tokens `(B,)`, by one number of each row's generator: where it falls in the running sum."""
        if self.temperature == 0:
            return logits.argmax(-1)
        reached = self.probabilities(logits).cumsum(-1)  # (B, V)
        at = torch.stack([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators])  # (B, 1)
        # Strictly above: a token without probability adds nothing to the sum and is never the first above.
        return torch.searchsorted(reached, at.to(logits.device) * reached[:, -1:], right=True)[:, 0]


@torch.no_grad()
def sample(
    context: Context[Any],
    limit: int,
    generators: Sequence[torch.Generator],
    *,
    sampling: Sampling | None = None,
    unguided: Context[Any] | None = None,
    scale: float = 1.0,
    choices: Sequence[range] | None = None,
    end: int | None = None,
    pad: int = 0,
) -> Tensor:
    """Tokens behind the prefix, `(B, <= limit)`: fewer when every row has come to its `end`, with `pad` behind it.

    Args:
        context: the model and what it goes on from.
        limit: how many tokens at most.
        generators: one a row, on any device.
        sampling: how each is drawn; as it was learned by default.
        unguided: the same without the condition, of another prefix, maybe of another length; what is drawn is read by both.
        scale: logits are `unguided + scale * (guided - unguided)`; 1 never calls `unguided`.
        choices: ids that may stand at each place, at least `limit` of them; by default all.
        end: the token that ends a row; by default none does.

    Raises UserError when the limit is below 1, generators or choices are too few, or a scale has nothing to be guided from.
    """
    B = len(context.prefix)
    if limit < 1:
        raise UserError(f"at least one token must be drawn, got a limit of {limit}; raise it")
    if len(generators) != B:
        raise UserError(f"{B} rows need as many generators, got {len(generators)}; give one a row")
    if choices is not None and (len(choices) < limit or not all(choices[:limit])):
        raise UserError(f"each of {limit} places needs a choice of ids, got {len(choices)}; give as many that are not empty")
    if not math.isfinite(scale) or (scale != 1.0 and unguided is None):
        raise UserError(f"guidance needs a finite scale and an unguided context, got a scale of {scale}; give both, or scale 1")
    if unguided is not None and len(unguided.prefix) != B:
        raise UserError(f"{B} rows cannot be guided from {len(unguided.prefix)}; give one unguided row each")
    sampling = sampling or Sampling()
    reader = _Reader(context)
    null = _Reader(unguided) if unguided is not None and scale != 1.0 else None
    output = context.prefix.new_empty(B, 0)
    done = torch.zeros(B, dtype=torch.bool, device=output.device)
    while output.shape[1] < limit and not done.all():
        logits = reader.logits(output)  # (B, V)
        if null is not None:
            base = null.logits(output)
            logits = base + scale * (logits - base)
        low = 0
        if choices is not None:
            allowed = choices[output.shape[1]]
            low, logits = allowed.start, logits[:, allowed.start : allowed.stop]
        token = (sampling.draw(logits, generators) + low).masked_fill(done, pad)  # (B,)
        if end is not None:
            done = done | (token == end)
        output = torch.cat([output, token[:, None]], dim=1)  # (B, K + 1)
    return output
