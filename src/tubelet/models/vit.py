"""The vision transformer: an image is a sequence of patches, and a plain transformer encoder reads it.

After Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words": patches embedded linearly, a class token in front, learned 1-D
positions (equation 1), pre-norm blocks (equations 2 and 3), and the class token behind a last norm is the image (equation 4).
The head is the single linear layer of fine-tuning; the hidden layer that pre-training had before it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.attention import SelfAttention
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.images import ImageTokens


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`. Raises UserError when they do not fit each other.

    `image` is the side in pixels that the table of positions is made for; `classes` 0 leaves the head out. `eps` of the norms
    is that of the published code; Hugging Face's port of the weights has 1e-12.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    image: int = 224
    patch: int = 16
    classes: int = 0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.image, self.patch) < 1 or self.classes < 0:
            raise UserError("every size of a ViT must be at least 1, and classes at least 0; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads; try {64 * self.heads}")
        if self.image % self.patch:
            near = max(1, round(self.image / self.patch)) * self.patch
            raise UserError(f"{self.image} pixels do not divide into patches of {self.patch}; try {near}")


class ViT(nn.Module):
    """Images in, one vector (or class logits) per image out."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = ImageTokens(config.width, config.image, config.patch)
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.heads, eps=config.eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.classes) if config.classes else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As the published code: Xavier for attention and MLP, variance 1 / fan-in for patches, N(0, 0.02^2) for positions, zeros
        for the class token, all biases and the head.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                for matrix in module.qkv.weight.chunk(3):  # three square maps, each with a fan-out of its own
                    nn.init.xavier_uniform_(matrix)
        nn.init.normal_(self.embed.project.weight, std=self.embed.project.in_features**-0.5)
        nn.init.normal_(self.embed.positions, std=0.02)
        assert self.embed.cls is not None
        nn.init.zeros_(self.embed.cls)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def tokens(self, images: Tensor) -> Tensor:
        """Every token behind the last norm, the class token first: `(B, 3, H, W)` to `(B, 1 + L, D)`.

        Raises UserError when the images do not have 3 channels or do not divide into patches.
        """
        x = self.embed(images)  # (B, 1 + L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)`, floats as they were trained on, of any sides that divide into patches.

        Returns the class token `(B, D)`, or logits `(B, classes)` where there is a head.
        """
        x = self.tokens(images)[:, 0]  # (B, D)
        return x if self.head is None else self.head(x)


def tiny(config: ViTConfig) -> ViTConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, depth=2, heads=4, image=3 * config.patch)


def example(config: ViTConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: images `(B, 3, H, W)` of the config's side."""
    return (torch.randn(batch, 3, config.image, config.image),)


def stated(config: ViTConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.image} x {config.image} image (C, H, W), patch {config.patch}"


# Table 1 of the paper.
SIZES: dict[str, ViTConfig] = {
    "B/16": ViTConfig(768, 12, 12, patch=16),
    "L/16": ViTConfig(1024, 24, 16, patch=16),
    "H/14": ViTConfig(1280, 32, 16, patch=14),
}
