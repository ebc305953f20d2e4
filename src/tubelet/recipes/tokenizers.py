"""tokenizers: clips as words, by signs or by a table, as the vocabulary grows; and networks that look back, two kinds.

Paper: MAGVIT-v2 (Yu et al. 2023), figure 1 and table 5: VQ against LFQ, a causal CNN against C-ViViT (Villegas et al. 2022).
Command: tubelet train tokenizers
Cost: 62 minutes of a core beside other trainings, with `--set train.precision=bf16 --set generate.precision=bf16`.
Score: distance of what a masked model makes 71 and 92 of LFQ's 2^6 and 2^14 words, 58 and 247 of VQ's: docs/lineage.md. A run
leaves table.json, table.md, sheet.png and curve.png in its folder.

Clips of one object, 5 frames of 64 x 64 pixels in two seconds, become 5 x 8 x 8 words of 2^6 to 2^14. All rows see the same
clips for the same multiply-accumulates, in the two codecs' balanced sizes, with no discriminator; LFQ and VQ have the same
penalties. Beside PSNR stands what the law card and the captions' judge still read of truth, and how much of the vocabulary
test clips use. Equal masked models on the smallest and the largest vocabulary of each say whether more words are harder to
generate. In the paper VQ reconstructs better and generates worse as its vocabulary grows, LFQ does both better (ImageNet FID
2.65 with VQ, 2.48 with LFQ, 1.34 with 2^18 words), and the causal CNN is far ahead (FVD on UCF-101 96, C-ViViT 438).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tubelet.codecs.losses import to_pixels
from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer, usage
from tubelet.core.config import from_file, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.types import Video
from tubelet.core.weights import load_module, save_module
from tubelet.data.stream import TensorSource
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.distance import distances, features
from tubelet.evaluate.fidelity import foreground_psnr, psnr
from tubelet.evaluate.report import Case, evaluate_clips, make_cases, through_codec, world_of
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Request
from tubelet.generate.system import load
from tubelet.generate.tokens import WordEngine, WordSampling
from tubelet.media.sheet import INK, PAPER, save_sheet
from tubelet.models.maskgit import MaskGIT, MaskGITConfig
from tubelet.nn.patch import Grid
from tubelet.recipes.lent import check_kinds
from tubelet.recipes.lineage import (
    Figures,
    Row,
    compare,
    device_of,
    facet_figures,
    law_figures,
    macs_of,
    millions,
    on_sheet,
    plain,
    scaled,
    train_row,
)
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import accelerate, restore
from tubelet.runtime.device import fast_bf16
from tubelet.text.base import TextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import MaskedObjective, TokenizerObjective

BITS = (6, 9, 12, 14)
_WAYS: dict[str, Literal["lfq", "vq"]] = {"LFQ": "lfq", "VQ": "vq"}
# A word of four frames, as in the paper, holds no moving thing at these sizes (docs/log.md, 2026-11-24): every row would be 0.
TOKENIZERS: dict[str, TokenizerConfig] = {
    **{f"{way}, 2^{bits}": TokenizerConfig(bits, name, temporal_stride=1) for way, name in _WAYS.items() for bits in BITS},
    "C-ViViT, LFQ, 2^12": TokenizerConfig(12, "lfq", "transformer", temporal_stride=1),
}
EQUAL = "LFQ, 2^12"
"""The row whose compute every row's equals."""
LAW_COLUMNS = ("steady",)
"""At two frames a second inertia and gravity are not read from truth either."""
TRAIN_SEED = 2_090_000_000
"""First seed of the training clips, among the worlds' training seeds."""


@dataclass(frozen=True)
class Tokenizers:
    """Clips, training and measures."""

    rows: tuple[str, ...] = tuple(TOKENIZERS)
    """Which are trained; what truth and its median frame score always stands beside them."""
    generators: tuple[str, ...] = ("LFQ, 2^6", "LFQ, 2^14", "VQ, 2^6", "VQ, 2^14")
    """On which of them a masked model is trained."""
    text: str = "worlds-64"
    """The system, by name or folder, whose frozen text encoder the masked models read prompts with."""
    kinds: tuple[str, ...] = MOVING
    clips: int = 5000
    size: tuple[int, int] = (64, 64)
    frames: int = 5
    fps: float = 2.0
    seen: int = 5
    """Frames of a clip that a step of a tokenizer sees, in one stretch."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=900,
            batch=10,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of a tokenizer."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    generate: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=900,
            batch=16,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of a masked model, whose sizes are the three before."""
    sampling: WordSampling = field(default_factory=WordSampling)
    n: int = 96
    """Test clips, and prompts."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on an unknown kind or row."""
        check_kinds(self.kinds)
        unknown = [name for name in self.generators if name not in TOKENIZERS]
        if unknown:
            raise UserError(f"there is no tokenizer {unknown[0]!r} to generate on; choose among {', '.join(TOKENIZERS)}")
        cases = make_cases(self.kinds, self.n, size=self.size, frames=self.frames, fps=self.fps)
        truth = np.stack([case.truth for case in cases])
        clips = functools.cache(lambda: clips_of(self.kinds, self.clips, self.size, self.frames, self.fps, self.workers))
        device = device_of(self.train)

        def trained(name: str, place: Path) -> Row | None:
            video, captions = clips()
            made = train_tokenizer(TOKENIZERS[name], video, self.seen, self._train(name), place)
            if made is None:
                return None
            tokenizer, figures = made
            coded = np.stack(list(through_codec(tokenizer, list(truth), self.fps)))
            words = to_words(tokenizer, torch.from_numpy(truth))
            figures |= {"macs": self._macs(name)} | read_back(coded, cases) | usage(words, tokenizer.words)
            if name in self.generators:
                source = TensorSource({"tokens": to_words(tokenizer, video)}, captions, proportions={"short": 1.0})
                following = self._generator(tokenizer, source, cases, place / "generator", device)
                if following is None:
                    return None
                figures |= following
            return Row(figures, coded[0])

        still = np.median(truth, 1, keepdims=True).astype(np.uint8).repeat(self.frames, 1)
        rows: dict[str, Callable[[Path], Row | None]] = {
            **{name: functools.partial(trained, name) for name in TOKENIZERS},
            "median frame": lambda _: Row(read_back(still, cases), still[0]),
            "truth": lambda _: Row(read_back(truth, cases), truth[0]),
        }
        columns = (
            ("PSNR", "psnr", plain(1)),
            ("of foreground", "psnr_foreground", plain(1)),
            *((facet, f"caption/{facet}", plain()) for facet in ("colour", "shape", "size")),
            *((law, f"law/{law}", plain()) for law in LAW_COLUMNS),
            ("words used", "used", plain(3)),
            ("perplexity", "perplexity", plain(0)),
            *((f"made: {facet}", f"{facet}/in", plain()) for facet in FACETS),
            ("made: Frechet", "frechet", plain(1)),
            ("MACs of a step's clip", "macs", millions),
            ("steps", "steps", plain(0)),
        )
        done = compare(folder, self, rows, columns, (*self.rows, "median frame", "truth"))
        if done != folder:
            save_sheet(curves(read_json(folder / "table.json")), folder / "curve.png")
        return done

    def _macs(self, name: str) -> float:
        """Multiply-accumulates of a row's tokenizer on what a step sees of a clip."""
        return macs_of(VideoTokenizer(TOKENIZERS[name]), torch.zeros(1, 3, self.seen, *self.size))

    def _train(self, name: str) -> TrainConfig:
        """The training of a row, as many steps as cost the same."""
        # What a wider word adds to the first and the last layer is no reason for fewer steps.
        same = TOKENIZERS[name].codec == TOKENIZERS[EQUAL].codec
        return self.train if same else scaled(self.train, self._macs(EQUAL) / self._macs(name))

    def _generator(
        self, tokenizer: VideoTokenizer, source: TensorSource, cases: Sequence[Case], place: Path, device: str
    ) -> Figures | None:
        """What films of a small masked model on these words show of their captions."""
        text = frozen_text(self.text, device)
        torch.manual_seed(self.generate.seed)  # the initial weights
        cells = tokenizer.strides.latent_shape(self.frames, *self.size)
        network = masked_model(tokenizer.config.bits, cells, text, self.width, self.depth, self.heads)
        result = train_row(place, TextToVideo(text, network), MaskedObjective(), source, self.generate)
        if result is None:
            return None
        engine = word_engine(tokenizer, result[0])
        return word_figures(engine, {"in": cases}, self.size, self.sampling, FACETS)[0]


# Tokenizers


def clips_of(
    kinds: Sequence[str], count: int, size: tuple[int, int], frames: int, fps: float, workers: int, first: int = TRAIN_SEED
) -> tuple[Tensor, list[list[dict[str, str]]]]:
    """Training clips of these kinds in turn, uint8 `(n, T, H, W, 3)`, and the captions of each."""
    chosen = [kinds[place % len(kinds)] for place in range(count)]
    jobs = [Job(world_of(kind), first + place, size, frames, fps, kind) for place, kind in enumerate(chosen)]
    return in_memory(jobs, workers, "clips")


def train_tokenizer(
    config: TokenizerConfig, video: Tensor, seen: int, how: TrainConfig, place: Path, halved: float = 0.0
) -> tuple[VideoTokenizer, Figures] | None:
    """A tokenizer trained on uint8 clips in a folder, where it is kept, and what that took; None when it was stopped.

    `seen` and `halved` as in `TokenizerObjective`.
    """
    torch.manual_seed(how.seed)  # the initial weights
    source = TensorSource({"video": video}, seed=how.seed)
    result = train(VideoTokenizer(config), TokenizerObjective(frames=seen, halved=halved), source, how, place)
    if not result.finished:
        return None
    average = result.ema
    assert isinstance(average, VideoTokenizer), "a copy of the model"
    save_module(place / "tokenizer.safetensors", average)
    write_json(place / "tokenizer.json", to_dict(config))
    return average.eval(), {"steps": float(result.step)}


def load_tokenizer(place: Path) -> VideoTokenizer:
    """The tokenizer that `train_tokenizer` has left. Raises UserError when there is none."""
    tokenizer = VideoTokenizer(from_file(TokenizerConfig, place / "tokenizer.json"))
    load_module(place / "tokenizer.safetensors", tokenizer)
    return tokenizer.eval()


@torch.no_grad()
def to_words(tokenizer: VideoTokenizer, video: Tensor, batch: int = 32) -> Tensor:
    """uint8 clips `(n, T, H, W, 3)` as words `(n, T', h, w)`."""
    device = next(tokenizer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
        return torch.cat([tokenizer.tokens(to_pixels(part.to(device))).cpu() for part in video.split(batch)])


def read_back(clips: np.ndarray, cases: Sequence[Case]) -> Figures:
    """PSNR of uint8 clips `(n, T, H, W, 3)` to the cases' truth, whole and of its foreground, and what is read of them:
    `caption/FACET` and `law/LAW`."""
    fidelity = [(psnr(case.truth, clip), foreground_psnr(case.truth, clip)) for clip, case in zip(clips, cases, strict=True)]
    whole, foreground = np.mean(fidelity, axis=0)
    read = evaluate_clips(list(clips), [case.wanted for case in cases], cases[0].fps)
    return {"psnr": float(whole), "psnr_foreground": float(foreground)} | {
        name: value for name, value in read.items() if name.count("/") == 1
    }


# Models of words


def frozen_text(system: str, device: str) -> FrozenText:
    """The text encoder of a finished system."""
    found = load(system, device=device, dtype="float32").text
    restore(found)  # it is read in training, too
    return FrozenText(found)


def masked_model(bits: int, cells: Grid, text: TextEncoder, width: int, depth: int, heads: int) -> MaskGIT:
    """A masked model of clips of so many words that reads prompts. Words of more than nine bits are two, as in the paper."""
    groups = 2 if bits > 9 and bits % 2 == 0 else 1
    # Every clip is seen a few times only: there is nothing that dropout would have to keep from being learned by heart.
    return MaskGIT(
        MaskGITConfig(
            width, depth, heads, int(np.prod(cells)), groups, 2 ** (bits // groups), text_width=text.width, dropout=0.0
        )
    )


def word_engine(tokenizer: VideoTokenizer, model: TextToVideo) -> WordEngine:
    """What samples a trained model of words."""
    network: Any = model.denoiser
    if next(network.parameters()).device.type == "cpu":
        accelerate(network)
    return WordEngine(tokenizer, network, model.text)


def word_figures(
    engine: WordEngine,
    cases: Mapping[str, Sequence[Case]],
    size: tuple[int, int],
    sampling: WordSampling,
    facets: Sequence[str],
    batch: int = 32,
) -> tuple[Figures, np.ndarray]:
    """As `lineage.film_figures`: facets of every split, distances of the first from its truth, seconds of choosing words for a
    film; and what stands on the sheet."""
    figures: Figures = {}
    shown: list[np.ndarray] = []
    for split, several in cases.items():
        requests = [Request(case.text, number) for number, case in enumerate(several)]
        pixels, timings = engine.sample(requests, size, len(several[0].truth), sampling, batch=batch)
        made = Video(pixels, several[0].fps).to_uint8()
        figures |= facet_figures(list(made), several, facets, split)
        if not shown:
            truth = np.stack([case.truth for case in several])
            figures |= {**distances(features(truth), features(made)), "seconds": timings["words"] / len(several)}
            figures |= law_figures(list(made), several)
            shown.append(on_sheet(made))
    return figures, shown[0]


# The curves

_PANELS = {"psnr_foreground": "PSNR of foreground, dB", "caption/shape": "shape read right", "used": "share of words used"}
_COLOURS = {"LFQ": (196, 60, 40), "VQ": (40, 90, 190)}
_SIDE, _EDGE = 260, 44
Line = list[tuple[int, float]]


def curves(results: Mapping[str, Figures]) -> np.ndarray:
    """Three panels against bits a word, a line for each way, uint8 `(H, W, 3)`."""
    picture = Image.new("RGB", (len(_PANELS) * (_SIDE + 2 * _EDGE), _SIDE + 2 * _EDGE), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (figure, title) in enumerate(_PANELS.items()):
        lines = {
            way: [(bits, results[row][figure]) for bits in BITS if (row := f"{way}, 2^{bits}") in results] for way in _WAYS
        }
        _panel(draw, number * (_SIDE + 2 * _EDGE) + _EDGE, title, lines)
    return np.asarray(picture)


def _panel(draw: ImageDraw.ImageDraw, left: int, title: str, lines: Mapping[str, Line]) -> None:
    """Lines from the least to the greatest of their values, with what they are called where they end."""
    font = ImageFont.load_default(size=14)
    values = [value for line in lines.values() for _, value in line] or [0.0]
    low, spread = min(values), max(values) - min(values) or 1.0

    def place(bits: int, value: float) -> tuple[float, float]:
        across = (bits - BITS[0]) / (BITS[-1] - BITS[0])
        return left + across * _SIDE, _EDGE + (1 - (value - low) / spread) * _SIDE

    draw.rectangle((left, _EDGE, left + _SIDE, _EDGE + _SIDE), outline=INK)
    draw.text((left, _EDGE - 24), title, fill=INK, font=font)
    for value in (low, low + spread):
        draw.text((left - 40, place(BITS[0], value)[1] - 8), f"{value:.3g}", fill=INK, font=font)
    for bits in BITS:
        draw.text((place(bits, low)[0] - 12, _EDGE + _SIDE + 6), f"2^{bits}", fill=INK, font=font)
    ends: list[float] = []
    for way, line in lines.items():
        spots = [place(*point) for point in line]
        if spots:
            draw.line(spots, fill=_COLOURS[way], width=3)
            across, down = spots[-1]
            across -= 36 * (1 + sum(abs(down - end) < 16 for end in ends))  # beside another name, not over it
            draw.text((across, down - 22), way, fill=_COLOURS[way], font=font)
            ends.append(down)


def recipe() -> Tokenizers:
    """The experiment."""
    return Tokenizers()
