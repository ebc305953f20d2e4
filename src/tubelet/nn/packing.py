"""Patch n' Pack: samples of different sizes as one row of tokens (NaViT, Dehghani et al. 2023, section 2.1).

Linears, norms and MLPs see one token at a time and do not care whose it is; only attention must know where a sample ends.
`Segments` tells it, and nothing is padded: a row of 8 tokens and a row of 3 are a row of 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """How many consecutive queries, and how many consecutive keys, belong to each sample of a row. Zeros are allowed."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.queries) == len(self.keys), f"{len(self.queries)} runs of queries, {len(self.keys)} of keys"
        assert min(self.queries + self.keys, default=0) >= 0, "a length is at least 0"

    @classmethod
    def of_self(cls, lengths: Sequence[int]) -> Segments:
        """Every sample attends to itself."""
        return cls(tuple(lengths), tuple(lengths))

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Who may look at whom, boolean `(L, M)`: block diagonal. What a dense kernel needs, and the reference in tests."""
        samples = torch.arange(len(self.queries), device=device)
        owners = [samples.repeat_interleave(torch.tensor(n, device=device)) for n in (self.queries, self.keys)]  # (L,), (M,)
        return owners[0][:, None] == owners[1][None, :]

    def runs(self) -> Iterator[tuple[int, slice, int, slice, int]]:
        """Neighbours of equal lengths together: `(samples, where queries, queries each, where keys, keys each)`."""
        q = k = 0
        for (one_q, one_k), members in groupby(zip(self.queries, self.keys, strict=True)):
            n = len(list(members))
            yield n, slice(q, q + n * one_q), one_q, slice(k, k + n * one_k), one_k
            q, k = q + n * one_q, k + n * one_k


def first_fit(lengths: Sequence[int], order: Sequence[int], budget: int, open_packs: int = 32) -> list[list[int]]:
    """Items in `order` into packs of at most `budget` tokens: each goes into the first open pack that has room for it.

    At most `open_packs` stay open (NaViT packs greedily on the way, section 2.1); when another must be opened, the fullest is
    closed. Every item appears once; packs are in the order in which they were closed, so a plan depends on its arguments alone.
    """
    assert budget >= max((lengths[i] for i in order), default=0), "an item is longer than the budget"
    done: list[list[int]] = []
    packs: list[tuple[int, list[int]]] = []  # (room left, items)
    for item in order:
        for place, (room, items) in enumerate(packs):
            if lengths[item] <= room:
                packs[place] = (room - lengths[item], [*items, item])
                break
        else:
            if len(packs) == open_packs:
                fullest = min(range(len(packs)), key=lambda i: packs[i][0])
                done.append(packs.pop(fullest)[1])
            packs.append((budget - lengths[item], [item]))
    return done + [items for _, items in packs]
