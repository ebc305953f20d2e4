"""Tubelets: latents cut into spacetime patches, and back (ViViT, Arnab et al. 2021, section 3.2; Sora report, 2024).

A patch spans `(pt, ph, pw)` latent frames, rows and columns. Everything is reshape, so that the embedding is a `Linear`
and runs as a plain matrix product on every device.

With `pt > 1` the first latent frame is a temporal patch of its own (its other slots repeat it), so that `1 + pt*k`
latent frames are `1 + k` token frames and an image is a one-frame video.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tubelet.core.errors import UserError

Grid = tuple[int, int, int]


def token_grid(shape: tuple[int, int, int], patch: Grid) -> Grid:
    """Token `(T, H, W)` of latent `(T, H, W)`. Raises UserError when the latents do not divide into patches."""
    (T, H, W), (pt, ph, pw) = shape, patch
    if T < 1 or (T - 1) % pt:
        below = max(1, 1 + (T - 1) // pt * pt)
        raise UserError(f"latent frames must be 1 + a multiple of {pt}, got {T}: try {below} or {below + pt}")
    for name, side, stride in (("height", H, ph), ("width", W, pw)):
        if side < stride or side % stride:
            below = max(stride, side // stride * stride)
            raise UserError(f"latent {name} must be a multiple of {stride}, got {side}: try {below} or {below + stride}")
    return 1 + (T - 1) // pt, H // ph, W // pw


def patchify(z: Tensor, patch: Grid) -> Tensor:
    """Latents `(B, C, T, H, W)` as tokens `(B, L, pt*ph*pw*C)`, time slowest, channels fastest inside a token.

    Raises UserError when the latents do not divide into patches.
    """
    B, C = z.shape[:2]
    (t, h, w), (pt, ph, pw) = token_grid((z.shape[2], z.shape[3], z.shape[4]), patch), patch
    if pt > 1:
        z = torch.cat([z[:, :, :1].expand(-1, -1, pt - 1, -1, -1), z], dim=2)  # (B, C, t*pt, H, W)
    z = z.reshape(B, C, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t, h, w, pt, ph, pw, C)
    return z.reshape(B, t * h * w, pt * ph * pw * C)  # (B, L, pt*ph*pw*C)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """The inverse of `patchify`: tokens `(B, L, pt*ph*pw*C)` over `grid` token frames, rows, columns -> `(B, C, T, H, W)`.

    The repeated slots of the first temporal patch are dropped.
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    B, L, width = tokens.shape
    assert t * h * w == L, f"{L} tokens do not fill a {t} x {h} x {w} grid"
    C = width // (pt * ph * pw)
    z = tokens.reshape(B, t, h, w, pt, ph, pw, C).permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, pt, h, ph, w, pw)
    return z.reshape(B, C, t * pt, h * ph, w * pw)[:, :, pt - 1 :]  # (B, C, T, H, W)


def patch_positions(grid: Grid, patch: Grid, device: torch.device | str | None = None) -> Tensor:
    """Where each token's centre lies, `(L, 3)` floats (t, h, w) in latent frames and cells.

    Units of the latent, not of the token, so that a position means the same for every patch and clip size. The first
    temporal patch lies at frame 0, the k-th at the middle of frames pt*(k-1)+1 ... pt*k.
    """
    t, h, w = (
        torch.arange(n, device=device, dtype=torch.float32) * p + shift
        for n, p, shift in zip(grid, patch, (-(patch[0] - 1) / 2, (patch[1] - 1) / 2, (patch[2] - 1) / 2), strict=True)
    )
    return torch.stack(torch.meshgrid(t.clamp(min=0), h, w, indexing="ij"), dim=-1).reshape(-1, 3)  # (L, 3)
