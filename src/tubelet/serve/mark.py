"""An invisible mark in the brightness of a film, keyed, that survives what remuxing and re-encoding do to signed credentials.

The mark is one faint still pattern under the whole film: thousands of cosines of the picture (DCT-II), whose signs say the
payload, a convolutional code times a secret sign for each. Cosines are counted per picture, not per pixel, so the mark is found
again after scaling without a search over scales, and after cutting in time.

Writing looks at the film first: a cosine that already stands on its side is left alone, one that stands too far on the other
is given up, and what that saves goes to the rest. Reading keeps little more than the signs.

False alarms have a bound that does not depend on films. Without a mark, film and secret signs know nothing of each other, so
the sum of signed values over their root sum of squares exceeds t with a probability of at most exp(-t^2 / 2) for one payload
(Hoeffding's inequality for random signs). For the best of 2^32 payloads in four bands that is at most 4 * 2^32 exp(-t^2 / 2),
which is 1e-6 at THRESHOLD.

`python -m tubelet.serve.mark` measures all this.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

PSNR = 42.2
"""Decibels between a film and the marked one, at least."""
FLAT, SHORT = 1.0, 272
"""Root mean square of the mark where a picture is flat, in steps of 255, on a film whose short side has `SHORT` pixels or more;
unrest takes more, and so do smaller films, where a coder leaves less of it: up to twice that."""
FALSE_ALARMS = 1e-6
PAYLOAD_BITS = 32
BANDS = ((4.0, 32.0), (6.0, 48.0), (8.0, 72.0), (12.0, 96.0))
"""Half waves per short side of the cosines used. A film is marked in the finest band whose waves are 4 pixels long or longer,
but in the last one only where textures that stand still drown the mark in the one before: those are weaker at fine waves, and a
coder keeps what stands still. The mark is looked for in all of them."""
THRESHOLD = math.sqrt(2 * (PAYLOAD_BITS * math.log(2) + math.log(len(BANDS)) - math.log(FALSE_ALARMS)))  # 8.65
PEAK = 4.0
"""Most that the mark adds where a picture is flat, by its root mean square: cosines of an edge that moves meet where it was."""
GIVEN_UP = 4.0  # a cosine against its sign is given up when it is this many times stronger than the mark
LIMIT = 0.1  # of the local strength, beyond which a cosine's size counts no more
BURST = 24  # frames
"""How long the mark is on, and off, in a lively film. Coders drop what is faint from a picture that moves; the same energy at
once gets through."""
LIVELY, SPARE = 8.0, 30.0
"""Bursts are for films whose brightness changes by so many steps of 255 from frame to frame. A mark that stands `SPARE` above
chance before any coder has enough."""
BLOCK = 8  # pixels, of the masking grid
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709

_GRID = 256  # cosines per axis that have a secret sign
_GENERATORS = (0o557, 0o663, 0o711)  # rate 1/3, constraint length 9, free distance 18 (Larsen 1973)
_MEMORY = 8
_CODE_BITS = len(_GENERATORS) * (PAYLOAD_BITS + _MEMORY)


@dataclass(frozen=True)
class Found:
    """A mark: its payload, and how far above chance it stands: `THRESHOLD` or more, a clean mark has 15 to 90."""

    payload: int
    score: float


def payload_of(id: str) -> int:
    """The 32-bit payload that stands for an id, such as that of a video."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4])


def embed(frames: np.ndarray, key: bytes, payload: int) -> np.ndarray:
    """Mark uint8 `(T, H, W, 3)` frames; the marked ones, within `PSNR`. `payload`: 0 to 2^32 - 1."""
    assert frames.ndim == 4, f"frames are (T, H, W, 3), got {frames.shape}"
    assert frames.dtype == np.uint8, f"frames are uint8, got {frames.dtype}"
    assert 0 <= payload < 1 << PAYLOAD_BITS, f"a payload has {PAYLOAD_BITS} bits, got {payload}"
    T, H, W, _ = frames.shape
    fitting = [band for band in BANDS[:-1] if band[1] <= min(H, W) / 2] or [BANDS[0]]
    steady = np.ones(T, np.float32)
    ways = [(fitting[-1], steady)]
    if _unrest(frames) >= LIVELY:
        ways.insert(0, (fitting[-1], _bursts(T)))
    if fitting[-1] == BANDS[-2]:
        ways.append((BANDS[-1], steady))

    brightness = _mean_luma(frames)
    masks = np.stack([_mask(frame @ LUMA) for frame in frames])  # (T, H / BLOCK, W / BLOCK)
    signs, highest, chosen = _encode(payload), -1.0, frames
    for band, rhythm in ways:
        cosines, strengths = _Cosines.of(H, W, band), masks * rhythm[:, None, None]
        wanted = cosines.signs(key) * signs[cosines.code_bit]  # (V, U)
        pattern = _pattern(cosines, wanted, brightness, strengths)
        expected = cosines.limited(cosines.forward(brightness + cosines.spread(strengths.mean(0)) * pattern))
        score = float((wanted * expected).sum() / max(1e-9, math.sqrt((expected**2).sum())))
        if score >= SPARE:
            return _laid(frames, cosines, strengths, pattern)
        if rhythm is steady and score > highest:
            highest, chosen = score, _laid(frames, cosines, strengths, pattern)
    return chosen


def _pattern(cosines: _Cosines, wanted: np.ndarray, brightness: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The strongest pattern (H, W) that `PSNR`, `FLAT` and `PEAK` allow where the masks multiply it."""
    H, W = brightness.shape
    host = wanted * cosines.forward(brightness)
    power = cosines.spread((masks**2).mean(0))  # (H, W)
    allowed = 255.0**2 / 10 ** (PSNR / 10) - 1 / 12  # of squared brightness; rounding takes its share
    flat = FLAT * min(2.0, max(1.0, math.sqrt(SHORT / min(H, W))))
    low, high, pattern = 0.0, 64.0 * math.sqrt(H * W), np.zeros((H, W), np.float32)
    for _ in range(20):
        middle = (low + high) / 2
        trial = cosines.inverse(wanted * _push(host, middle)).clip(-PEAK * flat, PEAK * flat)
        squares = trial**2
        if squares.mean() <= flat**2 and (power * squares).mean() <= allowed:
            low, pattern = middle, trial
        else:
            high = middle
    return pattern


def _laid(frames: np.ndarray, cosines: _Cosines, masks: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    marked = np.empty_like(frames)
    for frame, mask, out in zip(frames, masks, marked, strict=True):
        shift = np.rint(cosines.spread(mask) * pattern)[..., None]  # (H, W, 1): brightness alone
        out[:] = (frame + shift).clip(0, 255)
    return marked


def _unrest(frames: np.ndarray) -> float:
    """Mean change of brightness from frame to frame, in steps of 255."""
    changes = [np.abs(after @ LUMA - before @ LUMA).mean() for before, after in itertools.pairwise(frames)]
    return float(np.mean(changes)) if changes else 0.0


def _bursts(count: int) -> np.ndarray:
    """(count,): the mark's strength over time in a lively film, mean 1: on and off in turns, beginning with on."""
    on = (np.arange(count) // BURST % 2 == 0).astype(np.float32)
    return on / on.mean()


def _push(host: np.ndarray, strength: float) -> np.ndarray:
    """How far to move each cosine along its wanted sign, given how far it stands along it already."""
    return np.where(host > -GIVEN_UP * strength, np.maximum(strength - host, 0), 0)


def detect(frames: np.ndarray, key: bytes) -> Found | None:
    """Look for a mark of this key in uint8 `(T, H, W, 3)` frames of any size; None where there is none to be sure of."""
    return detect_luma(_mean_luma(frames), key)


def detect_luma(luma: np.ndarray, key: bytes) -> Found | None:
    """As `detect`, from the mean brightness `(H, W)` over a film's frames; any scale and offset of brightness will do."""
    payload, score = best(luma, [key])[0]
    return Found(payload, score) if score >= THRESHOLD else None


def best(luma: np.ndarray, keys: Sequence[bytes]) -> list[tuple[int, float]]:
    """The likeliest payload under each key and its score, however low."""
    luma = luma.astype(np.float32)
    bands = [_best_of_band(luma, keys, band) for band in BANDS]
    return [max(candidates, key=lambda candidate: candidate[1]) for candidates in zip(*bands, strict=True)]


def _best_of_band(luma: np.ndarray, keys: Sequence[bytes], band: tuple[float, float]) -> list[tuple[int, float]]:
    cosines = _Cosines.of(*luma.shape, band)
    limited = cosines.limited(cosines.forward(luma))
    norm = float(np.sqrt((limited**2).sum()))
    if norm == 0:
        return [(0, 0.0)] * len(keys)
    places = cosines.code_bit.ravel()
    votes = np.stack([np.bincount(places, (cosines.signs(key) * limited).ravel(), _CODE_BITS) for key in keys])
    payloads, sums = _decode(votes)
    return [(int(payload), float(total) / norm) for payload, total in zip(payloads, sums, strict=True)]


def _mean_luma(frames: np.ndarray) -> np.ndarray:
    total = np.zeros(frames.shape[1:3], np.float32)
    for frame in frames:
        total += frame @ LUMA
    return total / len(frames)


def _mask(luma: np.ndarray) -> np.ndarray:
    """How much more than a flat one each block of a frame hides, (H / BLOCK, W / BLOCK): 1 to 2.5 by its unrest."""
    H, W = luma.shape
    rows, columns = -(-H // BLOCK), -(-W // BLOCK)
    padded = np.pad(luma, ((0, rows * BLOCK - H), (0, columns * BLOCK - W)), mode="edge")
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    unrest = blocks.std((1, 3))
    return (1 + np.minimum(unrest / 10, 1.5)).astype(np.float32)


@dataclass(frozen=True)
class _Cosines:
    """The cosines that carry the mark in a picture of some size.

    `rows` (V, H) and `columns` (U, W) are orthonormal bases, `used` (V, U) is the band, `code_bit` (V, U) says which bit of the
    code each one carries. `up` (H, blocks) and `across` (W, blocks) spread values of blocks over pixels.
    """

    rows: np.ndarray
    columns: np.ndarray
    used: np.ndarray
    code_bit: np.ndarray
    up: np.ndarray
    across: np.ndarray

    @staticmethod
    @functools.lru_cache(maxsize=12)
    def of(H: int, W: int, band: tuple[float, float]) -> _Cosines:
        short, (lowest, highest) = min(H, W), band
        V, U = (min(_GRID, side, math.ceil(highest * side / short) + 3) for side in (H, W))
        v, u = np.arange(V)[:, None], np.arange(U)[None, :]
        frequency = np.hypot(v * short / H, u * short / W)
        used = (frequency >= lowest) & (frequency <= highest)
        # The neighbours of a cosine carry other bits, and each bit has cosines of every direction and width.
        code_bit = (7 * u + 53 * v) % _CODE_BITS
        return _Cosines(_dct(V, H), _dct(U, W), used, code_bit, _linear(H), _linear(W))

    def forward(self, luma: np.ndarray) -> np.ndarray:
        return self.rows @ luma @ self.columns.T  # (V, U)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return (self.rows.T @ (values * self.used).astype(np.float32) @ self.columns).astype(np.float32)  # (H, W)

    def signs(self, key: bytes) -> np.ndarray:
        bits = np.frombuffer(hashlib.shake_256(b"tubelet mark 1\0" + key).digest(_GRID * _GRID // 8), np.uint8)
        return 1.0 - 2.0 * np.unpackbits(bits).reshape(_GRID, _GRID)[: self.used.shape[0], : self.used.shape[1]]

    def limited(self, values: np.ndarray) -> np.ndarray:
        """Cosines by the strength of their neighbours, cut at `LIMIT` of it: no strong line of a picture decides alone."""
        around = np.pad(values**2, 2, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(around, (5, 5))
        strength = np.sqrt(np.median(windows, axis=(2, 3)) + 1e-12)
        return np.where(self.used, np.clip(values / (LIMIT * strength), -1, 1), 0)

    def spread(self, grid: np.ndarray) -> np.ndarray:
        """A value per block to a value per pixel, without steps."""
        return self.up @ grid @ self.across.T  # (H, W)


def _dct(count: int, length: int) -> np.ndarray:
    angles = np.pi * np.arange(count)[:, None] * (np.arange(length)[None, :] + 0.5) / length
    basis = np.cos(angles) * math.sqrt(2 / length)
    basis[0] *= math.sqrt(0.5)
    return basis.astype(np.float32)


def _linear(length: int) -> np.ndarray:
    """(length, blocks): linear interpolation between the centres of blocks."""
    blocks = -(-length // BLOCK)
    place = np.clip((np.arange(length) + 0.5) / BLOCK - 0.5, 0, blocks - 1)
    left = np.minimum(place.astype(int), max(0, blocks - 2))
    weights = np.zeros((length, blocks), np.float32)
    weights[np.arange(length), left] = 1 - (place - left)
    weights[np.arange(length), np.minimum(left + 1, blocks - 1)] += place - left
    return weights


# --- the code ----------------------------------------------------------------------------------------------------------------


@functools.cache
def _trellis() -> tuple[np.ndarray, np.ndarray]:
    """For each state (the last eight bits): its two forerunners (256, 2), and the signs sent on the way (256, 2, 3)."""
    states = 1 << _MEMORY
    before = np.empty((states, 2), np.int64)
    sent = np.empty((states, 2, len(_GENERATORS)))
    for state in range(states):
        for oldest in range(2):
            register = (oldest << _MEMORY) | state  # newest bit lowest
            before[state, oldest] = register >> 1
            sent[state, oldest] = [1 - 2 * ((register & generator).bit_count() % 2) for generator in _GENERATORS]
    return before, sent


def _encode(payload: int) -> np.ndarray:
    """The signs (code bits,) of a payload, most significant bit first, closed by zeros."""
    register, signs = 0, []
    for place in range(PAYLOAD_BITS + _MEMORY):
        bit = payload >> (PAYLOAD_BITS - 1 - place) & 1 if place < PAYLOAD_BITS else 0
        register = (register << 1 | bit) & ((1 << _MEMORY + 1) - 1)
        signs += [1 - 2 * ((register & generator).bit_count() % 2) for generator in _GENERATORS]
    return np.array(signs, np.float64)


def _decode(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The payload whose signs agree best with (N, code bits) votes, and how well: Viterbi's algorithm, exact."""
    before, sent = _trellis()
    N = len(votes)
    steps = votes.reshape(N, -1, len(_GENERATORS))
    states = np.arange(1 << _MEMORY)
    total = np.full((N, len(states)), -np.inf)
    total[:, 0] = 0.0
    choices = np.empty((steps.shape[1], N, len(states)), np.uint8)
    for place in range(steps.shape[1]):
        reached = total[:, before] + (steps[:, place] @ sent.reshape(-1, len(_GENERATORS)).T).reshape(
            N, -1, 2
        )  # (N, states, 2)
        choice = reached.argmax(2)
        total = np.take_along_axis(reached, choice[..., None], 2)[..., 0]
        if place >= PAYLOAD_BITS:
            total[:, states & 1 == 1] = -np.inf  # the closing zeros
        choices[place] = choice
    state, payload = np.zeros(N, np.int64), np.zeros(N, np.int64)
    for place in reversed(range(steps.shape[1])):
        if place < PAYLOAD_BITS:
            payload |= (state & 1) << (PAYLOAD_BITS - 1 - place)
        state = before[state, choices[place, np.arange(N), state]]
    return payload, total[:, 0]


# --- figures -----------------------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, H: int, W: int, slope: float) -> np.ndarray:
    """Texture whose spectrum falls as frequency^-slope, of unit variance."""
    frequency = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.rfftfreq(W)[None, :])
    frequency[0, 0] = 1.0
    spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**slope
    spectrum[0, 0] = 0.0
    values = np.fft.irfft2(spectrum, (H, W))
    return (values / values.std()).astype(np.float32)


def textured_clip(seed: int, H: int = 272, W: int = 480, frames: int = 48) -> np.ndarray:
    """Two seconds at 24 frames a second of textures: a still or gliding ground, four discs that cross it, grain or none."""
    rng = np.random.default_rng(seed)
    ground, skin = (_noise(rng, 2 * H, 2 * W, rng.uniform(0.8, 1.5)) for _ in range(2))
    glide = rng.uniform(-3, 3, 2) * (rng.random() < 0.6)
    colour, contrast, grain = rng.uniform(60, 190, 3), rng.uniform(15, 55), rng.uniform(0, 4)
    discs = [(rng.uniform(20, 70), rng.uniform(0, (H, W)), rng.uniform(-4, 4, 2), rng.uniform(0, 255, 3)) for _ in range(4)]
    y, x = np.mgrid[:H, :W]
    clip = np.empty((frames, H, W, 3), np.uint8)
    for number, out in enumerate(clip):
        down, right = (int(step * number) % side for step, side in zip(glide, (H, W), strict=True))
        frame = colour + contrast * ground[down : down + H, right : right + W, None]  # (H, W, 3)
        for radius, start, speed, paint in discs:
            at = start + speed * number
            inside = (y - at[0]) ** 2 + (x - at[1]) ** 2 < radius**2
            frame[inside] = paint + 25 * skin[(y[inside] - int(at[0])) % (2 * H), (x[inside] - int(at[1])) % (2 * W), None]
        out[:] = (frame + rng.normal(0, grain, (H, W, 1))).clip(0, 255)
    return clip


def world_clip(seed: int, H: int = 272, W: int = 480, frames: int = 17) -> np.ndarray:
    """Two seconds at 8 frames a second of a shipped world, drawn at 64 x 112 and enlarged: what the shipped system makes."""
    from PIL import Image

    from tubelet.worlds import WORLDS

    worlds = list(WORLDS.values())
    film = worlds[seed % len(worlds)].sample(seed, height=64, width=112, frames=frames).video
    return np.stack([np.asarray(Image.fromarray(frame).resize((W, H), Image.Resampling.BICUBIC)) for frame in film])


def coded_luma(clip: np.ndarray, fps: int, crf: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Mean brightness of a clip after H.264 at `crf` (x264, preset medium), scaled to `size` (H, W) first."""
    import io
    from fractions import Fraction

    import av
    from av.container import OutputContainer
    from av.video.stream import VideoStream

    H, W = size or clip.shape[1:3]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        assert isinstance(container, OutputContainer)
        film = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "medium"})
        assert isinstance(film, VideoStream)
        film.height, film.width, film.pix_fmt, film.thread_count = H, W, "yuv420p", 1
        for number, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(W, H, "yuv420p", interpolation="BICUBIC")
            picture.pts, picture.time_base = number, Fraction(1, fps)
            container.mux(film.encode(picture))
        container.mux(film.encode(None))
    file.seek(0)
    total = np.zeros((H, W), np.float32)
    with av.open(file, "r") as source:
        for frame in source.decode(video=0):
            plane = frame.planes[0]
            total += np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    return total / len(clip)


def decibels(clip: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two clips."""
    squares = [float(((a.astype(np.float32) - b) ** 2).mean()) for a, b in zip(clip, other, strict=True)]
    return 10 * math.log10(255.0**2 / max(1e-9, sum(squares) / len(squares)))


def _measure() -> None:
    import argparse
    import sys

    parser = argparse.ArgumentParser(
        description="Marks clips, attacks them, looks for the mark; and looks where there is none."
    )
    parser.add_argument("--clips", type=int, default=20, help="marked clips of each kind")
    parser.add_argument("--unmarked", type=int, default=20, help="unmarked clips of each kind")
    parser.add_argument("--keys", type=int, default=100, help="keys tried on each unmarked clip")
    parser.add_argument("--first", type=int, default=0, help="seed of the first clip")
    parser.add_argument("--size", type=int, nargs=2, default=(272, 480), metavar=("H", "W"), help="pixels")
    asked = parser.parse_args()
    H, W = asked.size
    smaller = (round(H / 3) * 2, round(W / 3) * 2)
    attacks = {"crf 16": (16, None), "crf 28": (28, None), "2/3, crf 26": (26, smaller), "crf 33": (33, None)}
    say = sys.stdout.write
    for make, fps in ((textured_clip, 24), (world_clip, 8)):
        quality: list[float] = []
        scores: dict[str, list[float]] = {name: [] for name in attacks}
        right = dict.fromkeys(attacks, 0)
        for seed in range(asked.first, asked.first + asked.clips):
            clip, key, payload = make(seed, H, W), hashlib.sha256(b"key %d" % seed).digest(), payload_of(str(seed))
            marked = embed(clip, key, payload)
            quality.append(decibels(clip, marked))
            for name, attack in attacks.items():
                read, score = best(coded_luma(marked, fps, *attack), [key])[0]
                scores[name].append(score)
                right[name] += score >= THRESHOLD and read == payload
        if quality:
            mean = float(np.mean(quality))
            say(f"{make.__name__}, {len(quality)} clips of {H} x {W}: {min(quality):.2f} dB at least, {mean:.2f} mean\n")
        for name, values in scores.items() if quality else ():
            found = sum(score >= THRESHOLD for score in values)
            say(
                f"  {name:12} found {found} of {len(values)}, payload right {right[name]}; "
                f"score {min(values):.1f} at least, {np.percentile(values, 1):.1f} at 1 %, {np.mean(values):.1f} mean\n"
            )
    chance: list[float] = []
    for make, fps in ((textured_clip, 24), (world_clip, 8)):
        for seed in range(asked.first, asked.first + asked.unmarked):
            keys = [
                hashlib.sha256(b"%s %d %d" % (make.__name__.encode(), seed, number)).digest() for number in range(asked.keys)
            ]
            clip = make(1_000_000 + seed, H, W, 17)
            luma = _mean_luma(clip) if seed % 2 else coded_luma(clip, fps, 28)
            chance += [score for _, score in best(luma, keys)]
    if chance:
        most, mean = max(chance), float(np.mean(chance))
        say(f"unmarked, {2 * asked.unmarked} clips x {asked.keys} keys: score {most:.2f} at most, {mean:.2f} mean\n")
        for limit in (6.5, 7.0, 7.5, 8.0, THRESHOLD):
            say(f"  {sum(score >= limit for score in chance)} of {len(chance)} at {limit:.2f} or more\n")


if __name__ == "__main__":
    _measure()
