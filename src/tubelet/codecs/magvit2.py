"""MAGVIT-v2: a causal 3-D convolutional tokenizer of images and videos, whose words are signs.

After Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (Yu et al. 2023, section 3.2), on the networks
released with MAGVIT (Yu et al. 2022). Time is padded in front only; space is halved three times, time twice and late, by
strided convolutions; depth-to-space brings both back; the latents drive an adaptive group norm before the residual blocks of
every resolution of the decoder. 17 x 128 x 128 pixels are 5 x 16 x 16 tokens of 18 bits, an image alone is 1 x 16 x 16.

Unlike in public implementations no norm has statistics over time, nor has the adaptive one: frame t never hears of later ones,
so `encode(x[:, :, :1]) == encode(x)[:, :, :1]`. It is a `Codec` whose latents are the signs, or, as W.A.L.T uses it, real
numbers. It is no entry of CODECS, since its strides are fixed and its cost is another class than the one those share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.codecs.quantize import penalties, quantize, to_ids, to_signs
from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.nn.adversarial import Perceptual, held
from tubelet.nn.conv import Stream, fold_frames
from tubelet.nn.conv3d import AdaptiveFrameNorm, CausalConv3d, FrameNorm, Upsample3d, blur_halve


@dataclass(frozen=True)
class MAGVIT2Config:
    """Sizes of a `MAGVIT2`. Raises UserError when they do not fit each other.

    `channels` of the latent are the bits of a token when `quantized`. Level i has `width * multipliers[i]` channels and
    `residuals` blocks in the encoder and in the decoder, and so has the middle; behind every level but the last space is
    halved, and time where `halve_time` says so. A norm has `groups` of channels. With `temporal_kernel` 1 and time never halved
    it is the tokenizer of images that a video's is inflated from (`inflate`). `size` is the clip (frames, height, width) that
    is counted; any that divides passes.
    """

    channels: int = 18
    quantized: bool = True
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    residuals: int = 4
    halve_time: tuple[bool, ...] = (False, True, True)
    temporal_kernel: int = 3
    groups: int = 32
    size: tuple[int, int, int] = (17, 128, 128)

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.residuals, self.temporal_kernel, self.groups, *self.multipliers, 1) < 1:
            raise UserError("every size of a MAGVIT2 must be at least 1; raise the one that is not")
        if len(self.halve_time) != len(self.multipliers) - 1:
            raise UserError(
                f"{len(self.multipliers)} levels have {len(self.multipliers) - 1} steps between them, "
                f"got halve_time for {len(self.halve_time)}; name each"
            )
        if self.width % self.groups:
            near = max(1, round(self.width / self.groups)) * self.groups
            raise UserError(f"width {self.width} is not a multiple of {self.groups} groups; try {near}")
        if any(self.halve_time) and self.temporal_kernel < 2:
            raise UserError("halving time with a kernel of 1 frame drops frames; use a temporal_kernel of 3")

    @property
    def strides(self) -> Strides:
        return Strides(2 ** sum(self.halve_time), *[2 ** len(self.halve_time)] * 2)


class ResidualBlock3d(nn.Module):
    """Twice norm, SiLU and a causal convolution, around which a 1x1x1 one leads where the width changes; no biases."""

    def __init__(self, width: int, out: int, config: MAGVIT2Config) -> None:
        super().__init__()
        kernel = (config.temporal_kernel, 3, 3)
        self.up_norm, self.up = FrameNorm(width, config.groups), CausalConv3d(width, out, kernel, bias=False)
        self.down_norm, self.down = FrameNorm(out, config.groups), CausalConv3d(out, out, kernel, bias=False)
        self.around = CausalConv3d(width, out, (1, 1, 1), bias=False) if width != out else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        h = self.up(F.silu(self.up_norm(x)), stream)
        h = self.down(F.silu(self.down_norm(h)), stream)
        return h + (x if self.around is None else self.around(x))


def _blocks(widths: list[int], config: MAGVIT2Config) -> nn.ModuleList:
    """Blocks from each width to the next."""
    return nn.ModuleList(ResidualBlock3d(a, b, config) for a, b in pairwise(widths))


class MAGVIT2(Codec):
    """Pixels to signs (or real latents) and back; `tokens` and `from_tokens` do it with one number per cell."""

    config: MAGVIT2Config

    def __init__(self, config: MAGVIT2Config) -> None:
        super().__init__(config, config.channels, config.strides)
        widths = [config.width * m for m in config.multipliers]
        n, top, kernel = config.residuals, widths[-1], (config.temporal_kernel, 3, 3)
        self.encoder_in = CausalConv3d(3, widths[0], kernel, bias=False)
        self.encoder_levels, self.halves = nn.ModuleList(), nn.ModuleList()
        self.decoder_norms, self.decoder_levels, self.doubles = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            self.encoder_levels.append(_blocks([widths[max(i - 1, 0)], *[width] * n], config))
            above = widths[min(i + 1, len(widths) - 1)]
            self.decoder_norms.append(AdaptiveFrameNorm(above, config.groups, config.channels))
            self.decoder_levels.append(_blocks([above, *[width] * n], config))
            if i < len(config.halve_time):
                stride = (2 if config.halve_time[i] else 1, 2, 2)
                self.halves.append(CausalConv3d(width, width, kernel, stride))
                self.doubles.append(Upsample3d(above, above, kernel, stride))
        self.encoder_middle = _blocks([top] * (n + 1), config)
        self.encoder_norm = FrameNorm(top, config.groups)
        self.encoder_out = CausalConv3d(top, config.channels, (1, 1, 1))
        self.decoder_in = CausalConv3d(config.channels, top, kernel)
        self.decoder_middle = _blocks([top] * (n + 1), config)
        self.decoder_norm = FrameNorm(widths[0], config.groups)
        self.decoder_out = CausalConv3d(widths[0], 3, kernel)

    @property
    def blocks(self) -> list[nn.Module]:
        levels = (*self.encoder_levels, self.encoder_middle, self.decoder_middle, *reversed(self.decoder_levels))
        return [block for level in levels for block in level.children()]

    def outer_parameters(self) -> list[nn.Parameter]:
        layers = (self.encoder_in, self.encoder_out, self.decoder_in, self.decoder_out)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def before_signs(self, pixels: Tensor, stream: Stream | None = None) -> Tensor:
        """What the signs are taken of, `(B, C, T', h, w)`, from pixels of a checked size."""
        x = self.encoder_in(pixels.to(self.encoder_in.conv.weight.dtype), stream)
        for i, level in enumerate(self.encoder_levels):
            for block in level.children():
                x = block(x, stream)
            if i < len(self.halves):
                x = self.halves[i](x, stream)
        for block in self.encoder_middle:
            x = block(x, stream)
        return self.encoder_out(F.silu(self.encoder_norm(x)))

    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        z = self.before_signs(pixels, stream)
        return quantize(z) if self.config.quantized else z

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        z, frames = latents.to(self.decoder_in.conv.weight.dtype), 1
        x = self.decoder_in(z, stream)
        for block in self.decoder_middle:
            x = block(x, stream)
        for i in reversed(range(len(self.decoder_levels))):
            if i < len(self.doubles):
                x = self.doubles[i](x, stream)
                frames *= 2 if self.config.halve_time[i] else 1
            x = self.decoder_norms[i](x, z, frames, stream)
            for block in self.decoder_levels[i].children():
                x = block(x, stream)
        return self.decoder_out(F.silu(self.decoder_norm(x)), stream)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pixels `(B, 3, T, H, W)` as tokens `(B, T', h, w)` in [0, 2^channels). Raises UserError when nothing is quantised."""
        self.check_quantized()
        return to_ids(self.encode_raw(pixels).movedim(1, -1))

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Pixels `(B, 3, T, H, W)`, not clipped, of tokens `(B, T', h, w)`. Raises UserError when nothing is quantised."""
        self.check_quantized()
        return self.decode_raw(to_signs(tokens, self.channels).movedim(-1, 1))

    def check_quantized(self) -> None:
        """Raises UserError when the latents are real numbers."""
        if not self.config.quantized:
            raise UserError("this MAGVIT2 has real latents and no tokens; build it with quantized=True")


@torch.no_grad()
def inflate(video: MAGVIT2, image: MAGVIT2) -> None:
    """Fill a tokenizer of videos from one of images of the same widths, so that both treat an image alike.

    The kernel of the image becomes the last slice in time of the video's, the rest is zero (section 3.2): at first every frame
    is treated alone. Where time is doubled every new frame gets the same weights. Raises UserError on other widths.
    """
    alone = replace(video.config, temporal_kernel=1, halve_time=(False,) * len(video.config.halve_time))
    if image.config != alone:
        raise UserError(f"a tokenizer is inflated from its own image model, {alone}; got {image.config}")
    theirs = dict(image.named_parameters())
    for name, own in video.named_parameters():
        given = theirs[name]
        if ".up.conv." in name and name.startswith("doubles."):
            times = len(own) // len(given)
            given = given.unflatten(0, (-1, 1, 4)).expand(-1, times, *[-1] * given.ndim).flatten(0, 2)  # (C*st*4, ...)
        if own.ndim == 5:
            own.zero_()
            own[:, :, -1:] = given
        else:
            own.copy_(given)
    video.set_statistics(image.mean, image.std)


class Discriminator3d(nn.Module):
    """Clips `(B, 3, *size)` to one logit each, `(B, 1)`: StyleGAN's discriminator in three axes, as MAGVIT released it.

    Every residual block halves frames, rows and columns behind a blur (section 3.2: 3-D blur pooling), rounding up. It sees
    whole clips of one size, forwards and backwards.
    """

    def __init__(
        self, size: tuple[int, int, int], width: int = 128, multipliers: tuple[int, ...] = (2, 4, 4, 4, 4), groups: int = 32
    ) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Conv3d(3, width, 3, padding=1)
        widths = [width, *(width * m for m in multipliers)]
        self.blocks = nn.ModuleList(HalvingBlock(a, b, groups) for a, b in pairwise(widths))
        self.last, self.last_norm = nn.Conv3d(widths[-1], widths[-1], 3, padding=1), nn.GroupNorm(groups, widths[-1])
        cells = 1
        for side in size:
            for _ in multipliers:
                side = -(-side // 2)
            cells *= side
        self.hidden = nn.Linear(cells * widths[-1], widths[-1])
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises UserError on clips of another size."""
        if pixels.shape[1:] != (3, *self.size):
            raise UserError(f"this discriminator sees clips (B, 3, {self.size}), got {tuple(pixels.shape)}; crop them")
        x = F.leaky_relu(self.first(pixels), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.last_norm(self.last(x)), 0.2).flatten(1)  # (B, C*T*H*W)
        return self.out(F.leaky_relu(self.hidden(x), 0.2))


class HalvingBlock(nn.Module):
    """A residual block that halves `(B, C, T, H, W)` on every axis; the sum of both ways keeps its variance."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.up, self.up_norm = nn.Conv3d(width, width, 3, padding=1), nn.GroupNorm(groups, width)
        self.down, self.down_norm = nn.Conv3d(width, out, 3, padding=1), nn.GroupNorm(groups, out)
        self.around = nn.Conv3d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = blur_halve(F.leaky_relu(self.up_norm(self.up(x)), 0.2))
        h = F.leaky_relu(self.down_norm(self.down(h)), 0.2)
        return (h + self.around(blur_halve(x))) * 0.5**0.5


@dataclass(frozen=True)
class Weights:
    """Of the terms that the tokenizer and its discriminator are trained on."""

    reconstruction: float = 5.0
    perceptual: float = 0.1
    """Of the distance that `tokenizer_losses` is given; without one there is no such term."""
    adversarial: float = 0.1
    start: int = 0
    """The step from which on the discriminator speaks, and is to be trained."""
    commitment: float = 0.25
    entropy: float = 0.1
    entropy_start: float = 3.0
    """How much larger the weight of entropy is at the first step; it falls linearly over `entropy_steps`."""
    entropy_steps: int = 2000
    lecam: float = 0.001
    r1: float = 10.0

    def entropy_at(self, step: int) -> float:
        left = max(0.0, 1 - step / self.entropy_steps)
        return self.entropy * (1 + (self.entropy_start - 1) * left)


def tokenizer_losses(
    codec: MAGVIT2,
    discriminator: nn.Module | None,
    pixels: Tensor,
    step: int,
    weights: Weights | None = None,
    *,
    perceptual: Perceptual | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of the tokenizer on pixels `(B, 3, T, H, W)` in [-1, 1], scalars of which `loss` is minimised, and what came back.

    Squared error and the penalties of `quantize`; with a distance, its mean over frames; with a discriminator, from step
    `weights.start` on, the non-saturating loss against it, whose gradient does not reach it. Raises UserError when the size
    does not fit the strides or nothing is quantised.
    """
    codec.check_quantized()
    codec.strides.latent_shape(*pixels.shape[2:])
    w = weights or Weights()
    z = codec.before_signs(pixels).float()
    restored = codec.decode_raw(quantize(z))  # (B, 3, T, H, W)
    terms = {
        "reconstruction": (restored - pixels).square().mean(),
        **penalties(z.movedim(1, -1)),
    }
    if perceptual is not None:
        terms["perceptual"] = perceptual(fold_frames(pixels), fold_frames(restored)).mean()
    if discriminator is not None and step >= w.start:
        terms["adversarial"] = F.softplus(-held(discriminator, restored)).mean()
    scales = {**vars(w), "entropy": w.entropy_at(step)}
    loss = sum((scales[name] * term for name, term in terms.items()), z.new_zeros(()))
    return {"loss": loss, **terms}, restored.detach()


def discriminator_losses(
    discriminator: nn.Module, real: Tensor, fake: Tensor, anchors: Tensor, weights: Weights | None = None
) -> dict[str, Tensor]:
    """Losses of the discriminator on clips `(B, 3, T, H, W)` each, scalars of which `loss` is minimised.

    `anchors (2,)`: running means of its logits on real and on restored clips (`moved`). `r1` is the squared gradient of the
    logit by a real clip (Mescheder et al. 2018, equation 9, without the half), `lecam` as in `lecam`. All in float32, under
    autocast, too.
    """
    w = weights or Weights()
    # A slope's own slope wants the digits; and torch 2.13 fills the weights' gradients of bf16 convolutions over two frames,
    # padded to four, with whatever lay in memory (on CPUs with such instructions).
    with torch.autocast(real.device.type, enabled=False):
        real = real.detach().float().requires_grad_()
        on_real, on_fake = discriminator(real), discriminator(fake.detach().float())  # (B, 1) each
        (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
    terms = {
        "adversarial": F.softplus(-on_real).mean() + F.softplus(on_fake).mean(),
        "r1": slope.square().flatten(1).sum(1).mean(),
        "lecam": lecam(on_real, on_fake, anchors),
    }
    loss = terms["adversarial"] + w.r1 * terms["r1"] + w.lecam * terms["lecam"]
    return {"loss": loss, **terms, "real": on_real.detach().mean(), "fake": on_fake.detach().mean()}


def lecam(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """LeCAM regularisation (Tseng et al. 2021, equation 3), of the batch's mean logits as MAGVIT released it, `()`.

    What real clips score above the running mean of fake ones, squared, and what fake ones score below that of real ones.
    """
    return F.relu(real.mean() - anchors[1]).square() + F.relu(anchors[0] - fake.mean()).square()


def moved(anchors: Tensor, real: Tensor, fake: Tensor, decay: float = 0.999) -> Tensor:
    """The running means `(2,)` after a batch with the mean logits `real` and `fake`."""
    return decay * anchors + (1 - decay) * torch.stack([real, fake]).detach()


def tiny(config: MAGVIT2Config) -> MAGVIT2Config:
    """A config of the same shape, small enough for tests."""
    return replace(config, channels=6, width=8, residuals=1, groups=4, size=(5, 32, 32))


def example(config: MAGVIT2Config, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: pixels at the size that is counted."""
    return (torch.rand(batch, 3, *config.size) * 2 - 1,)


def stated(config: MAGVIT2Config) -> str:
    """The input that `example` makes, in words."""
    T, H, W = config.strides.latent_shape(*config.size)
    what = f"tokens of {config.channels} bits" if config.quantized else f"cells of {config.channels} numbers"
    return " x ".join(map(str, config.size)) + f" pixels (T, H, W) to {T} x {H} x {W} {what} and back"


# The tokenizer of 2^18 words, and W.A.L.T's: the same convolutions around eight real channels (Gupta et al. 2023, section 3.1).
SIZES: dict[str, MAGVIT2Config] = {"MAGVIT2": MAGVIT2Config(), "WALT": MAGVIT2Config(channels=8, quantized=False)}
