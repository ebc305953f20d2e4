"""A codec whose latents are words: signs that need no table, or the nearest of a table of learned codes.

After MAGVIT-v2 (Yu et al. 2023, section 3.1). `bits` numbers a cell become one word of 2^bits, by lookup-free quantisation
(`codecs.quantize`) or by vector quantisation (van den Oord et al. 2017, section 3), around either codec of CODECS: so the two
ways, and the two kinds of network, compare with everything else alike. `codecs.magvit2` is the paper's own network, whose
three-dimensional convolutions cost a CPU four times as much for a clip of 64 x 64 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.codecs import CODECS, build_codec
from tubelet.codecs.base import Codec
from tubelet.codecs.quantize import MOST_BITS, penalties, to_ids, to_signs
from tubelet.core.errors import UserError
from tubelet.nn.conv import Stream
from tubelet.nn.conv3d import normalise_frames

TEMPERATURE = 1.0
"""Of the entropies. Latents are normalised, so that public implementations' 0.01 would leave nearly all of them no gradient."""

LOOKED_AT = 256
"""Latents of a batch whose probability of every code of a table is computed."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of a `VideoTokenizer`. Raises UserError when they cannot be.

    There are 2^bits words. `temporal_stride` and `temporal_kernel` are the codec's, whose sizes are its `balanced` ones.
    """

    bits: int = 12
    quantizer: Literal["lfq", "vq"] = "lfq"
    codec: Literal["causal_conv", "transformer"] = "causal_conv"
    temporal_stride: int = 4
    temporal_kernel: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise UserError(f"a word has 1 to {MOST_BITS} bits, got {self.bits}; 12 make 4,096 words")
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"there is no quantizer {self.quantizer!r}; choose one of {', '.join(QUANTIZERS)}")


class LookupFree(nn.Module):
    """The word is the signs of the latent."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def ids(self, z: Tensor) -> Tensor:
        """Latents `(..., d)` to words `(...)`."""
        return to_ids(z)

    def codes(self, ids: Tensor) -> Tensor:
        """Words `(...)` to what the decoder reads, `(..., d)`. Raises UserError on a word that is not there."""
        return to_signs(ids, self.bits)

    def penalties(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """What training adds for latents `(..., d)` and their words, unweighted: `entropy` and `commitment`, as
        `quantize.penalties`."""
        return penalties(z, TEMPERATURE)


class Nearest(nn.Module):
    """The word is the nearest of 2^bits learned codes; methods as in `LookupFree`.

    The penalty on entropy, which MAGVIT gives a table, too, also moves codes that are no latent's nearest.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2**bits, bits))

    @torch.no_grad()
    def ids(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # near codes differ by less than bfloat16 knows
            flat = z.float().flatten(0, -2)  # (N, d)
            closeness = torch.addmm(self.table.square().sum(-1) / -2, flat, self.table.T)  # (N, 2^d)
        return closeness.argmax(-1).view(z.shape[:-1])

    def codes(self, ids: Tensor) -> Tensor:
        if bool(((ids < 0) | (ids >= len(self.table))).any()):
            found = f"{int(ids.min())} to {int(ids.max())}"
            raise UserError(f"words lie in [0, {len(self.table)}), got {found}; check their source")
        return F.embedding(ids, self.table)

    def penalties(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """`codebook` brings codes to the latents, `commitment` latents to their codes (equation 3, second and third term);
        `entropy` is as of signs, with a softmax over all codes, of evenly chosen latents, `LOOKED_AT` at most."""
        codes = self.codes(ids)
        return {
            "codebook": (codes - z.detach()).square().mean(),
            "commitment": (z - codes.detach()).square().mean(),
            "entropy": self._entropy(z.flatten(0, -2)),
        }

    def _entropy(self, z: Tensor) -> Tensor:
        z = z[:: -(-len(z) // LOOKED_AT)].float()  # (N, d)
        with torch.autocast(z.device.type, enabled=False):
            # |z|^2 is the same for all codes.
            log_p = ((2 * z @ self.table.T - self.table.square().sum(-1)) / TEMPERATURE).log_softmax(-1)  # (N, 2^d)
        p = log_p.exp()
        mean = p.mean(0)
        return -(p * log_p).sum(-1).mean() + (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


QUANTIZERS: dict[str, type[LookupFree | Nearest]] = {"lfq": LookupFree, "vq": Nearest}


class VideoTokenizer(Codec):
    """Pixels to words and back; as a `Codec` its latents are what the decoder reads of each word, `bits` numbers."""

    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        entry = CODECS[config.codec]
        inner = build_codec(config.codec, entry.config.balanced(config.temporal_stride, config.bits, config.temporal_kernel))
        super().__init__(config, config.bits, inner.strides)
        self.inner, self.quantizer = inner, QUANTIZERS[config.quantizer](config.bits)

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return 2**self.config.bits

    @property
    def blocks(self) -> list[nn.Module]:
        return self.inner.blocks

    def outer_parameters(self) -> list[nn.Parameter]:
        return [*self.inner.outer_parameters(), *self.quantizer.parameters()]

    def before_words(self, pixels: Tensor, stream: Stream | None = None) -> Tensor:
        """What the words are taken of, `(B, T', h, w, bits)`, from pixels of a checked size.

        Normalised frame by frame: mean 0 and variance 1 over a frame's cells and channels, so that no frame hears of another.
        """
        z = self.inner._encode(pixels, stream).float()
        return normalise_frames(z, 1).movedim(1, -1)  # (B, T', h, w, bits)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads for `z (B, T', h, w, bits)`, `(B, bits, T', h, w)`, and the words `(B, T', h, w)`.

        The gradient passes as if nothing happened.
        """
        ids = self.quantizer.ids(z)
        codes = self.quantizer.codes(ids).detach()
        # Not z + (codes - z): its rounding would leave values that are almost the codes.
        return (codes + (z - z.detach())).movedim(-1, 1), ids

    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        return self.quantize(self.before_words(pixels, stream))[0]

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        return self.inner._decode(latents, stream)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pixels `(B, 3, T, H, W)` as words `(B, T', h, w)` in [0, 2^bits). Raises UserError on a size that does not divide."""
        self.strides.latent_shape(*pixels.shape[2:])
        return self.quantizer.ids(self.before_words(pixels))

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Pixels `(B, 3, T, H, W)`, not clipped, of words `(B, T', h, w)`. Raises UserError on a word that is not there."""
        return self.decode_raw(self.quantizer.codes(tokens).movedim(-1, 1))


def usage(tokens: Tensor, words: int) -> dict[str, float]:
    """How a vocabulary of `words` is used by words of any shape: `used`, the share that occurs at all, and `perplexity`.

    Perplexity is the exponential of the entropy: the size of a vocabulary that is used evenly and says as much.
    """
    counts = torch.bincount(tokens.flatten(), minlength=words).double()
    share = counts / counts.sum()
    return {"used": float((counts > 0).double().mean()), "perplexity": float(torch.special.entr(share).sum().exp())}
