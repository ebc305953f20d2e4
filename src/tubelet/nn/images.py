"""Images as tokens: linear patches, an optional class token, learned positions (ViT, Dosovitskiy et al. 2021, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.patch import patchify


class ImageTokens(nn.Module):
    """Images `(B, C, H, W)` to `(B, [1 +] L, D)`: patches row by row, the class token in front of them where there is one.

    The table of positions is made for square images of `size` pixels; another size reads it by bicubic interpolation
    (section 3.2), in which the class token, which is nowhere, takes no part. A published convolution is this linear map
    with its kernel laid out channels last: `kernel.movedim(1, -1).flatten(1)`.
    """

    def __init__(self, dim: int, size: int, patch: int, *, channels: int = 3, cls: bool = True, bias: bool = True) -> None:
        super().__init__()
        assert size % patch == 0, f"{size} pixels do not divide into patches of {patch}"
        self.channels, self.patch, self.grid = channels, patch, size // patch
        self.project = nn.Linear(patch * patch * channels, dim, bias=bias)
        self.cls = nn.Parameter(torch.zeros(dim)) if cls else None
        self.positions = nn.Parameter(torch.zeros(int(cls) + self.grid**2, dim))

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError on another number of channels and on sides that are no multiple of the patch."""
        p = self.patch
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UserError(f"images must be (B, {self.channels}, H, W), got {tuple(images.shape)}; rearrange them")
        H, W = images.shape[2:]
        if min(H, W) < p or H % p or W % p:
            raise UserError(f"image sides must be multiples of {p}, got {H} x {W}; resize or crop the images")
        x = self.project(patchify(images[:, :, None].to(self.project.weight.dtype), (1, p, p)))  # (B, L, D)
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)  # (B, 1 + L, D)
        return x + self.positions_at(H // p, W // p)

    def positions_at(self, rows: int, columns: int) -> Tensor:
        """The table for another grid, `([1 +] rows*columns, D)`."""
        if (rows, columns) == (self.grid, self.grid):
            return self.positions
        first = len(self.positions) - self.grid**2
        cells = self.positions[first:].T.reshape(1, -1, self.grid, self.grid)  # (1, D, grid, grid)
        cells = F.interpolate(cells.float(), (rows, columns), mode="bicubic").to(cells.dtype)  # (1, D, rows, columns)
        return torch.cat([self.positions[:first], cells[0].flatten(1).T])  # ([1 +] rows*columns, D)
