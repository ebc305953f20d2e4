"""Windows of a spacetime grid: attention within each of them costs L * window and not L^2."""

from __future__ import annotations

import torch
from torch import Tensor

from tubelet.core.errors import UserError

Window = tuple[int, int, int]


def to_windows(x: Tensor, window: Window) -> Tensor:
    """A grid `(B, T, H, W, D)` as rows `(B*n, t*h*w, D)`, one for each of its n windows (t, h, w); all of a sample in a run.

    Raises UserError when the grid does not divide into windows.
    """
    sides = tuple(x.shape[1:4])
    if any(side % of for side, of in zip(sides, window, strict=True)):
        raise UserError(f"a grid of {sides} does not divide into windows of {window}; make each side a multiple")
    t, h, w = window
    cut = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))  # (B, T/t, t, H/h, h, W/w, w, D)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(0, 3).flatten(1, 3)


def from_windows(rows: Tensor, window: Window, shape: torch.Size) -> Tensor:
    """The inverse of `to_windows`: rows `(B*n, t*h*w, D)` as the grid of that `shape (B, T, H, W, D)`."""
    B, T, H, W, D = shape
    t, h, w = window
    cut = rows.view(B, T // t, H // h, W // w, t, h, w, D)
    return cut.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)
