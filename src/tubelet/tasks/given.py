"""Every task as data: which cells of a film are known, which are to be made.

`(clean latents, mask, positions)` is the one form, in training and in sampling: a picture that starts to move is a film
whose first frame is known, an extension one whose past is, an inpainting one whose surroundings are (VDT, Lu et al. 2023,
section 3.3; Sora report, 2024). The network is told by the noise level of every cell: 0 where it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tubelet.core.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""`(z, sigma) -> x_hat`, as solvers call it; sigma may have a value per frame, `(B, T)`, or per cell, `(B, T, H, W)`."""


@dataclass(frozen=True)
class Given:
    """What is known of a batch of films.

    `clean (B, C, T, H, W)`: latents, whatever where nothing is known. `mask (B, T, H, W)`, 1 where cells are to be made and 0
    where they are known (the polarity of VDT's code). `haze`: the noise level in [0, 1) at which known cells are shown, a
    little above 0 for a past that was itself generated. `strength`: the noise level at which making starts, 1 for noise;
    below 1 the film in `clean` is edited (SDEdit, Meng et al. 2021, section 3). `times`: when each of the T latent frames is,
    where they do not simply follow each other.
    """

    clean: Tensor
    mask: Tensor
    haze: float = 0.0
    strength: float = 1.0
    times: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = (self.clean.shape[0], *self.clean.shape[2:])
        if self.clean.ndim != 5 or self.mask.shape != shape:
            raise UserError(
                f"known latents (B, C, T, H, W) need a mask (B, T, H, W), got {tuple(self.clean.shape)} and "
                f"{tuple(self.mask.shape)}; make them fit"
            )
        if not bool(self.clean.isfinite().all()):
            raise UserError("known latents must be finite; check the clip or the codec that made them")
        if not bool(((self.mask >= 0) & (self.mask <= 1)).all()):
            raise UserError("a mask holds values from 0 (known) to 1 (to be made); correct it")
        if not 0 <= self.haze < 1:
            raise UserError(f"haze must be at least 0 and below 1, got {self.haze}; correct it")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {self.strength}; correct it")
        if self.times is not None and len(self.times) != self.clean.shape[2]:
            raise UserError(f"{self.clean.shape[2]} latent frames have {len(self.times)} times; give one time per frame")

    def part(self, begin: int, count: int) -> Given:
        """What is known of `count` films from `begin` on; one film stands for all."""
        if len(self.clean) == 1:
            begin, count = 0, 1
        return replace(self, clean=self.clean[begin : begin + count], mask=self.mask[begin : begin + count])

    def to(self, device: torch.device) -> Given:
        """The same on another device."""
        return replace(self, clean=self.clean.to(device), mask=self.mask.to(device))

    def start(self, noise: Tensor) -> Tensor:
        """Where the solver starts, at sigma = `strength`: `(B, C, T, H, W)`."""
        return (1 - self.strength) * self.clean + self.strength * noise

    def levels(self, sigma: Tensor) -> Tensor:
        """Noise level of every cell when those to be made are at `sigma`, a scalar: `(B, T, H, W)`."""
        return torch.maximum(self.mask * sigma, (1 - self.mask) * torch.minimum(sigma, sigma.new_tensor(self.haze)))


def conditioned(denoise: Denoise, given: Given, noise: Tensor) -> Denoise:
    """A denoiser that sees what is known: known cells at their own level, their estimate always the truth.

    The solver's last step returns the estimate, so known cells come out as they went in. `noise` hazes them, and is the noise
    that the film is made from, so that a sample still has one source of randomness.
    """
    make = given.mask[:, None].to(noise.dtype)  # (B, 1, T, H, W)
    if bool((given.mask == 1).all()):
        return denoise
    # One level per frame costs the network less than one per cell.
    by_frame = bool((given.mask == given.mask[:, :, :1, :1]).all())

    def denoise_rest(z: Tensor, sigma: Tensor) -> Tensor:
        levels = given.levels(sigma.to(z.dtype))  # (B, T, H, W)
        wide = levels[:, None]
        known = (1 - wide) * given.clean + wide * noise
        x_hat = denoise(make * z + (1 - make) * known, levels[:, :, 0, 0] if by_frame else levels)
        return make * x_hat + (1 - make) * given.clean

    return denoise_rest


def kept(denoise: Denoise, given: Given) -> Denoise:
    """As `conditioned` for a network that has one noise level per sample and is told what is known beside the noise.

    Known cells are noised like the others, their estimate is always the truth, so they come out as they went in.
    """
    make = given.mask[:, None]  # (B, 1, T, H, W)

    def denoise_rest(z: Tensor, sigma: Tensor) -> Tensor:
        return make.to(z.dtype) * denoise(z, sigma) + (1 - make.to(z.dtype)) * given.clean

    return denoise_rest
