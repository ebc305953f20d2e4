"""Convolutions over space and time that look backwards only (MAGVIT-v2, Yu et al. 2023, section 3.2).

Everything in time is padded in front, no statistic crosses frames: frame t of an output depends on frames up to t of the
input, and an image is treated as the first frame of a film. `nn.conv` reaches the same end without a Conv3d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.conv import Stream

Stride = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """A convolution whose window ends at the current frame: `1 + st*k` frames `(B, C, T, H, W)` give `1 + k`.

    `kernel` frames, rows and columns, odd in space; zeros stand before the first frame and around every frame.
    """

    def __init__(self, width: int, out: int, kernel: Stride = (3, 3, 3), stride: Stride = (1, 1, 1), bias: bool = True) -> None:
        super().__init__()
        assert kernel[0] >= stride[0], f"a window of {kernel[0]} frames would miss some at a stride of {stride[0]}"
        assert kernel[1] % 2 == kernel[2] % 2 == 1, f"a kernel of {kernel[1]} x {kernel[2]} has no centre"
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv3d(width, out, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`stream` carries the frames that the next chunk's first window still sees."""
        (kt, st), (B, C, _, H, W) = (self.kernel[0], self.stride[0]), x.shape
        earlier = stream.states.get(self) if stream is not None else None
        if earlier is None:
            earlier = x.new_zeros(B, C, kt - 1, H, W)
        if earlier.shape[2]:
            x = torch.cat([earlier, x], dim=2)  # (B, C, earlier + T, H, W)
        if stream is not None:
            windows = (x.shape[2] - kt) // st + 1
            stream.states[self] = x[:, :, windows * st :]
        return self.conv(x)


class Upsample3d(nn.Module):
    """Depth to space: a causal convolution to `st*sh*sw` times the channels, which become frames, rows and columns.

    The first st - 1 frames of a film are dropped, so that `1 + k` frames become `1 + st*k`.
    """

    def __init__(self, width: int, out: int, kernel: Stride, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.up = CausalConv3d(width, stride[0] * stride[1] * stride[2] * out, kernel)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        st, sh, sw = self.stride
        x = self.up(x, stream).unflatten(1, (-1, st, sh, sw))  # (B, C, st, sh, sw, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C, T, st, H, sh, W, sw)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, C, T*st, H*sh, W*sw)
        return x if stream is not None and stream.begun else x[:, :, st - 1 :]


def normalise_frames(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Group norm of `(B, C, T, H, W)` with the statistics of each frame alone."""
    B = len(x)
    frames = F.group_norm(x.transpose(1, 2).flatten(0, 1), groups, weight, bias, eps=1e-6)  # (B*T, C, H, W)
    return frames.unflatten(0, (B, -1)).transpose(1, 2)  # (B, C, T, H, W)


class FrameNorm(nn.Module):
    """Group norm, frame by frame, with a gain and a bias per channel."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        assert width % groups == 0, f"{width} channels do not divide into {groups} groups"
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return normalise_frames(x, self.groups, self.weight, self.bias)


class AdaptiveFrameNorm(nn.Module):
    """Group norm, frame by frame, whose gain and bias come from the latents that are being decoded.

    As in StyleGAN (Karras et al. 2019, equation 1), from one vector: here the mean over space of the latent frame that a
    frame belongs to, so that no frame hears of later ones. Gain 1 and bias 0 at the start.
    """

    def __init__(self, width: int, groups: int, latent: int) -> None:
        super().__init__()
        assert width % groups == 0, f"{width} channels do not divide into {groups} groups"
        self.groups = groups
        self.style = nn.Linear(latent, 2 * width)
        nn.init.zeros_(self.style.weight)
        nn.init.zeros_(self.style.bias)

    def forward(self, x: Tensor, latents: Tensor, stride: int, stream: Stream | None = None) -> Tensor:
        """x `(B, C, T, H, W)`, of which `stride` frames belong to each latent frame of `latents (B, c, T', h, w)`.

        The first latent frame of a film has one frame.
        """
        style = self.style(latents.mean((3, 4)).transpose(1, 2)).repeat_interleave(stride, dim=1)  # (B, T'*stride, 2C)
        if stream is None or not stream.begun:
            style = style[:, stride - 1 :]  # (B, T, 2C)
        gain, bias = style.transpose(1, 2)[..., None, None].chunk(2, dim=1)  # (B, C, T, 1, 1) each
        return torch.addcmul(bias, normalise_frames(x, self.groups), 1 + gain)


def blur_halve(x: Tensor) -> Tensor:
    """`(B, C, T, H, W)` at half the size on every axis, rounded up, after a blur (Zhang 2019, section 3: 1, 2, 1 on each axis).

    For discriminators, which see whole clips: it looks at the frame behind, too.
    """
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = line[:, None, None] * line[:, None] * line  # (3, 3, 3)
    C = x.shape[1]
    x = F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate")
    return F.conv3d(x, kernel.expand(C, 1, -1, -1, -1), stride=2, groups=C)
