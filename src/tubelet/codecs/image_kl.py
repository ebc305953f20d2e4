"""The autoencoder of latent diffusion: images to a Gaussian over latents 8 times smaller, and back.

After High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022, 2112.10752, section 3.1 and appendix
G): a convolutional encoder gives mean and log-variance of every latent, a slight KL penalty keeps them near unit Gaussians, and
the decoder is trained on a sample, with L1, a perceptual distance and a discriminator of patches. A video is encoded frame by
frame, so that time costs nothing and gains nothing.

    pixels (B, 3, T, 256, 256) -> frames (B*T, 3, 256, 256) -> 128 channels at 256, 256 at 128, 512 at 64, 512 at 32
    -> attention -> mean and log-variance (B*T, 8, 32, 32) -> latents (B, 4, T, 32, 32)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.codecs.losses import to_pixels
from tubelet.core.config import from_dict
from tubelet.core.errors import UserError
from tubelet.core.files import read_json
from tubelet.core.types import Strides
from tubelet.core.weights import load_tensors
from tubelet.nn.adversarial import PatchDiscriminator, Perceptual, adaptive_weight, held, hinge
from tubelet.nn.conv import Stream, fold_frames, unfold_frames
from tubelet.nn.image_blocks import CellAttention, Downsample, ResBlock, Upsample


@dataclass(frozen=True)
class ImageKLConfig:
    """Sizes of an `ImageKL`. Raises UserError when they do not fit each other.

    Level k, 0 the finest, has `width * multipliers[k]` channels and `blocks` residual blocks in the encoder, one more in the
    decoder; each level after the first halves both sides. `scale` is what latents are multiplied by to have about unit
    variance; it becomes the codec's statistics. `size` is the side of the image that is counted; other sides work too.
    """

    channels: int = 4
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    groups: int = 32
    scale: float = 0.18215
    size: int = 256

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.blocks, self.groups, self.size, *self.multipliers) < 1 or not self.multipliers:
            raise UserError("every size of an image codec must be at least 1; raise the one that is not")
        if self.width % self.groups:
            raise UserError(f"width {self.width} does not divide into {self.groups} groups; try {4 * self.groups}")
        if not 0 < self.scale < float("inf"):
            raise UserError(f"scale must be positive and finite, got {self.scale}; 0.18215 is Stable Diffusion's")
        if self.size % self.stride:
            raise UserError(f"size must be a multiple of {self.stride}, got {self.size}; try {32 * self.stride}")

    @property
    def stride(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class Posterior:
    """The encoder's answer, a Gaussian per latent: `mean` and `log_variance (B, C, T, h, w)`, float32."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, rng: torch.Generator | None = None) -> Tensor:
        """One draw, shaped like the mean; the noise is drawn where the generator lives."""
        device = self.mean.device if rng is None else rng.device
        noise = torch.randn(self.mean.shape, generator=rng, device=device).to(self.mean.device)
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Tensor:
        """KL to the unit Gaussian in nats, `(B, T)`: the sum over a frame's latents (Kingma & Welling 2014, appendix B)."""
        each = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return each.sum((1, 3, 4)) / 2


class ImageKL(Codec):
    """The codec of Stable Diffusion. Each frame is coded alone: the stride in time is 1.

    `encode_raw` gives a sample of the posterior in training, from torch's global generator, and its mean in evaluation;
    `restore` is what a loss calls. The published scale is in the statistics: mean 0 and deviation 1 / scale.
    """

    config: ImageKLConfig

    def __init__(self, config: ImageKLConfig) -> None:
        c, side = config, config.stride
        super().__init__(config, c.channels, Strides(1, side, side))
        widths = [c.width * m for m in c.multipliers]
        deep, last = widths[-1], len(widths) - 1
        self.encoder_in = nn.Conv2d(3, c.width, 3, padding=1)
        now = c.width
        self.encoder_levels = nn.ModuleList()
        for k, wide in enumerate(widths):
            level = _row(now, wide, c.blocks, c.groups)
            self.encoder_levels.append(level if k == last else level.append(Downsample(wide, corner=True)))
            now = wide
        self.encoder_middle = _middle(deep, c.groups)
        self.encoder_norm = nn.GroupNorm(c.groups, deep, 1e-6)
        self.encoder_out = nn.Conv2d(deep, 2 * c.channels, 3, padding=1)
        self.moments = nn.Conv2d(2 * c.channels, 2 * c.channels, 1)  # the two maps between networks and latents: 1x1
        self.latents = nn.Conv2d(c.channels, c.channels, 1)
        self.decoder_in = nn.Conv2d(c.channels, deep, 3, padding=1)
        self.decoder_middle = _middle(deep, c.groups)
        self.decoder_levels = nn.ModuleList()
        for k, wide in reversed(list(enumerate(widths))):
            level = _row(now, wide, c.blocks + 1, c.groups)
            self.decoder_levels.append(level.append(Upsample(wide)) if k else level)
            now = wide
        self.decoder_norm = nn.GroupNorm(c.groups, now, 1e-6)
        self.decoder_out = nn.Conv2d(now, 3, 3, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter as torch does, and the statistics: for a module built on the meta device, after `to_empty`."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                module.reset_parameters()
        self.mean.zero_()
        self.std.fill_(1 / self.config.scale)

    @property
    def blocks(self) -> list[nn.Module]:
        """All residual blocks, encoder first."""
        return [module for module in self.modules() if isinstance(module, ResBlock)]

    def outer_parameters(self) -> list[nn.Parameter]:
        layers = (self.encoder_in, self.encoder_out, self.moments, self.latents, self.decoder_in, self.decoder_out)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def posterior(self, pixels: Tensor) -> Posterior:
        """The Gaussian over the raw latents of `pixels (B, 3, T, H, W)`. Raises UserError when the size does not fit."""
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise UserError(
                f"a codec encodes pixels (B, 3, T, H, W), got {tuple(pixels.shape)}; bring the axes into this order"
            )
        self.strides.latent_shape(*pixels.shape[2:])
        return self._posterior(pixels)

    def restore(self, pixels: Tensor, rng: torch.Generator | None = None) -> tuple[Tensor, Posterior]:
        """Pixels decoded from a sample of their posterior, and the posterior: what training compares."""
        posterior = self.posterior(pixels)
        return self.decode_raw(posterior.sample(rng)), posterior

    def _posterior(self, pixels: Tensor) -> Posterior:
        x = self.encoder_in(fold_frames(pixels.to(self.encoder_in.weight.dtype)))  # (B*T, width, H, W)
        for level in self.encoder_levels:
            x = level(x)
        x = self.encoder_middle(x)  # (B*T, deep, h, w)
        x = self.moments(self.encoder_out(F.silu(self.encoder_norm(x))))  # (B*T, 2C, h, w)
        mean, log_variance = unfold_frames(x.float(), len(pixels)).chunk(2, dim=1)  # (B, C, T, h, w) each
        # As released: a deviation between 3e-7 and 2e4, so that no early step overflows.
        return Posterior(mean, log_variance.clamp(-30, 20))

    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        posterior = self._posterior(pixels)
        return posterior.sample() if self.training else posterior.mean

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        x = self.decoder_in(self.latents(fold_frames(latents.to(self.latents.weight.dtype))))  # (B*T, deep, h, w)
        x = self.decoder_middle(x)
        for level in self.decoder_levels:
            x = level(x)
        return unfold_frames(self.decoder_out(F.silu(self.decoder_norm(x))), len(latents))  # (B, 3, T, H, W)


def _row(width: int, out: int, blocks: int, groups: int) -> nn.Sequential:
    """The residual blocks of a level, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(width if n == 0 else out, out, groups=groups) for n in range(blocks)))


def _middle(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(width, width, groups=groups), CellAttention(width, groups=groups), ResBlock(width, width, groups=groups)
    )


# Losses


@dataclass(frozen=True)
class ImageKLLossConfig:
    """Weights of the terms as released. L1 and KL are sums over an image, which is what makes the KL's weight so small."""

    kl: float = 1e-6
    perceptual: float = 1.0
    """Of the distance, which counts once for every pixel value."""
    adversarial: float = 0.5
    """Times the adaptive weight."""
    start: int = 50_001
    """The step from which on the discriminator speaks, and is to be trained."""


def image_kl_loss(
    codec: ImageKL,
    pixels: Tensor,
    restored: Tensor,
    posterior: Posterior,
    config: ImageKLLossConfig | None = None,
    *,
    perceptual: Perceptual | None = None,
    discriminator: PatchDiscriminator | None = None,
    step: int = 0,
) -> dict[str, Tensor]:
    """The loss of encoder and decoder, from what `codec.restore(pixels)` gave; a frame is an image.

    Returns scalars: `loss`, to be minimised; `reconstruction` and `kl`, sums over an image and means over images; with a
    discriminator, from step `config.start` on, `adversarial` and its `adaptive_weight`. No gradient reaches the discriminator.
    """
    config = config or ImageKLLossConfig()
    real, made = fold_frames(pixels), fold_frames(restored)  # (B*T, 3, H, W)
    error = (real - made).abs()
    if perceptual is not None:
        error = error + config.perceptual * perceptual(real, made).view(-1, 1, 1, 1)
    reconstruction = error.sum() / len(error)
    kl = posterior.divergence().mean()
    losses = {"loss": reconstruction + config.kl * kl, "reconstruction": reconstruction, "kl": kl}
    if discriminator is None or step < config.start:
        return losses
    adversarial = -held(discriminator, made).mean()
    weight = adaptive_weight(reconstruction, adversarial, codec.decoder_out.weight)
    losses["loss"] = losses["loss"] + config.adversarial * weight * adversarial
    return {**losses, "adversarial": adversarial, "adaptive_weight": weight}


def discriminator_loss(discriminator: PatchDiscriminator, pixels: Tensor, restored: Tensor) -> Tensor:
    """The hinge loss of the discriminator on a batch and its reconstruction, `(B, 3, T, H, W)` each; a scalar."""
    return hinge(discriminator(fold_frames(pixels)), discriminator(fold_frames(restored.detach())))


@dataclass(frozen=True)
class ImageKLObjective:
    """The training loop's objective without the adversarial term: `(model, batch, rng) -> losses`."""

    config: ImageKLLossConfig = ImageKLLossConfig()
    perceptual: Perceptual | None = None

    def __call__(self, model: ImageKL, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """`batch["video"]` is uint8 `(B, T, H, W, 3)`."""
        if "video" not in batch:
            raise UserError(
                f"a codec is trained on 'video', the batch has {', '.join(batch) or 'nothing'}; read shards of pixels"
            )
        pixels = to_pixels(batch["video"])
        restored, posterior = model.restore(pixels, rng)
        return image_kl_loss(model, pixels, restored, posterior, self.config, perceptual=self.perceptual)


# Published weights

# What diffusers' AutoencoderKL calls our modules; applied in this order to a parameter's name.
PUBLISHED_NAMES = (
    (r"\.(norm|conv)_in\.", r".\g<1>1."),
    (r"\.(norm|conv)_out\.", r".\g<1>2."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"_middle\.0\.", ".mid_block.resnets.0."),
    (r"_middle\.2\.", ".mid_block.resnets.1."),
    (r"_middle\.1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"_middle\.1\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"_middle\.1\.attention\.qkv\.", ".mid_block.attentions.0.to_qkv."),  # three layers there: to_q, to_k and to_v
    (r"^encoder_levels\.(\d+)\.\d+\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder_levels\.(\d+)\.\d+\.conv\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
    (r"^encoder_levels\.(\d+)\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder_levels\.(\d+)\.", r"decoder.up_blocks.\1.resnets."),
    (r"^(en|de)coder_norm\.", r"\1coder.conv_norm_out."),
    (r"^(en|de)coder_(in|out)\.", r"\1coder.conv_\2."),
    (r"^moments\.", "quant_conv."),
    (r"^latents\.", "post_quant_conv."),
)
# Names of the attention's layers in older files.
OLDER_NAMES = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
# Settings of diffusers that have one value here, which is also their default there.
FIXED: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def read_diffusers(folder: str | Path) -> ImageKL:
    """A codec from a checkpoint folder of diffusers' AutoencoderKL: `config.json` and `diffusion_pytorch_model.safetensors`.

    Nothing is unpickled. Raises UserError when a file is missing or broken, when the autoencoder has another shape than
    Stable Diffusion's, and when names, shapes or finiteness do not hold.
    """
    codec = ImageKL(_published_config(Path(folder) / "config.json"))
    path = Path(folder) / "diffusion_pytorch_model.safetensors"
    found = {}
    for name, value in load_tensors(path).items():
        for old, new in OLDER_NAMES:
            name = name.replace(old, new)
        found[name] = value
    state, wanted, wrong = {}, set(), []
    for ours, own in codec.state_dict().items():
        if ours in ("mean", "std"):
            state[ours] = own
            continue
        theirs = ours
        for old, new in PUBLISHED_NAMES:
            theirs = re.sub(old, new, theirs)
        names = [theirs.replace("to_qkv", f"to_{one}") for one in "qkv"] if "to_qkv" in theirs else [theirs]
        wanted.update(names)
        shape = (len(own) // len(names), *own.shape[1:])
        wrong += [name for name in names if name in found and found[name].shape != shape]
        if all(name in found for name in names) and not wrong:
            state[ours] = torch.cat([found[name] for name in names])
    missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or unknown or wrong:
        raise UserError(
            f"{path} does not hold the autoencoder of its config.json (missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shape {wrong[:3]}); fetch both files from one source"
        )
    broken = sorted(name for name, value in found.items() if not value.isfinite().all())
    if broken:
        raise UserError(f"{path} holds values that are not finite ({broken[:3]}); restore it from its source")
    codec.load_state_dict(state)
    return codec.eval()


def _published_config(path: Path) -> ImageKLConfig:
    told = read_json(path)
    if not isinstance(told, Mapping) or told.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{path} does not describe an AutoencoderKL; give the folder of one, often called vae")
    widths = told.get("block_out_channels")
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise UserError(f"{path} needs block_out_channels, a list of widths, got {widths!r}; restore it from its source")
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": [max(1, w // widths[0]) * widths[0] for w in widths],
    }
    for key, value in {**FIXED, **kinds}.items():
        if told.get(key, value) != value:
            raise UserError(
                f"{path} sets {key} to {told[key]!r}, this codec has {value!r} only; "
                "take an autoencoder of the shape of Stable Diffusion's"
            )
    names = {
        "latent_channels": "channels",
        "layers_per_block": "blocks",
        "norm_num_groups": "groups",
        "scaling_factor": "scale",
    }
    absent = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "scaling_factor": 0.18215}  # diffusers' own
    sizes = {ours: told.get(theirs, absent[theirs]) for theirs, ours in names.items()}
    return from_dict(
        ImageKLConfig,
        {**sizes, "width": widths[0], "multipliers": [w // widths[0] for w in widths], "size": 32 * 2 ** (len(widths) - 1)},
    )


# The entry of a catalogue


def tiny(config: ImageKLConfig) -> ImageKLConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=16, groups=4, blocks=1, size=2 * config.stride)


def example(config: ImageKLConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: clips of one frame, pixels in [-1, 1]."""
    return (torch.rand(batch, 3, 1, config.size, config.size) * 2 - 1,)


def stated(config: ImageKLConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.size} x {config.size} pixels (C, H, W), encoded and decoded"


SIZES: dict[str, ImageKLConfig] = {"KL-f8": ImageKLConfig()}
