"""A codec against a discriminator in the one training loop: both learn from one backward.

The losses of both are added. In the codec's the discriminator's parameters are constants, in the discriminator's what came back
is one, so that the gradient of the sum is for each player that of its own loss alone; one step of the one optimiser then moves
both at once. The adversary joins at a step that the weights of the losses say; before it the codec is trained as without.

The loop clips the norm of all gradients together: let `clip` be larger than both, else the louder player silences the other.
(Muon and AdamW forget the scale of a gradient, so that the sums of `image_kl_loss` are no trouble.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.codecs.image_kl import ImageKL, ImageKLLossConfig, discriminator_loss, image_kl_loss
from tubelet.codecs.losses import to_pixels
from tubelet.codecs.magvit2 import MAGVIT2, Weights, discriminator_losses, moved, tokenizer_losses
from tubelet.core.errors import UserError
from tubelet.nn.adversarial import PatchDiscriminator, Perceptual
from tubelet.train.optim import Split, split


class Contest(nn.Module):
    """A codec, and who judges it; without a discriminator the codec learns alone, but by the step.

    Buffers, so that checkpoints keep them: `step`, int64 `()`, the updates begun; `anchors (2,)`, the running means of the
    discriminator's logits on real and on restored clips (LeCAM).
    """

    step: Tensor
    anchors: Tensor

    def __init__(self, codec: Codec, discriminator: nn.Module | None = None) -> None:
        super().__init__()
        self.codec, self.discriminator = codec, discriminator
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("anchors", torch.zeros(2))

    def begin(self) -> int:
        """Count a batch in; returns its update's number, from 0. A batch that finds gradients belongs to an update begun."""
        if all(p.grad is None for p in self.parameters()):
            self.step += 1
        return int(self.step) - 1

    @torch.no_grad()
    def move_anchors(self, real: Tensor, fake: Tensor) -> None:
        """Take in the mean logits, `()` each, of a batch. One that is not finite, whose update is skipped, is left out."""
        later = moved(self.anchors, real.float(), fake.float())
        self.anchors.copy_(torch.where(later.isfinite().all(), later, self.anchors))


def contest_split(model: nn.Module) -> Split:
    """Who trains a `Contest`: the codec is trained as it would be alone, the discriminator by AdamW, as published."""
    assert isinstance(model, Contest), "a codec and its discriminator"
    muon = {f"codec.{name}": p for name, p in split(model.codec).muon.items()}
    return Split(muon, {name: p for name, p in model.named_parameters() if p.requires_grad and name not in muon})


@dataclass(frozen=True, kw_only=True)
class KLContestObjective:
    """Latent diffusion's autoencoder against patches of pictures: `(model, batch, rng) -> losses`.

    The model is a `Contest` of an `ImageKL` and a `PatchDiscriminator` or none.
    """

    config: ImageKLLossConfig = field(default_factory=ImageKLLossConfig)
    perceptual: Perceptual | None = None

    def __call__(self, model: Contest, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """`batch["video"]` is uint8 `(B, T, H, W, 3)`.

        Returns "loss", to be minimised, the codec's terms as `image_kl_loss` and, from `config.start` on, "discriminator".
        """
        codec, judge, pixels = model.codec, model.discriminator, _pixels(batch)
        assert isinstance(codec, ImageKL), "the codec of latent diffusion"
        assert judge is None or isinstance(judge, PatchDiscriminator), "a discriminator of patches"
        step = model.begin()
        restored, posterior = codec.restore(pixels, rng)
        losses = image_kl_loss(
            codec,
            pixels,
            restored,
            posterior,
            self.config,
            perceptual=self.perceptual,
            discriminator=judge,
            step=step,
        )
        if judge is None or step < self.config.start:
            return losses
        against = discriminator_loss(judge, pixels, restored)
        return {**losses, "loss": losses["loss"] + against, "discriminator": against}


@dataclass(frozen=True, kw_only=True)
class MAGVITContestObjective:
    """MAGVIT-v2's tokenizer against a discriminator of clips: `(model, batch, rng) -> losses`.

    The model is a `Contest` of a `MAGVIT2` with words and a `Discriminator3d` or none.
    """

    weights: Weights = field(default_factory=Weights)
    perceptual: Perceptual | None = None

    def __call__(self, model: Contest, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """`batch["video"]` is uint8 `(B, T, H, W, 3)`, of the size that the discriminator sees.

        Returns "loss", to be minimised, the codec's terms as `tokenizer_losses` and, from `weights.start` on, "discriminator"
        and its terms and mean logits as `discriminator_losses`, each behind "discriminator_".
        """
        codec, pixels = model.codec, _pixels(batch)
        assert isinstance(codec, MAGVIT2), "MAGVIT-v2's tokenizer"
        step = model.begin()
        judge = None if step < self.weights.start else model.discriminator
        losses, restored = tokenizer_losses(codec, judge, pixels, step, self.weights, perceptual=self.perceptual)
        if judge is None:
            return losses
        against = discriminator_losses(judge, pixels, restored, model.anchors, self.weights)
        model.move_anchors(against["real"], against["fake"])
        total = against.pop("loss")
        told = {f"discriminator_{name}": value for name, value in against.items()}
        return {**losses, "loss": losses["loss"] + total, "discriminator": total, **told}


def _pixels(batch: dict[str, Any]) -> Tensor:
    """Pixels `(B, 3, T, H, W)` in [-1, 1] of a batch."""
    if "video" not in batch:
        raise UserError(f"a codec is trained on 'video', the batch has {', '.join(batch) or 'nothing'}; read shards of pixels")
    return to_pixels(batch["video"])
