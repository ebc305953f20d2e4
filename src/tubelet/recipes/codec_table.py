"""codec-table: which codec should the denoiser live on? Both codecs at equal compute, by temporal stride and channels.

Paper: the trade that latent diffusion (Rombach et al. 2022, section 4.1) asks of every codec, here with laws for FID.
Command: tubelet train codec-table
Cost: 16 to 22 minutes of one core a row, beside much other work; `--set rows=[...]` chooses rows.
Score: films' events right, convolutions at stride 1 / 2 / 4 .65 / .81 / .79, at 4 / 8 / 16 channels .72 / .65 / .69, attention
at stride 1 / 2 / 4 .73 / .84 / .90, but in shapes that are gone: docs/codecs.md. A run leaves table.json, table.md and
sheet.png in its folder.

Equal compute means: `balanced` settings (equal multiply-accumulates per pixel frame), the same mixed clips and the same steps
for every codec; then one small denoiser of equal width, depth and number of tokens on each codec's latents of the same clips of
one object, again for the same steps, with the shipped system's frozen words. A PSNR that looks acceptable may hide a codec
through which nothing moves evenly, so what captions' judge and law card still read of truth through the codec stands beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tubelet.codecs import CODECS, build_codec
from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.weights import load_module, load_tensors, save_tensors
from tubelet.data.stream import TensorSource
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.report import Case, evaluate_clips, make_cases, through_codec
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Engine, Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.recipes.lent import Lent, check_kinds
from tubelet.recipes.lineage import (
    Figures,
    Row,
    compare,
    device_of,
    encode_all,
    film_denoiser,
    films,
    on_sheet,
    plain,
    train_codec,
)
from tubelet.recipes.tokenizers import clips_of, frozen_text, read_back
from tubelet.recipes.worlds import foreground_cells
from tubelet.runtime.device import seconds_per_call
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds import foreground
from tubelet.worlds.constants import KINDS

PATCHES = {1: (4, 2, 2), 2: (2, 2, 2), 4: (1, 2, 2)}
"""Temporal stride -> the denoiser's patch: four frames and 16 x 16 pixels a token, whatever the codec."""
CODEC_LAWS = ("inertia", "gravity", "steady")
FILM_LAWS = ("gravity", "inertia", "steady")
CODEC_SEED, FILM_SEED = 2_110_000_000, 2_120_000_000
"""First seeds of the codecs' and the denoisers' clips, among the worlds' training seeds."""
TRUTH = "truth"
"""The row of true clips; films cannot score more."""


@dataclass(frozen=True)
class CodecTable:
    """The rows, and the budget that all share. A row is "NAME-tSTRIDE-cCHANNELS"."""

    rows: tuple[str, ...] = (
        *(f"{name}-t{stride}-c8" for name in ("causal_conv", "transformer") for stride in (1, 2, 4)),
        *(f"causal_conv-{row}" for row in ("t1-c4", "t1-c16", "t4-c16")),
    )
    text: str = "worlds-64"
    """The system, by name or folder, whose frozen text encoder reads prompts."""
    size: tuple[int, int] = (64, 64)
    frames: int = 17
    fps: float = 8.0
    codec_kinds: tuple[str, ...] = KINDS
    codec_clips: int = 2000
    codec_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800,
            batch=4,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    kinds: tuple[str, ...] = MOVING
    """Of the denoisers' clips."""
    clips: int = 6000
    width: int = 192
    depth: int = 6
    heads: int = 3
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500,
            batch=32,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=4.5e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of a denoiser, whose sizes are the three before."""
    sampling: Sampling = field(default_factory=lambda: Sampling(guidance=2.5, shift=2.0))
    n: int = 108
    """Test clips that codecs are measured on, and prompts."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on a row that cannot be."""
        check_kinds(self.kinds)
        work = _Work(self, folder)
        rows: dict[str, Callable[[Path], Row | None]] = {
            **{name: functools.partial(work.measured, *parts(name)) for name in self.rows},
            TRUTH: lambda _: work.truth(),
        }
        columns = (
            ("numbers kept", "rate", lambda value: f"1 in {1 / value:.0f}"),
            ("PSNR", "psnr", plain(1)),
            ("foreground", "psnr_foreground", plain(1)),
            ("shape", "caption/shape", plain()),
            *((law, f"law/{law}", plain()) for law in CODEC_LAWS),
            ("encodes, clips/s", "encode", plain(0)),
            ("decodes", "decode", plain(0)),
            *((f"films: {facet}", f"films/caption/{facet}", plain()) for facet in ("colour", "shape", "event")),
            *((law, f"films/law/{law}", plain()) for law in FILM_LAWS),
            ("Frechet", "frechet", plain(1)),
        )
        return compare(folder, self, rows, columns, (*self.rows, TRUTH))


def parts(row: str) -> tuple[str, int, int]:
    """A row's codec, temporal stride and channels. Raises UserError on a name that is none."""
    try:
        name, stride, channels = row.split("-")
        found = name, int(stride.removeprefix("t")), int(channels.removeprefix("c"))
    except ValueError as error:
        raise UserError(f"a row is NAME-tSTRIDE-cCHANNELS, got {row!r}; e.g. causal_conv-t4-c8") from error
    if found[0] not in ("causal_conv", "transformer") or found[1] not in PATCHES or found[2] < 1:
        raise UserError(
            f"a row's codec is causal_conv or transformer, its stride 1, 2 or 4, its channels at least 1, got {row!r}; "
            "e.g. causal_conv-t4-c8"
        )
    return found


class _Work:
    """What the rows share; clips are rendered when a row first asks for them."""

    def __init__(self, config: CodecTable, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = device_of(config.train)
        self.form = {"size": config.size, "frames": config.frames, "fps": config.fps}
        self.text = functools.cache(lambda: frozen_text(config.text, self.device))
        self.codec_clips = functools.cache(lambda: self._clips(config.codec_kinds, config.codec_clips, CODEC_SEED)[0])
        self.film_clips = functools.cache(lambda: self._clips(config.kinds, config.clips, FILM_SEED))

    @functools.cached_property
    def seen(self) -> Sequence[Case]:
        """What codecs are measured on."""
        return make_cases(self.config.codec_kinds, self.config.n, **self.form)

    @functools.cached_property
    def asked(self) -> Sequence[Case]:
        """What denoisers are asked for."""
        return make_cases(self.config.kinds, self.config.n, **self.form)

    def _clips(self, kinds: Sequence[str], count: int, first: int) -> tuple[Tensor, list[list[dict[str, str]]]]:
        c = self.config
        return clips_of(kinds, count, c.size, c.frames, c.fps, c.workers, first)

    def measured(self, name: str, stride: int, channels: int, place: Path) -> Row | None:
        """Train and measure a codec, then a denoiser on it; None when one of them was stopped."""
        c = self.config
        codec = self._codec(name, stride, channels, place / "codec")
        if codec is None:
            return None
        truth = [case.truth for case in self.seen]
        rate = np.prod(codec.strides.latent_shape(c.frames, *c.size)) * channels / (c.frames * c.size[0] * c.size[1] * 3)
        figures = {
            "rate": float(rate),
            **speeds(codec, c.frames, *c.size),
            **read_back(np.stack(list(through_codec(codec, truth, c.fps))), self.seen),
        }
        lent = Lent(self.folder, codec, self.text(), c.size, c.frames, c.fps)
        network = functools.partial(SpacetimeConfig, c.width, c.depth, c.heads, channels, PATCHES[stride], self.text().width)
        torch.manual_seed(c.train.seed)  # the initial weights
        made = film_denoiser(
            place / "denoiser", self.text(), Spacetime(network()), lent, self._latents(codec, place / "codec"), c.train
        )
        if made is None:
            return None
        engine, cost = made
        filmed, shown = self._films(engine)
        return Row(figures | filmed | cost, shown)

    def _codec(self, name: str, stride: int, channels: int, place: Path) -> Codec | None:
        """A row's codec, trained unless it is there already."""
        how = self.config.codec_train
        torch.manual_seed(how.seed)  # the initial weights
        codec = build_codec(name, CODECS[name].config.balanced(stride, channels, 1 if stride == 1 else 3))
        if (place / "codec.safetensors").exists():
            load_module(place / "codec.safetensors", codec)
            return codec.to(self.device).eval()
        return train_codec(codec, self.codec_clips(), how, place)

    def _latents(self, codec: Codec, place: Path) -> TensorSource:
        """The denoisers' clips as the codec sees them, kept beside it."""
        path = place / "latents.safetensors"
        if not path.exists():
            video, captions = self.film_clips()
            weights = torch.stack([foreground_cells(foreground(clip.numpy()), codec.strides) for clip in video])
            save_tensors(path, {"latent": encode_all(codec.encode, video, self.device).bfloat16(), "foreground": weights})
            write_json(self.folder / "captions.json", [said[0]["text"] for said in captions])
        captions = [[{"text": text, "kind": "short"}] for text in read_json(self.folder / "captions.json")]
        return TensorSource(load_tensors(path), captions, seed=self.config.train.seed, proportions={"short": 1.0})

    def _films(self, engine: Engine) -> tuple[Figures, np.ndarray]:
        made, _ = films(engine, self.asked, self.config.size, self.config.sampling)
        return self._judged(made), on_sheet(made)

    def _judged(self, made: np.ndarray) -> Figures:
        """What films for `asked` show, `films/...`, and their distance from truth."""
        read = evaluate_clips(list(made), [case.wanted for case in self.asked], self.config.fps)
        truth = np.stack([case.truth for case in self.asked])
        return {f"films/{name}": value for name, value in read.items()} | distances(features(truth), features(made))

    def truth(self) -> Row:
        """What true clips score as a codec's and as a denoiser's."""
        truth, asked = (np.stack([case.truth for case in cases]) for cases in (self.seen, self.asked))
        read = {name: value for name, value in read_back(truth, self.seen).items() if not name.startswith("psnr")}
        judged = {name: value for name, value in self._judged(asked).items() if name.startswith("films/")}
        return Row(read | judged, on_sheet(asked))


@torch.no_grad()
def speeds(codec: Codec, frames: int, height: int, width: int) -> Mapping[str, float]:
    """Clips per second that the codec encodes and decodes, eight at a time."""
    first = next(codec.parameters())
    device = first.device
    pixels = torch.zeros(8, 3, frames, height, width, dtype=first.dtype, device=device)
    latents = codec.encode(pixels)
    return {
        "encode": 8 / seconds_per_call(lambda: codec.encode(pixels), device, 1.0),
        "decode": 8 / seconds_per_call(lambda: codec.decode(latents), device, 1.0),
    }


def recipe() -> CodecTable:
    """The whole table."""
    return CodecTable()
