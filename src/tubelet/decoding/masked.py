"""Masked tokens: which are hidden in training, and how all are chosen in a few parallel steps.

After MaskGIT (Chang et al. 2022, section 3.2) and, for video, MAGVIT (Yu et al. 2022, section 3.2, algorithm 1): every
step predicts all hidden tokens at once, draws them, and hides again those it is least sure of, a share that falls as a
cosine. What is known only roughly, such as the first frames repeated to the end, stands in hidden places as a hint (COMMIT):
hints are replaced as everything else is. Networks are functions here; tokens are ids `(B, L)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.nn.subtokens import MASK, join_ids

Predict = Callable[[Tensor, Tensor, float], Tensor]
"""`(tokens (B, L), hinted (B, L), progress) -> logits (B, L, G, V)`: for every place a word of each of G small vocabularies,
which together are one token of V^G. `hinted` is True where a token is a hint, progress the share of the steps already done."""


def hidden_share(progress: float) -> float:
    """The share of tokens that is hidden when a share of the way is done, from 1 to 0: cos(pi/2 * progress), at least 0."""
    return max(0.0, math.cos(math.pi / 2 * progress))


def draw_hidden(batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Which tokens a training step hides, bool `(batch, length)`: for each sample a share `hidden_share(u)`, u uniform, at
    least one token, at places drawn at random."""
    order = torch.rand(batch, length, generator=rng, device=rng.device).argsort(-1).argsort(-1)  # a rank for every place
    share = torch.cos(math.pi / 2 * torch.rand(batch, 1, generator=rng, device=rng.device))
    return order < (share * length).floor().clamp(min=1)


def commit(tokens: Tensor, hidden: Tensor, hints: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a network sees of `tokens (B, L)` of which `hidden (B, L)` are not to be seen, and where it sees a hint.

    In a hidden place stands what `hints (B, L)` say, which is MASK where they say nothing; None says nothing anywhere (MAGVIT,
    section 3.2). Both `(B, L)`; the second is what `Predict` calls hinted.
    """
    shown = torch.full_like(tokens, MASK) if hints is None else hints
    return torch.where(hidden, shown, tokens), hidden & (shown != MASK)


def decode(
    predict: Predict,
    start: Tensor,
    rngs: Sequence[torch.Generator],
    steps: int = 24,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
) -> Tensor:
    """Tokens `(B, L)` from `start (B, L)`, which holds hints and MASK, in `steps` calls of `predict`.

    Args:
        predict: called without gradient on a whole batch.
        rngs: one generator per sample, so that a sample is the same alone and in any batch.
        steps: 24 for MAGVIT-v2's videos.
        temperature: of the words; below 1 likelier ones are drawn more often, 0 takes the likeliest.
        choice_temperature: of the Gumbel noise on the confidence by which places are hidden again, which falls linearly
            to 0 at the last step; 0 keeps exactly the surest. 4.5 is MAGVIT's.

    A token's confidence is the probability of its word, over G groups the product. A place once kept stays, so that every step
    keeps at least one more. Raises UserError when generators and samples do not pair up or a number is out of range.
    """
    B, L = start.shape
    if len(rngs) != B:
        raise UserError(f"{B} samples need a generator each, got {len(rngs)}; seed one per sample")
    if not 1 <= steps <= L:
        raise UserError(f"{L} tokens are chosen in 1 to {L} steps, got {steps}; correct the number")
    if not (0 <= temperature < math.inf and 0 <= choice_temperature < math.inf):
        raise UserError(f"temperatures are 0 or more, got {temperature} and {choice_temperature}; 1 and 4.5 are usual")
    tokens, hidden, left = start, torch.ones_like(start, dtype=torch.bool), L
    for step in range(steps):
        shown, hinted = commit(tokens, hidden, start)
        with torch.no_grad():
            logits = predict(shown, hinted, step / steps).float()  # (B, L, G, V)
        if logits.shape[:2] != (B, L) or logits.ndim != 4:
            raise UserError(f"predict returns logits ({B}, {L}, G, V), got {tuple(logits.shape)}; keep an axis for the groups")
        words = _drawn(logits, temperature, rngs)  # (B, L, G)
        drawn = torch.where(hidden, join_ids(words, logits.shape[-1]), tokens)
        done = (step + 1) / steps
        # Before the last step a place at least is left, and each step keeps at least one more.
        left = 0 if step + 1 == steps else min(max(int(L * hidden_share(done)), steps - step - 1), left - 1)
        sure = logits.log_softmax(-1).gather(-1, words[..., None])[..., 0].sum(-1)  # (B, L)
        sure = sure + choice_temperature * (1 - done) * _gumbel((L,), rngs, sure)
        sure = sure.masked_fill(~hidden, math.inf)
        rank = sure.argsort(dim=-1, stable=True).argsort(-1)
        tokens, hidden = drawn, rank < left
    return tokens


def _drawn(logits: Tensor, temperature: float, rngs: Sequence[torch.Generator]) -> Tensor:
    """A word for every place and group, `(B, L, G)`, from logits `(B, L, G, V)`, by the Gumbel-max trick."""
    noise = _gumbel(logits.shape[1:], rngs, logits)  # drawn at every temperature: the next step's draws do not depend on it
    return (logits + temperature * noise).argmax(-1)


def _gumbel(shape: Sequence[int], rngs: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Gumbel noise `(B, *shape)`, each sample's from its own generator, on the device of `like`."""
    tiny = torch.finfo(torch.float32).tiny
    rows = [torch.empty(tuple(shape), device=g.device).exponential_(generator=g).clamp(min=tiny) for g in rngs]
    return -torch.stack([row.to(like.device) for row in rows]).log()
