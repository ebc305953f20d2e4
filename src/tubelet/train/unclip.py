"""What unCLIP's parts learn by and how they are asked: two priors of image embeddings, a decoder that reads one, upsamplers.

After Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2204.06125), section 2. Here an
embedding goes with its words as one more token in front of them (`told`): a caption's embedding where a prior is asked, an
image's where the decoder is. Guidance and the engine then take both as any other condition, and `Prepared` gives the engine
such conditions where it would read words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.types import Condition
from tubelet.decoding.autoregressive import Context, sample
from tubelet.diffusion.guidance import guided
from tubelet.diffusion.hybrid import hybrid_loss
from tubelet.diffusion.objectives import denoiser
from tubelet.diffusion.paths import Cosine, VariancePreserving, spaced_sigmas
from tubelet.diffusion.solvers import SOLVERS
from tubelet.generate.engine import Sampling
from tubelet.models.glide import ADM, DecoderCondition, drop_condition
from tubelet.models.unclip import SCALE, AutoregressivePrior, DiffusionPrior, drop_text, high_dots, prior_loss
from tubelet.models.unet import UNet
from tubelet.nn.attention import KeyValues
from tubelet.nn.conv import fold_frames, unfold_frames
from tubelet.nn.degradation import aligned_crops, bsr, gaussian_blur
from tubelet.text.base import TextEncoder
from tubelet.text.bpe import PAD, Tokenizer
from tubelet.train.classify import as_pixels
from tubelet.train.contrasting import read
from tubelet.train.lineage import read_words
from tubelet.train.text_to_video import TextToVideo

# Embeddings among words


def told(embedding: Tensor, words: Condition) -> Condition:
    """Embeddings `(B, E)` in front of token states `(B, L, W)`: `(B, 1 + L, max(E, W))`, the narrower widened by zeros."""
    wide = max(embedding.shape[1], words.states.shape[2])
    first = F.pad(embedding, (0, wide - embedding.shape[1]))[:, None]  # (B, 1, wide)
    states = torch.cat([first, F.pad(words.states, (0, wide - words.states.shape[2]))], dim=1)  # (B, 1 + L, wide)
    return Condition(states, F.pad(words.mask, (1, 0), value=True))


def heard(condition: Condition, embed: int, width: int) -> tuple[Tensor, Condition]:
    """What `told` has put together: embeddings `(B, embed)` and words of `width`."""
    return condition.states[:, 0, :embed], Condition(condition.states[:, 1:, :width], condition.mask[:, 1:])


def wordless(words: Condition) -> Condition:
    """The same places without a word in them, as where a caption was dropped."""
    return Condition(words.states, torch.zeros_like(words.mask))


class Prepared(TextEncoder):
    """Conditions that were worked out before: a prompt is the number of one, the empty one is an embedding of zeros alone."""

    trainable = False
    config = None

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        first = torch.arange(condition.mask.shape[1], device=condition.mask.device) == 0  # (L,)
        self.states = torch.cat([condition.states, torch.zeros_like(condition.states[:1])])  # (n + 1, L, W)
        self.mask = torch.cat([condition.mask, first[None]])  # (n + 1, L)

    @property
    def width(self) -> int:
        return self.states.shape[2]

    def truncated(self, prompt: str) -> bool:
        return False

    def _encode(self, prompts: list[str]) -> Condition:
        rows = [int(prompt) if prompt else -1 for prompt in prompts]
        return Condition(self.states[rows], self.mask[rows])


# The decoder


class Decoder(nn.Module):
    """A U-Net that is told an image embedding besides words (section 2.1), as the engine's network of films of one frame."""

    def __init__(self, unet: UNet, condition: DecoderCondition, path: VariancePreserving) -> None:
        super().__init__()
        self.unet, self.condition, self.path = unet, condition, path

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`z (B, C, 1, H, W)`, noise levels `sigma (B,)` and what `told` makes of images and words, to the noise, like z."""
        image, words = heard(condition, self.condition.config.embed, self.condition.config.width)
        x = z[:, :, 0]  # (B, C, H, W)
        return self.picture(x, self.path.told_step(sigma), image, words)[:, : x.shape[1], None]  # (B, C, 1, H, W)

    def picture(self, x: Tensor, t: Tensor, image: Tensor, words: Condition) -> Tensor:
        """Noised `x (B, C, H, W)`, steps `t (B,)`, image embeddings `(B, E)`, words to noise and variance `(B, 2C, H, W)`."""
        nothing = image.new_zeros(len(x), self.condition.config.time)  # (B, time)
        given = self.condition(image, nothing, words.states, words.mask)
        return self.unet(x, t, Condition(given.context, given.mask), given.time)


@dataclass(frozen=True, kw_only=True)
class DecoderObjective:
    """Noise and variance of a picture that is told by its embedding and its caption; the model's denoiser is a `Decoder`.

    `(model, batch, rng) -> losses`; a batch has `latent (B, C, 1, h, w)`, its embeddings `image (B, E)` and `caption`.
    """

    image_drop: float = 0.1
    """Share of embeddings set to zero."""
    text_drop: float = 0.5
    """Share of captions emptied."""

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and, as `hybrid_loss`, its parts "simple" and "vlb"."""
        decoder = model.denoiser
        assert isinstance(decoder, Decoder), "a network that reads embeddings"
        words = read_words(model, batch, 0.0, rng)
        image, mask = drop_condition(batch["image"], words.mask, rng, self.image_drop, self.text_drop)
        words = Condition(words.states, mask)
        x = batch["latent"][:, :, 0]  # (B, C, h, w)
        return hybrid_loss(lambda z, t: decoder.picture(z, t, image, words), x, rng, decoder.path)


# The upsamplers


class Upsampler(nn.Module):
    """An upsampler (section 2.1): an `ADM` of convolutions alone that makes pictures `ratio` times as high and wide.

    Every frame of a film is a picture of its own. `corrupt`: what training shows, "blur" (64 to 256 pixels) or "bsr" (beyond).
    """

    def __init__(
        self, network: ADM, path: VariancePreserving, ratio: int = 4, corrupt: Literal["blur", "bsr"] = "blur"
    ) -> None:
        super().__init__()
        self.network, self.path, self.ratio, self.corrupt = network, path, ratio, corrupt

    def shown(self, low: Tensor, rng: torch.Generator) -> Tensor:
        """Small pictures `(B, 3, h, w)` in [-1, 1] as training shows them."""
        return gaussian_blur(low) if self.corrupt == "blur" else bsr(low, rng)

    @torch.no_grad()
    def upscale(self, low: Tensor, rngs: Sequence[torch.Generator], steps: int = 27) -> Tensor:
        """Films `(B, 3, T, H, W)` in [-1, 1] `ratio` times as high and wide, each by noise of its own generator.

        `steps` of DDIM, whose estimates are cut to [-1, 1]; the paper takes 27, and 15 for the second upsampler. They are
        counted up from the first: at the chain's last one, where next to nothing is left of a picture, a predicted noise tells
        nothing of it. Raises UserError for steps that the chain does not have.
        """
        B, C, T, H, W = low.shape
        large = (T, C, H * self.ratio, W * self.ratio)
        z = torch.cat([torch.randn(large, generator=rng) for rng in rngs]).to(low)  # (B*T, 3, H', W')
        seen = fold_frames(low)  # (B*T, 3, H, W)

        def network(z: Tensor, sigma: Tensor, _: None) -> Tensor:
            return self.network(z, self.path.told_step(sigma), seen)[:, :C]

        denoise = denoiser(network, "eps", self.path)
        levels = spaced_sigmas(self.path, steps, "leading")
        made = SOLVERS["ddim"].solve(lambda z, sigma: denoise(z, sigma, None).clamp(-1, 1), z, levels, path=self.path)
        return unfold_frames(made, B).clamp(-1, 1)  # (B, 3, T, H', W')


@dataclass(frozen=True, kw_only=True)
class UpsamplerObjective:
    """The noise of random crops of pictures, seen beside the same places of corrupted smaller ones.

    `(model, batch, rng) -> losses` with an `Upsampler`; a batch has uint8 pictures `low (B, 1, h, w, 3)` and
    `high (B, 1, ratio h, ratio w, 3)`.
    """

    share: int = 4
    """A crop's side is the picture's divided by this."""

    def __call__(self, model: Upsampler, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", with learned variances also its parts "simple" and "vlb", as `hybrid_loss`."""
        low, high = (as_pixels(batch[name])[:, :, 0] for name in ("low", "high"))  # (B, 3, h, w), (B, 3, H, W)
        low, high = aligned_crops(model.shown(low, rng), high, rng, self.share)
        if model.network.config.learn_sigma:
            return hybrid_loss(lambda z, t: model.network(z, t, low), high, rng, model.path)
        t = torch.randint(len(model.path), (len(high),), generator=rng, device=rng.device).to(high.device)
        n = torch.randn(high.shape, generator=rng, device=rng.device).to(high.device)
        sigma = model.path.sigma_of_step(t)
        alpha, noise = (value.float().view(-1, 1, 1, 1) for value in (model.path.alpha(sigma), model.path.noise(sigma)))
        return {"loss": F.mse_loss(model.network(alpha * high + noise * n, t, low).float(), n)}


# The diffusion prior

PRIOR_PATH = Cosine()
"""The chain of image embeddings (appendix C)."""


@dataclass(frozen=True, kw_only=True)
class PriorObjective:
    """The clean image embedding from a noised one and its caption (equation 2).

    `(model, batch, rng) -> losses`; a batch has unit embeddings `image` and `text (B, E)` and `caption`.
    """

    text: TextEncoder
    """Gives the token states."""
    text_drop: float = 0.1
    """Share of captions emptied, embedding and words together."""

    def __call__(self, model: DiffusionPrior, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", of embeddings times `SCALE`."""
        image, words = batch["image"], self.text.encode(batch["caption"])
        text, mask = drop_text(batch["text"], words.mask, rng, self.text_drop)
        t = torch.randint(len(PRIOR_PATH), (len(image),), generator=rng, device=rng.device).to(image.device)
        n = torch.randn(image.shape, generator=rng, device=rng.device).to(image.device)
        sigma = PRIOR_PATH.sigma_of_step(t)
        alpha, noise = (value.float()[:, None] for value in (PRIOR_PATH.alpha(sigma), PRIOR_PATH.noise(sigma)))  # (B, 1) each
        answer = model(alpha * SCALE * image + noise * n, t, text, words.states, mask)
        return {"loss": prior_loss(answer.float(), image)}


@torch.no_grad()
def draw(
    prior: DiffusionPrior, text: Tensor, words: Condition, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """Unit image embeddings `(B, E)` for captions, told by their embeddings `text (B, E)` and their words.

    Every row has its own generator. (The paper takes 64 steps of Analytic-DPM, whose variances are fitted to the data.)
    """
    embed, width = prior.config.embed, prior.config.text_width

    def network(z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embedding, states = heard(condition, embed, width)
        return prior(z, PRIOR_PATH.told_step(sigma), embedding, states.states, states.mask)

    nothing = told(torch.zeros_like(text), wordless(words))
    denoise = guided(denoiser(network, "x", PRIOR_PATH), told(text, words), nothing, sampling.guidance, sampling.interval)
    noise = torch.stack([torch.randn(len(row), generator=rng) for row, rng in zip(text, generators, strict=True)])  # (B, E)
    levels = spaced_sigmas(PRIOR_PATH, sampling.steps)
    drawn = SOLVERS[sampling.solver].solve(denoise, noise.to(text), levels, path=PRIOR_PATH, generator=generators)  # (B, E)
    return F.normalize(drawn, dim=-1)


# The autoregressive prior


def ids_and_mask(tokenizer: Tokenizer, captions: Sequence[str], context: int) -> tuple[Tensor, Tensor]:
    """Captions as CLIP reads them, ids and their mask `(B, L)`."""
    ids = read(tokenizer, captions, context)
    return ids, ids != PAD


@dataclass(frozen=True, kw_only=True)
class CodesObjective:
    """Every code of an image embedding from the caption and the codes before it.

    `(model, batch, rng) -> losses`; a batch has `codes (B, K)`, the caption's embedding `text (B, E)`, the level of their dot
    product `dot (B,)` and `caption`.
    """

    tokenizer: Tokenizer
    text_drop: float = 0.1
    """Share of captions emptied, embedding and words together."""

    def __call__(self, model: AutoregressivePrior, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", in nats a code."""
        codes = batch["codes"]
        ids, mask = (x.to(codes.device) for x in ids_and_mask(self.tokenizer, batch["caption"], model.config.context))
        text, mask = drop_text(batch["text"], mask, rng, self.text_drop)
        logits = model(ids, mask, text, batch["dot"], codes)  # (B, K, buckets)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())}


class _Read:
    """What an autoregressive prior has read: keys and values by layer, and how many codes, None before the caption."""

    def __init__(self, depth: int) -> None:
        self.layers = [KeyValues() for _ in range(depth)]
        self.codes: int | None = None


def _context(model: AutoregressivePrior, ids: Tensor, mask: Tensor, text: Tensor, dot: Tensor) -> Context[_Read]:
    """A caption to go on from with codes; inputs as in the model's `forward`."""
    before = model.prefix(ids, mask, text, dot)  # (B, L + 2, D)

    def step(codes: Tensor, read: _Read | None) -> Tensor:
        first = 0 if read is None or read.codes is None else read.codes
        x = model.read(codes, first)  # (B, K, D)
        if read is None or read.codes is None:
            x = torch.cat([before, x], dim=1)  # (B, L + 2 + K, D)
        held = first + codes.shape[1]
        if read is not None:
            read.codes = held
        seen = F.pad(mask, (0, 2 + held), value=True)
        return model.decode(x, seen, None if read is None else read.layers)[:, -1]  # (B, buckets)

    return Context(step, ids[:, :0], lambda: _Read(len(model.blocks)))


@torch.no_grad()
def draw_codes(
    model: AutoregressivePrior,
    ids: Tensor,
    mask: Tensor,
    text: Tensor,
    generators: Sequence[torch.Generator],
    dot: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Codes `(B, K)`, one component after the other; without `dot (B,)` each row's level is drawn from the top half.

    `Buckets.dequantise` and `PCA.restore` turn them into an embedding. Every row has its own generator. `guidance` steers away
    from what the model draws without a caption, as for the diffusion prior; 1 is none. Inputs and errors as in the model's
    `forward`.
    """
    c = model.config
    if dot is None:
        dot = torch.cat([high_dots(1, c.dots, generator).to(ids.device) for generator in generators])  # (B,)
    unguided = None
    if guidance != 1.0:
        unguided = _context(model, ids, torch.zeros_like(mask), torch.zeros_like(text), dot)
    return sample(_context(model, ids, mask, text, dot), c.components, generators, unguided=unguided, scale=guidance)
