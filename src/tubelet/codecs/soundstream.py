"""SoundStream: a causal convolutional codec of sound, whose latents are words of several codebooks, each refining the last.

After Zeghidour et al. 2021, "SoundStream: An End-to-End Neural Audio Codec": strided convolutions that see the past only, with
dilated residual units before each of them (section III-A); residual vector quantisation, whose later levels are left out at
random in training so that the first ones alone are a coarser codec (section III-C); and spectra at several scales as the
reconstruction loss (section III-E). Transposed convolutions are written as a convolution whose channels become samples, which
they equal.

Words are running means, with no gradient of their own (section III-C; van den Oord et al. 2017, appendix A.1), and rare ones
are moved. Unlike there, spectra have linear bins, and there is no discriminator: what is asked of sound here is when and how
loud, not how natural.

It is no `Codec`: sound has one axis, a hop of samples is one frame of `levels` words, and there is nothing to standardise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.conv import Stream

DECAY = 0.97
"""Of the running means, a step. The paper's 0.99 is for runs a thousand times as long."""
RARE = 0.03
"""A word that occurs less often in a step, on the running mean, is moved."""
REVIVED = 0.1
"""How often a moved word counts as having occurred: it has some forty steps to prove itself."""


@dataclass(frozen=True)
class SoundStreamConfig:
    """Sizes of a `SoundStream`. Raises UserError when one is too small.

    Channels start at `width` and double at each of `strides`, whose product is the hop; before each stand residual units of
    `dilations`. A latent of `dim` numbers becomes `levels` words of `codes` each. `rate` is what it is trained on, in samples
    per second. The paper: 24 kHz, width 32, strides (2, 4, 5, 8), dilations (1, 3, 9), 1024 codes.
    """

    rate: int = 8000
    width: int = 16
    strides: tuple[int, ...] = (2, 5, 5, 5)
    dilations: tuple[int, ...] = (1, 3)
    dim: int = 64
    levels: int = 4
    codes: int = 256

    def __post_init__(self) -> None:
        if min(self.rate, self.width, *self.strides, *self.dilations, self.dim, self.levels, 1) < 1:
            raise UserError("every size of a SoundStream must be at least 1; raise the one that is not")
        if self.codes < 2:
            raise UserError(f"a codebook needs at least 2 words, got {self.codes}; raise codes")

    @property
    def hop(self) -> int:
        """Samples of one frame."""
        return math.prod(self.strides)


class CausalConv1d(nn.Module):
    """A convolution `(B, C, S)` to `(B, out, S / stride)` whose window ends at the last sample of its step; zeros stand before
    the first."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, out, kernel, stride, dilation=dilation)
        self.past = dilation * (kernel - 1) + 1 - stride
        assert self.past >= 0, f"a window of {kernel} samples would miss some at a stride of {stride}"
        # As loud behind it as before: torch's own layers would let a sound fade below their biases within a few of them.
        weight, bias = self.conv.parameters()
        nn.init.normal_(weight, std=(width * kernel) ** -0.5)
        nn.init.zeros_(bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`stream` carries the samples that the next chunk's first window still sees."""
        earlier = stream.states.get(self) if stream is not None else None
        if earlier is None:
            earlier = x.new_zeros(*x.shape[:2], self.past)
        x = torch.cat([earlier, x], dim=2)  # (B, C, past + S)
        if stream is not None:
            stream.states[self] = x[:, :, x.shape[2] - self.past :]
        return self.conv(x)


class Upsample1d(nn.Module):
    """`(B, C, S)` to `(B, out, S * stride)`: a transposed convolution of kernel 2 * stride whose end is cut off."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.up = CausalConv1d(width, out * stride, 2)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = self.up(x, stream).unflatten(1, (-1, self.stride))  # (B, out, stride, S)
        return x.transpose(2, 3).flatten(2)  # (B, out, S*stride)


class ResidualUnit(nn.Module):
    """`x + conv1(elu(conv7(elu(x))))`, the wide one dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.wide, self.point = CausalConv1d(width, width, 7, dilation=dilation), CausalConv1d(width, width, 1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return x + self.point(F.elu(self.wide(F.elu(x), stream)), stream)


class Quantized(NamedTuple):
    """What a residual quantiser found: latents `(B, D, T)`, words `(B, levels, T)`, and their mean squared error, `()`."""

    latents: Tensor
    codes: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """The nearest of `codes` words, which are running means of what they stood for in training.

    A word that hardly occurs any more is moved to where one is missed most: to the worst told latent of the batch.
    """

    words: Tensor
    counts: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("words", torch.zeros(codes, dim))
        self.register_buffer("counts", torch.zeros(codes))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Words `(B, T)` of latents `x (B, D, T)`; in training they also move."""
        flat = x.float().transpose(1, 2).flatten(0, 1)  # (B*T, D)
        if self.training:
            self._revive(flat)
        with torch.autocast(flat.device.type, enabled=False):  # near words differ by less than bfloat16 knows
            code = torch.addmm(self.words.square().sum(-1) / -2, flat, self.words.T).argmax(-1)  # (B*T,)
        if self.training:
            seen = F.one_hot(code, len(self.words)).to(flat.dtype)  # (B*T, codes)
            counts = torch.lerp(seen.sum(0), self.counts, DECAY)
            sums = torch.lerp(seen.T @ flat, self.words * self.counts[:, None], DECAY)  # (codes, D)
            self.words.copy_(sums / counts.clamp(min=1e-6)[:, None])
            self.counts.copy_(counts)
        return code.view(len(x), -1)

    def _revive(self, flat: Tensor) -> None:
        alive = self.counts >= RARE
        kept = self.words[alive]
        error = torch.cdist(flat, kept).amin(1) if len(kept) else torch.full_like(flat[:, 0], torch.inf)  # (B*T,)
        for rare in torch.nonzero(~alive)[:, 0].tolist():
            worst = flat[error.argmax()]
            error = torch.minimum(error, (flat - worst).norm(dim=1))
            self.words[rare], self.counts[rare] = worst, REVIVED


class ResidualQuantizer(nn.Module):
    """Each level finds the word that is nearest to what the levels before have left over."""

    def __init__(self, config: SoundStreamConfig) -> None:
        super().__init__()
        self.books = nn.ModuleList(Codebook(config.codes, config.dim) for _ in range(config.levels))

    def forward(self, x: Tensor, used: Tensor | None = None) -> Quantized:
        """Latents `x (B, D, T)`; of row b only the first `used (B,)` levels count, all by default."""
        total, left = torch.zeros_like(x), x
        codes: list[Tensor] = []
        errors = []
        for level, book in enumerate(self.books):
            code = book(left.detach())  # (B, T)
            word = self.word(level, code).to(x.dtype)  # (B, D, T)
            errors.append((left - word).square().mean())
            left = left - word
            total = total + (word if used is None else word * (level < used)[:, None, None])
            codes.append(code)
        # The gradient passes as if this were the identity.
        return Quantized(total.detach() + x - x.detach(), torch.stack(codes, 1), torch.stack(errors).mean())

    def latents(self, codes: Tensor) -> Tensor:
        """The sum of the words `(B, k, T)` of the first k levels, `(B, D, T)`."""
        return torch.stack([self.word(level, code) for level, code in enumerate(codes.unbind(1))]).sum(0)

    def word(self, level: int, code: Tensor) -> Tensor:
        """What a level's words `(B, T)` stand for, `(B, D, T)`."""
        book = self.books[level]
        assert isinstance(book, Codebook), "every level has one"
        return F.embedding(code, book.words).transpose(1, 2)


class SoundStream(nn.Module):
    """Sound `(B, 1, S)` in [-1, 1], S a multiple of the hop, to words `(B, levels, S / hop)` and back.

    A word depends on the samples up to its hop's end only, a sample on the words up to its hop's, so both ways may be streamed.
    """

    def __init__(self, config: SoundStreamConfig) -> None:
        super().__init__()
        self.config = config
        encoder: list[nn.Module] = [CausalConv1d(1, config.width, 7)]
        last = CausalConv1d(config.width, 1, 7)
        # Silence at the start: a new network is far too loud, and unlearning that takes longer than learning to speak.
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        decoder: list[nn.Module] = [last]
        width = config.width
        for stride in config.strides:
            encoder += [ResidualUnit(width, dilation) for dilation in config.dilations]
            encoder += [CausalConv1d(width, 2 * width, 2 * stride, stride)]
            decoder += [ResidualUnit(width, dilation) for dilation in reversed(config.dilations)]
            decoder += [Upsample1d(2 * width, width, stride)]
            width *= 2
        self.encoder = nn.ModuleList([*encoder, CausalConv1d(width, config.dim, 3)])
        self.quantizer = ResidualQuantizer(config)
        self.decoder = nn.ModuleList([CausalConv1d(config.dim, width, 7), *reversed(decoder)])

    def latents(self, sound: Tensor, stream: Stream | None = None) -> Tensor:
        """What is quantised, `(B, dim, S / hop)`. Raises UserError on another form of sound."""
        if sound.ndim != 3 or sound.shape[1] != 1 or not sound.shape[2] or sound.shape[2] % self.config.hop:
            hop = self.config.hop
            raise UserError(f"sound to encode is (B, 1, S), S a multiple of {hop}, got {tuple(sound.shape)}; pad it with zeros")
        return _through(self.encoder, sound, stream)

    def tokens(self, sound: Tensor, stream: Stream | None = None) -> Tensor:
        """Sound `(B, 1, S)` as words `(B, levels, S / hop)` in [0, codes). Raises UserError when S does not divide."""
        return self.quantizer(self.latents(sound, stream)).codes

    def from_tokens(self, codes: Tensor, stream: Stream | None = None) -> Tensor:
        """Sound `(B, 1, S)`, not clipped, of the words `(B, k, T)` of the first k levels. Raises UserError on other words."""
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.config.levels or not codes.shape[2]:
            raise UserError(f"words are (B, k, T) of 1 to {self.config.levels} levels, got {tuple(codes.shape)}; reshape them")
        if int(codes.min()) < 0 or int(codes.max()) >= self.config.codes:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise UserError(f"words lie in [0, {self.config.codes}), got {found}; check their source")
        return self.decode(self.quantizer.latents(codes), stream)

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Sound `(B, 1, S)` of latents `(B, dim, S / hop)`."""
        return _through(self.decoder, latents, stream)

    def forward(self, sound: Tensor) -> Tensor:
        """There and back, `(B, 1, S)`."""
        return self.decode(self.quantizer(self.latents(sound)).latents)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Words of a sound that arrives in pieces, each a multiple of the hop, as if it were whole."""
        stream = Stream()
        for chunk in chunks:
            yield self.tokens(chunk, stream)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Sound of words that arrive in pieces, as if they were whole."""
        stream = Stream()
        for chunk in chunks:
            yield self.from_tokens(chunk, stream)


def _through(layers: nn.ModuleList, x: Tensor, stream: Stream | None) -> Tensor:
    """One layer after the other; a convolution that is not the first has an ELU before it."""
    for place, layer in enumerate(layers):
        x = layer(x if place == 0 or isinstance(layer, ResidualUnit) else F.elu(x), stream)
    return x


SCALES = (64, 128, 256, 512, 1024)
"""Samples of the windows at which spectra are compared, each moved on by a quarter."""
AUDIBLE = 1e-3
"""Amplitude to which spectra are told apart: 60 dB below the loudest sine."""


def spectral_distance(sound: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How far two sounds `(B, 1, S)` are apart, averaged over `SCALES`, each `()`.

    First the norm of the difference of their spectra over that of the first, which loud things decide (spectral convergence,
    Arik et al. 2018, equation 4), then the mean difference of the logarithms, in nats, which everything decides alike.
    """
    ratios, logs = [], []
    for size in SCALES:
        a, b = (_spectrum(one.float(), size) for one in (sound, other))
        ratios.append(_relative(a, b))
        logs.append(((a + AUDIBLE).log() - (b + AUDIBLE).log()).abs().mean())
    return torch.stack(ratios).mean(), torch.stack(logs).mean()


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """The norm of the difference of two batches over that of the first, which counts as audible, `()`."""
    return (a - b).norm() / a.norm().clamp(min=AUDIBLE * a.numel() ** 0.5)


def _spectrum(sound: Tensor, size: int) -> Tensor:
    """Amplitudes of the sines in each window, `(B, F, T)`."""
    window = torch.hann_window(size, device=sound.device)
    # Magnitudes have no gradient at 0, where silence is.
    found = torch.stft(sound[:, 0], size, size // 4, window=window * 2 / window.sum(), return_complex=True)
    return (found.real.square() + found.imag.square() + 1e-10).sqrt()


@dataclass(frozen=True)
class SoundLossConfig:
    """Weights of the terms, and what a step hears."""

    convergence: float = 1.0
    logarithm: float = 1.0
    wave: float = 1.0
    """Of the relative difference of samples: where two sounds agree in phase as well, the rest is easy."""
    commitment: float = 0.25
    dropout: float = 0.5
    """Share of sounds of which only the first few levels count, each number of levels alike."""
    seconds: float = 1.0
    """Length of the pieces, cut at random places."""


@dataclass(frozen=True)
class SoundObjective:
    """The training loop's objective of a `SoundStream`; a batch has `audio (B, S)` int16."""

    config: SoundLossConfig = SoundLossConfig()

    def __call__(self, model: SoundStream, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and its unweighted terms. Raises UserError on sounds shorter than a piece."""
        config, hop = self.config, model.config.hop
        if "audio" not in batch:
            raise UserError(f"a codec of sound is trained on 'audio', the batch has {', '.join(batch) or 'nothing'}; render it")
        audio = batch["audio"]
        size = max(1, round(config.seconds * model.config.rate / hop)) * hop
        if audio.shape[1] < max(size, SCALES[-1]):
            raise UserError(f"pieces of {size} samples cannot be cut from {audio.shape[1]}; set seconds lower or render longer")
        start = torch.randint(audio.shape[1] - size + 1, (len(audio),), generator=rng, device=rng.device).tolist()
        pieces = [one[begin : begin + size] for one, begin in zip(audio, start, strict=True)]
        sound = torch.stack(pieces)[:, None].float() / 32767  # (B, 1, size)
        levels = torch.randint(1, model.config.levels + 1, (len(audio),), generator=rng, device=rng.device)
        whole = torch.rand(len(audio), generator=rng, device=rng.device) >= config.dropout
        used = levels.masked_fill(whole, model.config.levels).to(sound.device)  # (B,)
        found = model.quantizer(model.latents(sound), used)
        restored = model.decode(found.latents).float()
        convergence, logarithm = spectral_distance(sound, restored)
        terms = {
            "convergence": convergence,
            "logarithm": logarithm,
            "wave": _relative(sound, restored),
            "commitment": found.commitment.float(),
        }
        loss = sum((getattr(config, name) * term for name, term in terms.items()), convergence.new_zeros(()))
        return {"loss": loss, **terms}
