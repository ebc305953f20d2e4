"""One channel of sound, its picture, and what of it goes into a film and comes out of one: AAC beside h264.

AAC works in blocks of 1024 samples that overlap. An encoder's first block is run-in, and its last one is filled up; the film's
edit list and its length say so: players and `decode.decode_audio` leave both out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet

from tubelet.core.errors import UserError

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Samples per second of AAC (ISO/IEC 14496-3, table 1.18), those that browsers play."""
BITS_PER_SAMPLE = 4
FULL = 32767


@dataclass(frozen=True)
class Audio:
    """int16 `(S,)` samples of one channel and how many a second there are. Raises UserError on another form."""

    samples: np.ndarray
    rate: int

    def __post_init__(self) -> None:
        if self.samples.dtype != np.int16 or self.samples.ndim != 1 or not len(self.samples):
            raise UserError(f"sound is int16 (S,), not empty, got {self.samples.dtype} {self.samples.shape}; convert it")
        if self.rate < 1:
            raise UserError(f"sound has at least one sample a second, got {self.rate}; give its rate")

    @classmethod
    def from_float(cls, values: np.ndarray, rate: int) -> Audio:
        """From `(S,)` floats; what lies outside [-1, 1] is clipped."""
        return cls((np.clip(values, -1.0, 1.0) * FULL).round().astype(np.int16), rate)

    def to_float(self) -> np.ndarray:
        """float32 `(S,)` in [-1, 1]."""
        return (self.samples / np.float32(FULL)).clip(-1.0, 1.0)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def spectrogram(audio: Audio, height: int, width: int) -> np.ndarray:
    """The amplitude of sines over time, uint8 `(height, width, 3)`: low ones below, white is 80 dB below black.

    Raises UserError on a size below 1.
    """
    if min(height, width) < 1:
        raise UserError(f"a picture of sound has at least 1 x 1 pixels, got {height} x {width}; enlarge it")
    size = 2 * max(height, 128)
    padded = np.pad(audio.to_float(), size // 2)
    begin = np.linspace(0, len(audio.samples), width, endpoint=False).astype(int)
    window = np.hanning(size)
    pieces = padded[begin[:, None] + np.arange(size)] * (2 * window / window.sum())  # (width, size)
    amplitude = np.abs(np.fft.rfft(pieces))[:, 1:]  # (width, size / 2)
    bands = np.maximum.reduceat(amplitude, np.arange(height) * (size // 2) // height, axis=1)  # (width, height)
    level = np.clip(1 + np.log10(bands + 1e-9) / 4, 0.0, 1.0)
    grey = (255 * (1 - level)).round().astype(np.uint8).T[::-1]  # (height, width)
    return np.repeat(grey[..., None], 3, axis=2)  # (height, width, 3)


def add_track(container: OutputContainer, audio: Audio) -> AudioStream:
    """An AAC track for `audio` in a film that is being written. Raises UserError on a rate that AAC does not have."""
    if audio.rate not in AAC_RATES:
        known = ", ".join(map(str, AAC_RATES))
        raise UserError(f"a film holds sound of {known} samples a second, got {audio.rate}; resample it")
    track = container.add_stream("aac", rate=audio.rate)
    assert isinstance(track, AudioStream)
    track.layout = "mono"
    track.bit_rate = BITS_PER_SAMPLE * audio.rate
    track.codec_context.thread_count = 1
    return track


def packets(track: AudioStream, audio: Audio) -> Iterator[Packet]:
    """The packets of a whole track."""
    frame = av.AudioFrame.from_ndarray(audio.samples[None], format="s16", layout="mono")
    frame.rate, frame.pts, frame.time_base = audio.rate, 0, Fraction(1, audio.rate)
    yield from track.encode(frame)
    yield from track.encode(None)


def joined(frames: Iterator[av.AudioFrame], rate: int) -> np.ndarray:
    """Decoded frames as one channel of int16 `(S,)` at `rate`; gaps between frames are not filled."""
    resampler = AudioResampler(format="s16", layout="mono", rate=rate)
    parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int16)
