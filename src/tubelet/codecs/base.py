"""The contract of every codec: pixels to standardised latents and back, causal in time, whole or as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.nn.conv import Stream


class Codec(nn.Module, ABC):
    """Pixels `(B, 3, T, H, W)` in [-1, 1] to latents `(B, C, T', h, w)` and back, fp32 at both ends.

    `1 + st*k` frames give `1 + k` latent frames and every output depends on the frames up to its own only, so that an image is
    a one-frame video, `encode(x[:, :, :1]) == encode(x)[:, :, :1]`, and streaming is exact. `encode` standardises by the stored
    per-channel `mean` and `std`, which are saved with the weights; training uses `encode_raw` and `decode_raw`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Any, channels: int, strides: Strides) -> None:
        super().__init__()
        self.config, self.channels, self.strides = config, channels, strides
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @abstractmethod
    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        """Pixels of a checked size to raw latents."""

    @abstractmethod
    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        """Raw latents to pixels."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, encoder first: what compilation and sharding wrap from outside."""

    @abstractmethod
    def outer_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first and last layers of encoder and decoder, which AdamW trains where Muon trains the matrices."""

    def encode_raw(self, pixels: Tensor, stream: Stream | None = None) -> Tensor:
        """Latents before standardisation. Raises UserError when the size does not fit the strides."""
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise UserError(
                f"a codec encodes pixels (B, 3, T, H, W), got {tuple(pixels.shape)}; bring the axes into this order"
            )
        frames, height, width = pixels.shape[2:]
        if stream is not None and stream.begun:
            if frames < 1 or frames % self.strides.t:
                raise UserError(f"a later chunk has a multiple of {self.strides.t} frames, got {frames}; cut the stream there")
            frames += 1
        self.strides.latent_shape(frames, height, width)
        latents = self._encode(pixels, stream)
        if stream is not None:
            stream.begun = True
        return latents.float()

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Pixels from latents that are not standardised; values may leave [-1, 1] a little."""
        self._check_latents(latents)
        pixels = self._decode(latents, stream)
        if stream is not None:
            stream.begun = True
        return pixels.float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Standardised latents `(B, C, T', h, w)`. Raises UserError when the size does not fit the strides."""
        return self._standardise(self.encode_raw(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `(B, 3, T, H, W)` from standardised latents, not clipped."""
        return self.decode_raw(self._restore(latents))

    def forward(self, pixels: Tensor) -> Tensor:
        """There and back, `(B, 3, T, H, W)`."""
        return self.decode_raw(self.encode_raw(pixels))

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a clip that arrives in pieces, exactly as if it were whole.

        The first chunk has `1 + st*k` frames, each later one `st*k`; anything else raises UserError.
        """
        stream = Stream()
        for chunk in chunks:
            yield self._standardise(self.encode_raw(chunk, stream))

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents that arrive in pieces of any number of latent frames, exactly as if they were whole."""
        stream = Stream()
        for chunk in chunks:
            yield self.decode_raw(self._restore(chunk), stream)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the raw latents' mean and standard deviation per channel, each `(C,)`, positive and finite where it must be."""
        if mean.shape != (self.channels,) or std.shape != (self.channels,):
            raise UserError(
                f"statistics are one value for each of {self.channels} channels, got {tuple(mean.shape)} and "
                f"{tuple(std.shape)}; reduce over batch, time and space"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise UserError("statistics must be finite and deviations positive; measure them on latents that vary")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.channels or 0 in latents.shape:
            raise UserError(
                f"this codec decodes latents (B, {self.channels}, T, h, w), got {tuple(latents.shape)}; "
                "use latents that it has encoded"
            )

    def _standardise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)

    def _restore(self, latents: Tensor) -> Tensor:
        self._check_latents(latents)
        return latents * self.std.view(-1, 1, 1, 1) + self.mean.view(-1, 1, 1, 1)
