"""An endless loop: a film without a first frame.

Cyclic by construction, not by cross-fade: before every call of the network each film is turned along time by a random number of
frames and turned back after it. No frame is first or last for long, every pair of neighbours is sometimes in the middle, and
the pair (last, first) is a pair like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tubelet.tasks.given import Denoise


def cyclic(denoise: Denoise, frames: int, generators: Sequence[torch.Generator]) -> Denoise:
    """`denoise` on films `(B, C, T, H, W)`, each turned along time anew at every call, as its own generator draws."""

    def turned(z: Tensor, sigma: Tensor) -> Tensor:
        turns = [int(torch.randint(frames, (), generator=generator)) for generator in generators]
        level = _rolled(sigma, turns, 0) if sigma.ndim > 1 else sigma
        return _rolled(denoise(_rolled(z, turns, 1), level), [-turn for turn in turns], 1)

    return turned


def _rolled(x: Tensor, turns: Sequence[int], dim: int) -> Tensor:
    """Each row of a batch rolled by its own number of places along `dim` of the row."""
    return torch.stack([row.roll(turn, dim) for row, turn in zip(x, turns, strict=True)])
