"""The plain values that stages hand to each other, and how they convert.

Letters, everywhere in the project: `B` batch, `C` channels, `T` frames (pixel or latent), `H W`, `L` tokens, `D` width,
`N` heads, `S` samples in a pack. Video tensors are `(B, C, T, H, W)`, float in [-1, 1]; files and numpy are uint8
`(T, H, W, C)`. `sigma` is the noise level, 0 clean and 1 noise; `T` and `t` are always film time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tubelet.core.errors import UserError


@dataclass(frozen=True)
class Strides:
    """How many pixels one latent cell stands for, in time, height and width.

    `1 + t*k` frames become `1 + k` latent frames, so that an image is a one-frame video.
    """

    t: int
    h: int
    w: int

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent `(T, H, W)` of a pixel size. Raises UserError when the size does not fit the strides."""
        if self.t == 1 and frames < 1:
            raise UserError(f"frames must be at least 1, got {frames}; ask for more")
        if frames < 1 or (frames - 1) % self.t:
            below = max(1, 1 + (frames - 1) // self.t * self.t)
            raise UserError(f"frames must be 1 + a multiple of {self.t}, got {frames}: try {below} or {below + self.t}")
        for name, side, stride in (("height", height, self.h), ("width", width, self.w)):
            if side < stride or side % stride:
                below = max(stride, side // stride * stride)
                raise UserError(f"{name} must be a positive multiple of {stride}, got {side}: try {below} or {below + stride}")
        return 1 + (frames - 1) // self.t, height // self.h, width // self.w

    def pixel_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Pixel `(T, H, W)` of a latent size: the inverse of `latent_shape`."""
        return 1 + (frames - 1) * self.t, height * self.h, width * self.w


@dataclass(frozen=True, eq=False)
class Video:
    """Pixels `(B, 3, T, H, W)`, float in [-1, 1], and frames per second."""

    pixels: Tensor
    fps: float

    def __post_init__(self) -> None:
        assert self.pixels.ndim == 5, f"a video is (B, C, T, H, W), got {tuple(self.pixels.shape)}"

    @classmethod
    def from_uint8(cls, frames: np.ndarray, fps: float) -> Video:
        """From uint8 `(T, H, W, 3)` or `(B, T, H, W, 3)`."""
        values = torch.from_numpy(np.ascontiguousarray(frames))
        if values.ndim == 4:
            values = values[None]
        return cls(values.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0), fps)  # (B, 3, T, H, W)

    def to_uint8(self) -> np.ndarray:
        """To uint8 `(B, T, H, W, 3)`; values outside [-1, 1] are clipped."""
        values = self.pixels.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return values.permute(0, 2, 3, 4, 1).cpu().contiguous().numpy()  # (B, T, H, W, 3)

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def frames(self) -> int:
        return self.pixels.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[3], self.pixels.shape[4]


@dataclass(frozen=True)
class Latent:
    """A codec's standardised latents `(B, C, T, H, W)` and the strides that lead back to pixels."""

    values: Tensor
    strides: Strides


@dataclass(frozen=True)
class Condition:
    """Token states of a prompt, never a pooled vector: `states (B, L, D)` and `mask (B, L)`, True where a token is real."""

    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return Condition(self.states[index], self.mask[index])

    @classmethod
    def cat(cls, conditions: list[Condition]) -> Condition:
        """Stack batches; shorter ones are padded with masked tokens."""
        longest = max(c.states.shape[1] for c in conditions)

        def padded(c: Condition) -> Condition:
            missing = longest - c.states.shape[1]
            return Condition(
                torch.nn.functional.pad(c.states, (0, 0, 0, missing)), torch.nn.functional.pad(c.mask, (0, missing))
            )

        whole = [padded(c) for c in conditions]
        return cls(torch.cat([c.states for c in whole]), torch.cat([c.mask for c in whole]))
