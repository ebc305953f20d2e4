"""How the noise level reaches the network: an embedding of sigma, and adaptive layer norm driven by it.

Shared adaLN: one projection for the whole model and a learned bias per block (PixArt-alpha, Chen et al. 2023, section
2.3, "adaLN-single"); gates start at zero, so that every block starts as the identity (DiT, Peebles & Xie 2023, section
3.2, "adaLN-Zero").

A modulation is `(B, G, n*D)`: one row for each of G equal runs of consecutive tokens. G = 1 is one noise level for the
sample and costs next to nothing, G = token frames one level per frame, G = L one per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.patch import Grid, patchify
from tubelet.nn.positions import sincos


def token_sigma(sigma: Tensor, batch: int, patch: Grid) -> Tensor:
    """Noise levels per run of tokens, `(B, G)`.

    `sigma` is one level `()`, one per sample `(B,)`, per latent frame `(B, T)` or per cell `(B, T, H, W)`.
    A patch that spans several frames or cells takes their mean level; the first temporal patch spans frame 0 alone.
    """
    sigma = sigma.float()
    if sigma.ndim <= 1:
        return sigma.reshape(-1, 1).expand(batch, 1)  # (B, 1)
    assert sigma.ndim in (2, 4), f"sigma is (), (B,), (B, T) or (B, T, H, W), got {tuple(sigma.shape)}"
    if sigma.ndim == 2:
        sigma, patch = sigma[:, :, None, None], (patch[0], 1, 1)
    return patchify(sigma[:, None], patch).mean(-1)  # (B, G)


class NoiseEmbedding(nn.Module):
    """Noise levels `(...)` in [0, 1] as `(..., D)`: sines and cosines of 1000*sigma, then two linears (DiT, section 3.2)."""

    def __init__(self, dim: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.up = nn.Linear(features, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        waves = sincos(self.features, sigma.float() * 1000.0).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves)))


class AdaLN(nn.Module):
    """Noise embedding `(B, G, D)` to `n` modulation vectors side by side, `(B, G, n*D)` in float32; zero at the start."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, n * dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.out(F.silu(embedding)).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` for `x (B, L, D)` and shift, scale `(B, G, D)`, G a divisor of L."""
    groups, L = shift.shape[1], x.shape[1]
    if groups in (1, L):
        return torch.addcmul(shift, x, 1 + scale)
    x = x.unflatten(1, (groups, L // groups))  # (B, G, L/G, D)
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)  # (B, L, D)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """The residual `x + gate * update` for `x`, `update (B, L, D)` and `gate (B, G, D)`, G a divisor of L."""
    groups, L = gate.shape[1], x.shape[1]
    if groups in (1, L):
        return torch.addcmul(x, gate, update.to(x.dtype))
    runs = (groups, L // groups)
    x, update = x.unflatten(1, runs), update.to(x.dtype).unflatten(1, runs)  # (B, G, L/G, D)
    return torch.addcmul(x, gate[:, :, None], update).flatten(1, 2)  # (B, L, D)
