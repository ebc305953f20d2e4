"""Ids of a very large vocabulary as a few ids of small ones (MAGVIT-v2, Yu et al. 2023, section 3.2, token factorisation).

2^18 words would need as many rows of embeddings and logits; two digits of 2^9 need 2^10 of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = -1
"""Stands where no token has been chosen yet."""


def split_ids(ids: Tensor, groups: int, size: int) -> Tensor:
    """Ids `(...)` in [0, size^groups) as `(..., groups)` digits in [0, size), the least significant first."""
    return torch.stack([ids // size**g % size for g in range(groups)], dim=-1)  # (..., G)


def join_ids(digits: Tensor, size: int) -> Tensor:
    """The inverse of `split_ids`: `(..., groups)` to `(...)`."""
    powers = torch.tensor([size**g for g in range(digits.shape[-1])], device=digits.device)
    return (digits * powers).sum(-1)
