"""cascade: 64 to 128 to 256 pixels by two stages of super-resolution, against plain resizing.

Paper: W.A.L.T (Gupta et al. 2023), section 3.5; noise augmentation: Ho et al. 2021, "Cascaded Diffusion Models"; DALL-E 2.
Command: tubelet train cascade
Cost: 112 minutes on one core beside much other work (66 of its own). It needs a system, the shipped one by default, and renders
its own clips.
Score: at twice the size 35.8 dB and .244 perceptual, Lanczos 36.3 and .257; at four times 34.2 and .218, Lanczos 34.5 and .224:
docs/lineage.md. A run leaves table.json, table.md, sheet.png, stage-1.safetensors and stage-2.safetensors in its folder.

Clips of the worlds are simulated at three sizes; what is enlarged is the smallest, through the system's codec. Enlarged, too,
are films that the system makes of the same prompts, of which only the distribution can be judged, and films that no world
shows: textures with the spectrum of photographs that drift by and, where files are named, real ones (`footage`). Stages are
trained on the worlds alone and work in pixels; what the system's own codec would leave of larger films says "truth through the
codec". A stage adds to a bicubic enlargement, so "bicubic" is where it begins. One step
of the same networks gives the mean of all that could be there; "no noise added" shows the second stage the first one's film as
it is. DALL-E 2's upsampler (Ramesh et al. 2022, section 2.1), convolutions trained on crops beside blurred pictures, knows no
film and goes to four times the size at once. The perceptual distance is between the fixed features of `evaluate.distance` of a
film and of its truth.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Video
from tubelet.core.weights import load_module, save_module
from tubelet.data.stream import TensorSource
from tubelet.diffusion.paths import Cosine, VPLinear, zero_terminal_snr
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.fidelity import foreground, foreground_psnr, psnr
from tubelet.evaluate.report import make_cases, through_codec, world_of
from tubelet.generate.system import System, load
from tubelet.media.decode import decode_uint8, probe
from tubelet.models.glide import ADM, ADMConfig
from tubelet.models.walt import WALT, WALTConfig
from tubelet.recipes.lineage import Figures, Row, compare, device_of, millions, plain
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import accelerate
from tubelet.train.classify import as_pixels
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.train.unclip import Upsampler, UpsamplerObjective
from tubelet.train.upscaling import Stage, UpscaleObjective
from tubelet.worlds.constants import KINDS

TRAIN_SEED = 2_070_000_000
"""First seed of the training clips, among the worlds' training seeds."""
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
STAGES, ONE_STEP, BARE = "W.A.L.T", "W.A.L.T, one step", "W.A.L.T, no noise added"
UNCLIP = "unCLIP, frame by frame"
CODEC, OTHER = "truth through the codec", "other truth"
WAYS = {2: (*FILTERS, STAGES, ONE_STEP, CODEC, OTHER), 4: (*FILTERS, STAGES, ONE_STEP, BARE, UNCLIP, CODEC, OTHER)}
"""How films are made twice and four times as high and wide, and what truth scores."""
ROWS = tuple(f"{factor}x: {way}" for factor, ways in WAYS.items() for way in ways)
AGAINST = (("PSNR", "psnr", 1), ("perceptual", "perceptual", 3))
TEXTURES, SHOWN = 16, 5
"""Films of textures, and test clips on the sheet."""


def _training(steps: int, batch: int) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=1e-3)
    return TrainConfig(steps=steps, batch=batch, warmup=40, optimizer=optimizer, checkpoint_minutes=4.0)


@dataclass(frozen=True)
class Cascade:
    """Sizes, training and measures. The smallest films have the system's size and rate."""

    system: str = "worlds-64"
    """Whose films are enlarged, by name or folder."""
    rows: tuple[str, ...] = ROWS
    kinds: tuple[str, ...] = KINDS
    footage: tuple[str, ...] = ()
    """Files of real films, cut to the square in their middle; without any, textures alone."""
    takes: int = 8
    """Clips of each of them, from evenly spaced moments."""
    clips: int = 1500
    """Simulated clips that stages are trained on."""
    frames: int = 4
    """Of a film: what a stage sees at once."""
    patch: int = 4
    """Pixels of a token's side: few, so that a token is wide enough to pass all of its noise on."""
    width: int = 96
    depth: int = 4
    heads: int = 3
    window: int = 8
    """Tokens of a window's side."""
    first: TrainConfig = field(default_factory=lambda: _training(450, 12))
    second: TrainConfig = field(default_factory=lambda: _training(350, 3))
    unclip: ADMConfig = field(
        default_factory=lambda: ADMConfig(
            width=16, multipliers=(1, 2, 4), blocks=1, attention=(), seen=3, learn_sigma=False, groups=8
        )
    )
    """DALL-E 2's upsampler, which goes from the smallest pictures to the largest at once."""
    unclip_train: TrainConfig = field(default_factory=lambda: _training(600, 32))
    augmentation: int = 50
    """Training noises the smaller film to a step below this one."""
    shown: int = 10
    """The step to which the second stage's smaller film is noised in sampling."""
    steps: int = 8
    """Of a stage in sampling."""
    unclip_steps: int = 27
    """Of the upsampler, as in the paper."""
    n: int = 40
    """Test clips."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured, stages when they are needed; returns the table's file.

        Raises UserError when the size does not divide into windows, and on footage that is too short.
        """
        system = load(self.system, device=device_of(self.first), dtype="float32")
        self._check(system.config.size)
        tests = _Tests(self, system)
        stage = functools.cache(lambda number: self._stage(number, system, folder))

        def measured(factor: int, way: str, _: Path) -> Row | None:
            if way == OTHER:
                return Row(distances(tests.features(factor), features(tests.truth(factor, OTHERS))))
            if way == CODEC:
                made = _coded(system, tests.truth(factor))
                return Row(_against(tests.truth(factor), made), _cut_out(tests.truth(factor), made))
            enlarge = functools.partial(resized, factor=factor, how=way)
            figures: Figures = {}
            if way == UNCLIP:
                upsampler = self._upsampler(system, folder)
                if upsampler is None:
                    return None
                enlarge = functools.partial(cascaded, stages=[upsampler], steps=self.unclip_steps, shown=0)
                figures["parameters"] = float(sum(p.numel() for p in upsampler.parameters()))
            elif way not in FILTERS:
                stages = [stage(number) for number in range(1, factor // 2 + 1)]
                ready = [one for one in stages if one is not None]
                if len(ready) < len(stages):
                    return None
                steps, shown = 1 if way == ONE_STEP else self.steps, 0 if way == BARE else self.shown
                enlarge = functools.partial(cascaded, stages=ready, steps=steps, shown=shown)
                figures["parameters"] = float(sum(p.numel() for one in ready for p in one.parameters()))
            return _measured(tests, factor, enlarge, figures)

        rows: dict[str, Callable[[Path], Row | None]] = {
            f"{factor}x: {way}": functools.partial(measured, factor, way) for factor, ways in WAYS.items() for way in ways
        }
        others = ("textures", "footage") if self.footage else ("textures",)
        columns = (
            ("PSNR, dB", "psnr", plain(1)),
            ("foreground", "foreground", plain(1)),
            ("perceptual", "perceptual", plain(3)),
            *((f"{how}, {name}", f"{key}/{name}", plain(digits)) for name in others for how, key, digits in AGAINST),
            ("KID, generated", "kid", plain()),
            ("parameters", "parameters", millions),
            ("s a film", "seconds", plain(3)),
        )
        return compare(folder, self, rows, columns, self.rows)

    def _check(self, size: tuple[int, int]) -> None:
        if self.n < 2:
            raise UserError(f"distances need at least 2 test clips, got n={self.n}; raise it")
        if any(2 * side % (self.patch * self.window) for side in size):
            raise UserError(
                f"twice {size[0]} x {size[1]} pixels do not divide into windows of {self.window} patches of {self.patch}; "
                "choose other ones"
            )
        for number in (1, 2):
            self.network(number, size)

    def network(self, number: int, size: tuple[int, int]) -> WALTConfig:
        """Sizes of a stage, 1 or 2, for smallest films of `size`."""
        rows, columns = (side * 2**number // self.patch for side in size)
        return WALTConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            channels=3,
            patch=self.patch,
            grid=(self.frames, rows, columns),
            frame=(self.window, self.window),
            window=(self.frames, self.window, self.window),
            upscale=True,
        )

    def _stage(self, number: int, system: System, folder: Path) -> Stage | None:
        """A stage, trained when its file is not there; None where that was stopped."""
        config, path = (self.first, self.second)[number - 1], folder / f"stage-{number}.safetensors"
        torch.manual_seed(config.seed)  # the initial weights
        stage = Stage(WALT(self.network(number, system.config.size)), zero_terminal_snr(VPLinear()))
        if not path.exists():
            low, high = self._pairs(2 ** (number - 1), 2**number, system)
            some = slice(0, 256)
            stage.scale.fill_(float(stage.missing(as_pixels(low[some]), as_pixels(high[some])).std()))
            source = TensorSource({"low": low, "high": high}, seed=config.seed)
            objective = UpscaleObjective(augmentation=self.augmentation)
            result = train(stage, objective, source, config, folder / f"stage-{number}")
            if not result.finished:
                return None
            save_module(path, result.ema)
        load_module(path, stage)
        stage = stage.to(system.device).eval()
        if system.device.type == "cpu":
            accelerate(stage)
        return stage

    def _upsampler(self, system: System, folder: Path) -> Upsampler | None:
        """unCLIP's upsampler, trained when its file is not there; None where that was stopped."""
        config, path = self.unclip_train, folder / "unclip.safetensors"
        torch.manual_seed(config.seed)  # the initial weights
        model = Upsampler(ADM(self.unclip), Cosine())
        if not path.exists():
            pairs = self._pairs(1, 4, system)
            low, high = (films.flatten(0, 1)[:, None] for films in pairs)  # (n*T, 1, h, w, 3) each: frames as pictures
            result = train(
                model,
                UpsamplerObjective(),
                TensorSource({"low": low, "high": high}, seed=config.seed),
                config,
                folder / "unclip",
            )
            if not result.finished:
                return None
            save_module(path, result.ema)
        load_module(path, model)
        return model.to(system.device).eval()

    def _pairs(self, small: int, large: int, system: System) -> tuple[Tensor, Tensor]:
        """Training clips of two sizes, multiples of the system's, uint8 `(n, T, h, w, 3)` and `(n, T, H, W, 3)`."""
        both = []
        for factor in (small, large):
            size = system.config.size[0] * factor, system.config.size[1] * factor
            kinds = [self.kinds[place % len(self.kinds)] for place in range(self.clips)]
            jobs = [
                Job(world_of(kind), TRAIN_SEED + place, size, self.frames, system.config.fps, kind)
                for place, kind in enumerate(kinds)
            ]
            video, _ = in_memory(jobs, self.workers, f"clips of {size[0]} x {size[1]}")
            both.append(torch.from_numpy(_coded(system, video.numpy())) if factor == 1 else video)
        return both[0], both[1]


# Ways of enlarging


def resized(clips: np.ndarray, factor: int, how: str) -> np.ndarray:
    """uint8 clips `(n, T, H, W, 3)` enlarged frame by frame by one of `FILTERS`."""
    _, _, H, W, _ = clips.shape
    frames = [
        np.asarray(Image.fromarray(frame).resize((W * factor, H * factor), FILTERS[how])) for clip in clips for frame in clip
    ]
    return np.stack(frames).reshape(*clips.shape[:2], H * factor, W * factor, 3)


def cascaded(clips: np.ndarray, stages: Sequence[Stage | Upsampler], steps: int, shown: int, batch: int = 8) -> np.ndarray:
    """uint8 clips `(n, T, H, W, 3)` through stages one after the other; those after the first see films noised to `shown`."""
    parts = []
    for begin in range(0, len(clips), batch):
        film = as_pixels(torch.from_numpy(clips[begin : begin + batch])).to(next(stages[0].parameters()).device)
        rngs = [torch.Generator().manual_seed(begin + place) for place in range(len(film))]
        for place, stage in enumerate(stages):
            noised = {"shown": shown} if place and isinstance(stage, Stage) else {}
            film = stage.upscale(film, rngs, steps, **noised)
        parts.append(Video(film, 1.0).to_uint8())
    return np.concatenate(parts)


def _coded(system: System, clips: np.ndarray) -> np.ndarray:
    return np.stack(list(through_codec(system.codec, list(clips), system.config.fps)))


# Films to enlarge, and measures


class _Tests:
    """Test films of all sizes, each made when it is first asked for."""

    def __init__(self, config: Cascade, system: System) -> None:
        self.config, self.system = config, system
        self.truth = functools.cache(self._truth)
        self.features = functools.cache(lambda factor: features(self.truth(factor)))

    def _truth(self, factor: int, seed: int = 0) -> np.ndarray:
        config, system = self.config, self.system.config
        size = system.size[0] * factor, system.size[1] * factor
        cases = make_cases(config.kinds, config.n, size=size, frames=config.frames, fps=system.fps, seed=seed)
        return np.stack([case.truth for case in cases])

    @functools.cached_property
    def small(self) -> np.ndarray:
        """Simulated clips through the codec."""
        return _coded(self.system, self.truth(1))

    @functools.cached_property
    def generated(self) -> np.ndarray:
        """What the system makes of the same prompts."""
        config, system = self.config, self.system.config
        cases = make_cases(config.kinds, config.n, size=system.size, frames=config.frames, fps=system.fps)
        made = self.system.generate_batch([case.text for case in cases], range(config.n), frames=config.frames)
        return np.concatenate([clip.video.to_uint8() for clip in made])

    @functools.cached_property
    def others(self) -> Mapping[str, Mapping[int, np.ndarray]]:
        """Films that no world shows, by name and factor; 1: the smallest, means of pixels of the largest."""
        config, (H, W) = self.config, self.system.config.size
        largest = {"textures": textures(TEXTURES, config.frames, (4 * H, 4 * W))}
        if config.footage:
            shown = [clip for path in config.footage for clip in self._takes(path)]
            largest["footage"] = np.stack(shown)  # (n, T, 4H, 4W, 3)
        return {name: {4: large, 2: halved(large), 1: halved(halved(large))} for name, large in largest.items()}

    def _takes(self, path: str) -> Iterator[np.ndarray]:
        """The largest clips of a real film. Raises UserError when it is too short."""
        config, system = self.config, self.system.config
        size = 4 * system.size[0], 4 * system.size[1]
        latest = max(0.0, probe(path).seconds - config.frames / system.fps)
        for place in range(config.takes):
            start = latest * (place + 0.5) / config.takes
            yield decode_uint8(path, start=start, frames=config.frames, fps=system.fps, size=size)[0]


def textures(count: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Random textures that drift by, uint8 `(count, frames, *size, 3)`, the same for every call.

    Amplitudes fall with frequency as in photographs (Field 1987); steps are whole pixels, so that every frame is as sharp.
    """
    rng = np.random.default_rng(0)
    out = np.empty((count, frames, *size, 3), np.uint8)
    margin = 8 * frames
    rows, columns = size[0] + margin, size[1] + margin
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])  # (rows, columns // 2 + 1)
    amplitude = 1 / np.maximum(frequency, 1 / max(rows, columns))
    for film in out:
        noise = rng.standard_normal((3, rows, columns))
        field = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, s=(rows, columns))  # (3, rows, columns)
        field = np.einsum("cd,drk->rkc", 0.6 + 0.4 * np.eye(3), field / field.std())  # (rows, columns, 3)
        picture = (127.5 + 40 * field).round().clip(0, 255).astype(np.uint8)
        down, right = rng.integers(1, 9, 2)
        for t in range(frames):
            film[t] = picture[t * down : t * down + size[0], t * right : t * right + size[1]]
    return out


def halved(clips: np.ndarray) -> np.ndarray:
    """uint8 clips `(n, T, H, W, 3)` at half the size, each pixel the mean of four."""
    n, T, H, W, _ = clips.shape
    means = clips.reshape(n, T, H // 2, 2, W // 2, 2, 3).mean((3, 5))  # (n, T, H/2, W/2, 3)
    return means.round().astype(np.uint8)


def _measured(tests: _Tests, factor: int, enlarge: Callable[[np.ndarray], np.ndarray], figures: Figures) -> Row:
    """A way of enlarging: simulated clips and films that no world shows against truth, the system's as a distribution."""
    truth = tests.truth(factor)
    begun = time.perf_counter()
    made = enlarge(tests.small)
    seconds = (time.perf_counter() - begun) / len(made)
    figures |= {**_against(truth, made), "seconds": seconds}
    for name, films in tests.others.items():
        other = enlarge(films[1])
        figures[f"psnr/{name}"] = _mean(psnr, films[factor], other)
        figures[f"perceptual/{name}"] = perceptual(films[factor], other)
    figures |= distances(tests.features(factor), features(enlarge(tests.generated)))
    return Row(figures, _cut_out(truth, made))


def _against(truth: np.ndarray, made: np.ndarray) -> Figures:
    return {
        "psnr": _mean(psnr, truth, made),
        "foreground": _mean(foreground_psnr, truth, made),
        "perceptual": perceptual(truth, made),
    }


def _mean(measure: Callable[[np.ndarray, np.ndarray], float], truth: np.ndarray, made: np.ndarray) -> float:
    return float(np.mean([measure(one, other) for one, other in zip(truth, made, strict=True)]))


def perceptual(truth: np.ndarray, made: np.ndarray) -> float:
    """How far uint8 clips `(n, T, H, W, 3)` look from their truth: the root mean square difference of their features, averaged.

    1 is the deviation of a feature among simulated pictures.
    """
    return float((features(truth) - features(made)).square().mean(1).sqrt().mean())


def _cut_out(truth: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Squares of half the height of made clips' first frames, `(SHOWN, H/2, H/2, 3)`, around what the truth shows there."""
    side = truth.shape[2] // 2
    cuts = []
    for one, clip in zip(truth[:SHOWN], made[:SHOWN], strict=True):
        place = np.argwhere(foreground(one)[0])
        middle = place.mean(0) if len(place) else np.array(one.shape[1:3]) / 2
        top, left = (int(np.clip(at - side / 2, 0, most - side)) for at, most in zip(middle, one.shape[1:3], strict=True))
        cuts.append(clip[0, top : top + side, left : left + side])
    return np.stack(cuts)


def recipe() -> Cascade:
    """The experiment."""
    return Cascade()
