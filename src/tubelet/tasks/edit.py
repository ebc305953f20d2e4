"""Edit a film by words (SDEdit, Meng et al. 2021), blend two films."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.tasks.given import Given


def edit(clean: Tensor, strength: float) -> Given:
    """A film whose latents are `clean (B, C, T, H, W)` noised up to `strength` in (0, 1] and made again from there: near 0 it
    stays, at 1 only the words count."""
    return Given(clean, clean.new_ones(clean.shape[0], *clean.shape[2:]), strength=strength)


def blend(first: Tensor, second: Tensor, strength: float) -> Given:
    """One film turns into another of the same size: their latents mixed from one to the other along time, then edited at
    `strength`, so that the network makes the mixture a film."""
    if first.shape != second.shape:
        raise UserError(f"two films to blend must have one size, got {tuple(first.shape)} and {tuple(second.shape)}; fit them")
    frames = first.shape[2]
    share = torch.linspace(0, 1, frames, device=first.device).view(1, 1, -1, 1, 1)
    return edit((1 - share) * first + share * second, strength)


def resized(clean: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents `(B, C, T, H, W)` over another grid of cells, `(B, C, T, *size)`: a layout for a film of another size."""
    if clean.shape[3:] == size:
        return clean
    return F.interpolate(clean, (clean.shape[2], *size), mode="trilinear", align_corners=False)  # (B, C, T, *size)
