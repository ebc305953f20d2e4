"""How far what a network makes is, taken as a whole, from what the worlds show: two distances between sets of features.

The features are those of a random convolutional network, fixed by a seed: no weights to fetch, none to train, the same for
every run. Random features rank generators much as those of trained classifiers do (Lee et al. 2022, 2208.09218, "Demystifying
Randomly Initialized Networks for Evaluating Generative Models"), and no classifier of photographs knows these worlds. Every
channel is standardised on simulated pictures, else most of them say the same or nothing at all. A film is what its frames show
on average and how much that changes from frame to frame. The distances themselves are `fidelity.frechet_distance` and
`fidelity.kernel_distance`.

Measured on 192 pictures of single objects against 192 others, Frechet distance over that of two sets of truth: noise of 4
levels 5.7, a blur of 3 pixels 11.5, one object in four missing 6.9, one picture in four with a second object 4.9, one in four
smeared 3.6, all objects red 13.4, all of them balls 2.2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.evaluate.fidelity import frechet_distance, kernel_distance
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import VALIDATION_SEEDS

WIDTHS = (12, 16, 16)
KERNELS = (5, 3, 3)
SEED = 0
PICTURE_FEATURES = 2 * sum(WIDTHS)
"""Mean and spread of every channel of every layer."""
_SHOWN = 256
"""Simulated clips on which channels and features are standardised."""


def features(clips: np.ndarray, batch: int = 64) -> Tensor:
    """What uint8 clips `(n, T, H, W, 3)` look like: float32 `(n, PICTURE_FEATURES)`, twice as many where T > 1.

    A picture is a clip of one frame. Raises UserError on another form, and on frames below 16 x 16.
    """
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8 or not len(clips) or not clips.shape[1]:
        raise UserError(f"clips must be uint8 (n, T, H, W, 3), got {clips.dtype} {clips.shape}; add the missing axes")
    if min(clips.shape[2:4]) < 16:
        raise UserError(f"features need frames of at least 16 x 16 pixels, got {clips.shape[2:4]}; use larger ones")
    look = _look()
    return torch.cat([_described(look, clips[begin : begin + batch]) for begin in range(0, len(clips), batch)])


def distances(truth: Tensor, made: Tensor) -> dict[str, float]:
    """`frechet` and `kid` of two sets of features `(n, D)` and `(m, D)`; 0 where their distributions are equal.

    The Frechet distance grows as sets get smaller: compare sets of one size, and keep that of truth against other truth beside
    it. The kernel distance is unbiased; its memory grows with n * m. Raises UserError with fewer than two vectors a side or
    unequal widths.
    """
    return {"frechet": frechet_distance(truth, made), "kid": kernel_distance(truth, made)}


class _Look(NamedTuple):
    """The network: weight and bias of each layer, and what its features are on average, `(D,)` each."""

    layers: list[tuple[Tensor, Tensor]]
    mean: Tensor
    spread: Tensor
    change_mean: Tensor
    change_spread: Tensor


@functools.cache
@torch.no_grad()
def _look() -> _Look:
    """Built once in a process, from a seed and simulated clips alone."""
    world, rng = WORLDS["phys2d"], torch.Generator().manual_seed(SEED)
    shown = np.stack([world.sample(seed, frames=2, fps=2.0).video for seed in VALIDATION_SEEDS[:_SHOWN]])
    h = _pixels(shown)  # (2n, 3, H, W)
    layers: list[tuple[Tensor, Tensor]] = []
    for width, kernel in zip(WIDTHS, KERNELS, strict=True):
        weight = torch.randn(width, h.shape[1], kernel, kernel, generator=rng)
        raw = F.conv2d(h, weight, stride=2, padding=kernel // 2)
        scale = 1 / raw.std((0, 2, 3))  # (width,)
        layers.append((weight * scale[:, None, None, None], -raw.mean((0, 2, 3)) * scale))
        h = _layer(h, *layers[-1])
    raw = _raw(layers, _pixels(shown)).unflatten(0, (_SHOWN, 2))  # (n, 2, D)
    change = raw.diff(dim=1).abs()[:, 0]  # (n, D)
    first = raw[:, 0]
    return _Look(layers, first.mean(0), first.std(0), change.mean(0), change.std(0))


def _pixels(clips: np.ndarray) -> Tensor:
    """uint8 `(n, T, H, W, 3)` to float `(n*T, 3, H, W)` in [-1, 1]."""
    frames = torch.from_numpy(np.ascontiguousarray(clips)).flatten(0, 1)  # (n*T, H, W, 3)
    return frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # (n*T, 3, H, W)


def _layer(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Magnitudes, so that no channel is ever dead, whichever sign its filter came out with.
    return F.conv2d(h, weight, bias, stride=2, padding=weight.shape[-1] // 2).abs()


def _raw(layers: list[tuple[Tensor, Tensor]], h: Tensor) -> Tensor:
    """Mean and spread of every channel of every layer, `(n, D)`, of pictures `(n, 3, H, W)`."""
    found = []
    for weight, bias in layers:
        h = _layer(h, weight, bias)
        found += [h.mean((2, 3)), h.std((2, 3))]
    return torch.cat(found, dim=1)


@torch.no_grad()
def _described(look: _Look, clips: np.ndarray) -> Tensor:
    raw = _raw(look.layers, _pixels(clips)).unflatten(0, clips.shape[:2])  # (n, T, D)
    shown = (raw.mean(1) - look.mean) / look.spread  # (n, D)
    if clips.shape[1] == 1:
        return shown
    change = (raw.diff(dim=1).abs().mean(1) - look.change_mean) / look.change_spread  # (n, D)
    return torch.cat([shown, change], dim=1)  # (n, 2D)
