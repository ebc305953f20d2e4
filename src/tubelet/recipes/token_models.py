"""token-models: films as words in a row, as words filled in, and as noise taken away, at equal compute.

Paper: VideoPoet (Kondratyuk et al. 2023), MAGVIT-v2 (Yu et al. 2023) and W.A.L.T (Gupta et al. 2023), beside the flagship.
Command: tubelet train token-models
Cost: 140 minutes on one core beside much other work; the four networks alone 79.
Score: all facets .84 (spacetime), .47 (masked model), .44 (language model), .26 (W.A.L.T) of truth's .91; Frechet distances 7,
34, 51, 17 of truth's 7: docs/lineage.md. A run leaves table.json, table.md and sheet.png in its folder.

One tokenizer makes words of clips of one object, one codec of the same sizes, trained for as many steps, real latents. Both
see one frame at a time: five frames of two seconds are 5 x 8 x 8 cells, each a token of every network. The networks have one
width and depth, read the same prompts with the shipped system's frozen encoder, and are trained for as many steps as make
their multiply-accumulates those of the language model (W.A.L.T's second forward included); how many clips each sees follows.
What the tokenizer and the codec leave of truth stands beside them, as rows "words" and "latents". In the papers a masked model
with MAGVIT-v2's words beats diffusion and a language model on the same words (FVD on UCF-101: masked 58, language model 109),
and W.A.L.T is better again (46).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.codecs import CODECS, build_codec
from tubelet.codecs.base import Codec
from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer, usage
from tubelet.core.files import read_json, write_json
from tubelet.core.types import Condition
from tubelet.core.weights import load_module, load_tensors, save_module, save_tensors
from tubelet.data.stream import TensorSource
from tubelet.diffusion.paths import SigmaSampling, VPLinear, zero_terminal_snr
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import Case, make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Engine, Sampling
from tubelet.generate.layouts import Chain
from tubelet.generate.tokens import WordSampling
from tubelet.models.maskgit import MaskGIT
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig, text_to_video
from tubelet.models.walt import WALT, WALTConfig
from tubelet.recipes.lent import Lent, check_kinds
from tubelet.recipes.lineage import (
    Row,
    compare,
    device_of,
    encode_all,
    engine_of,
    film_figures,
    macs,
    macs_of,
    millions,
    plain,
    scaled,
    train_codec,
    train_row,
    truth_rows,
)
from tubelet.recipes.tokenizers import (
    clips_of,
    frozen_text,
    load_tokenizer,
    masked_model,
    to_words,
    train_tokenizer,
    word_engine,
    word_figures,
)
from tubelet.runtime.cpu import accelerate
from tubelet.train.lineage import FilmObjective, Recalling
from tubelet.train.loop import Objective, TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective
from tubelet.train.tokens import LanguageObjective, MaskedObjective

WORDS, LATENTS = "words", "latents"
"""The rows that train the tokenizer and the codec, and measure truth through them; also the names of their folders."""
EQUAL = "language model"
"""The row whose compute every row's equals."""
ROWS = (EQUAL, "masked model", "W.A.L.T", "spacetime")
OF_WORDS = (EQUAL, "masked model")
SPLITS = ("in", "held_out")
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""
TRAIN_SEED = 2_100_000_000
"""First seed of the training clips, among the worlds' training seeds."""
CHAIN = Chain(zero_terminal_snr(VPLinear()), "v", spacing="trailing")
"""W.A.L.T's."""
PROMPT = "a large red ball bounces once"
"""What multiply-accumulates are counted with, as `lineage.macs` does."""


@dataclass(frozen=True)
class TokenModels:
    """Sizes, clips, training and measures."""

    rows: tuple[str, ...] = ROWS
    """Which are trained; what truth scores, whole and through tokenizer and codec, always stands beside them."""
    lent: str | None = None
    """A row's folder of a run of `tokenizers`, whose tokenizer is taken; `frames` and `fps` should then be that run's."""
    text: str = "worlds-64"
    """The system, by name or folder, whose frozen text encoder all read prompts with."""
    kinds: tuple[str, ...] = MOVING
    clips: int = 12_000
    size: tuple[int, int] = (64, 64)
    frames: int = 5
    fps: float = 2.0
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(12, temporal_stride=1, temporal_kernel=1))
    channels: int = 8
    """Of the real latents."""
    codec_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2000,
            batch=8,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of the tokenizer, and of the codec."""
    width: int = 192
    depth: int = 4
    heads: int = 6
    patch: int = 1
    """Side in cells of a token of both diffusion models; a word is one cell."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1000,
            batch=16,
            warmup=40,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    """Of the language model."""
    text_drop: float = 0.1
    self_conditioning: float = 0.9
    """How often a step of W.A.L.T's training is given an estimate."""
    word_sampling: WordSampling = field(default_factory=WordSampling)
    walt_sampling: Sampling = field(default_factory=lambda: Sampling(steps=50, guidance=2.0, solver="ddim"))
    sampling: Sampling = field(default_factory=lambda: Sampling(shift=2.0))
    """Of spacetime."""
    n: int = 192
    """Prompts of each split."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on sizes that do not fit."""
        check_kinds(self.kinds)
        work = _Work(self, folder)
        truth = functools.cache(lambda: make_cases(self.kinds, self.n, seed=OTHERS, **work.seen))

        def of_truth(name: str, codec: Codec) -> Callable[[Path], Row]:
            return truth_rows(work.lent(codec), work.cases, truth(), FACETS)[name]

        def words(place: Path) -> Row | None:
            tokenizer = work.make_tokenizer(place)
            if tokenizer is None:
                return None
            row = of_truth("truth through the codec", tokenizer)(place)
            return Row(row.figures | usage(work.read(WORDS).long(), tokenizer.words), row.shown)

        def latents(place: Path) -> Row | None:
            codec = work.make_codec(place)
            return None if codec is None else of_truth("truth through the codec", codec)(place)

        rows: dict[str, Callable[[Path], Row | None]] = {
            WORDS: words,
            LATENTS: latents,
            **{name: functools.partial(work.trained, name) for name in ROWS},
            "truth": lambda place: of_truth("truth", work.codec())(place),
        }
        columns = (
            *((f"{facet}, {split.replace('_', '-')}", f"{facet}/{split}", plain()) for split in SPLITS for facet in FACETS),
            ("steady", "law/steady", plain()),
            ("Frechet", "frechet", plain(1)),
            ("KID", "kid", plain()),
            ("s a film", "seconds", plain(3)),
            ("parameters", "parameters", millions),
            ("MACs", "macs", millions),
            ("steps", "steps", plain(0)),
            ("training, s", "train_seconds", plain(0)),
            ("words used", "used", plain(3)),
        )
        return compare(folder, self, rows, columns, (WORDS, LATENTS, *self.rows, "truth"))


class _Work:
    """What the rows of one folder share; clips are rendered and parts are read when a row first asks for them."""

    def __init__(self, config: TokenModels, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = device_of(config.train)
        self.seen: dict[str, Any] = {"size": config.size, "frames": config.frames, "fps": config.fps}
        self.words_config = config.tokenizer if config.lent is None else load_tokenizer(Path(config.lent)).config
        self.cells = VideoTokenizer(self.words_config).strides.latent_shape(config.frames, *config.size)
        self.text = frozen_text(config.text, self.device)
        self.clips = functools.cache(self._clips)
        self.tokenizer = functools.cache(lambda: load_tokenizer(folder / WORDS).to(self.device))
        self.codec = functools.cache(self._codec)

    @functools.cached_property
    def cases(self) -> Mapping[str, Sequence[Case]]:
        return {split: make_cases(self.config.kinds, self.config.n, split, **self.seen) for split in SPLITS}

    def lent(self, codec: Codec) -> Lent:
        """What measures of truth and of films ask for."""
        return Lent(self.folder, codec, self.text, self.config.size, self.config.frames, self.config.fps)

    def _clips(self) -> tuple[Tensor, list[list[dict[str, str]]]]:
        c = self.config
        return clips_of(c.kinds, c.clips, c.size, c.frames, c.fps, c.workers, TRAIN_SEED)

    # Words and latents

    def make_tokenizer(self, place: Path) -> VideoTokenizer | None:
        """Train the tokenizer, or take the lent one, and make words of all clips; None when it was stopped."""
        if self.config.lent is not None:
            tokenizer = load_tokenizer(Path(self.config.lent))
            save_module(place / "tokenizer.safetensors", tokenizer)
            write_json(place / "tokenizer.json", read_json(Path(self.config.lent) / "tokenizer.json"))
        else:
            made = train_tokenizer(self.words_config, self.clips()[0], 0, self.config.codec_train, place)
            if made is None:
                return None
            tokenizer = made[0]
        self._keep(WORDS, to_words(tokenizer.to(self.device), self.clips()[0]).int())
        return tokenizer

    def make_codec(self, place: Path) -> Codec | None:
        """Train the codec of real latents and encode all clips; None when it was stopped."""
        how = self.config.codec_train
        torch.manual_seed(how.seed)  # the initial weights
        codec = train_codec(self._plain_codec(), self.clips()[0], how, place)
        if codec is None:
            return None
        self._keep(LATENTS, encode_all(codec.encode, self.clips()[0], self.device).bfloat16())
        return codec

    def _plain_codec(self) -> Codec:
        c = self.words_config
        return build_codec(c.codec, CODECS[c.codec].config.balanced(c.temporal_stride, self.config.channels, c.temporal_kernel))

    def _codec(self) -> Codec:
        codec = self._plain_codec()
        load_module(self.folder / LATENTS / "codec.safetensors", codec)
        return codec.to(self.device).eval()

    def _keep(self, name: str, values: Tensor) -> None:
        """What a row has made of the clips, so that later rows need not render them."""
        save_tensors(self.folder / name / "clips.safetensors", {"values": values})
        write_json(self.folder / "captions.json", [said[0]["text"] for said in self.clips()[1]])

    def read(self, name: str) -> Tensor:
        """All clips as words `(n, T', h, w)` or latents `(n, C, T', h, w)`."""
        return load_tensors(self.folder / name / "clips.safetensors")["values"]

    # Models

    def trained(self, name: str, place: Path) -> Row | None:
        """Train and measure one of `ROWS`; None when it was stopped."""
        c = self.config
        how = scaled(c.train, self.cost(EQUAL) / self.cost(name))
        torch.manual_seed(how.seed)  # the initial weights
        model, objective = self.model(name)
        captions = [[{"text": text, "kind": "short"}] for text in read_json(self.folder / "captions.json")]
        tensors = {"tokens": self.read(WORDS)} if name in OF_WORDS else {"latent": self.read(LATENTS)}
        if name == "spacetime":
            # Nothing is weighed more than the rest: the other three have no such weight.
            tensors["foreground"] = torch.zeros_like(tensors["latent"][:, 0], dtype=torch.uint8)  # (n, T', h, w)
        source = TensorSource(tensors, captions, seed=how.seed, proportions={"short": 1.0})
        result = train_row(place, model, objective, source, how)
        if result is None:
            return None
        average, figures = result
        if name in OF_WORDS:
            engine = word_engine(self.tokenizer(), average)
            made, shown = word_figures(engine, self.cases, c.size, c.word_sampling, FACETS)
        else:
            engine = self.engine(name, average)
            sampling = c.walt_sampling if name == "W.A.L.T" else c.sampling
            made, shown = film_figures(engine, self.cases, self.lent(self.codec()), sampling, FACETS)
        return Row({**made, "macs": self.macs(name), **figures}, shown)

    def model(self, name: str) -> tuple[TextToVideo, Objective]:
        """A row's model, untrained, and what it is trained on."""
        c, drop = self.config, self.config.text_drop
        network, objective = {
            EQUAL: (self._language, LanguageObjective(text_drop=drop)),
            "masked model": (self._masked, MaskedObjective(text_drop=drop)),
            "W.A.L.T": (self._walt, FilmObjective(text_drop=drop, self_conditioning=c.self_conditioning)),
            "spacetime": (
                self._spacetime,
                TextToVideoObjective(text_drop=drop, image_share=0.0, sampling=SigmaSampling(shift=3.0)),
            ),
        }[name]
        return TextToVideo(self.text, network()), objective

    def _language(self) -> nn.Module:
        c, layout = self.config, Layout(2**self.words_config.bits, 1, 1)
        return VideoPoet(VideoPoetConfig(c.width, c.heads, c.depth, self.text.width, layout))

    def _masked(self) -> nn.Module:
        c = self.config
        return masked_model(self.words_config.bits, self.cells, self.text, c.width, c.depth, c.heads)

    def _walt(self) -> nn.Module:
        c, (frames, *sides) = self.config, self.cells
        rows, columns = (side // c.patch for side in sides)
        network = WALT(
            WALTConfig(
                width=c.width,
                depth=c.depth,
                heads=c.heads,
                channels=c.channels,
                patch=c.patch,
                grid=(frames, rows, columns),
                frame=(rows, columns),
                window=(frames, rows // 2, columns // 2),
                text_width=self.text.width,
            )
        )
        return Recalling(network, CHAIN.path, True)

    def _spacetime(self) -> nn.Module:
        c = self.config
        return Spacetime(SpacetimeConfig(c.width, c.depth, c.heads, c.channels, (1, c.patch, c.patch), self.text.width))

    def engine(self, name: str, model: TextToVideo) -> Engine:
        """What samples a trained denoiser."""
        if name == "W.A.L.T":
            return engine_of(self.lent(self.codec()), model, CHAIN, self.config.patch)
        return Engine(self.codec(), accelerate(model.denoiser), model.text, patch=model.patch)

    def macs(self, name: str) -> float:
        """Multiply-accumulates of one forward of a row's network on one clip."""
        network = self.model(name)[0].denoiser.to(self.device)
        ids = torch.zeros(1, *self.cells, dtype=torch.long)
        prompt: Condition = self.text.encode([PROMPT])
        if isinstance(network, VideoPoet):
            row = text_to_video(network.config.layout, ids[0], prompt.states.shape[1])
            return macs_of(network, row.ids[None].to(self.device), torch.tensor([row.prefix], device=self.device), prompt)
        if isinstance(network, MaskGIT):
            return macs_of(network, ids.flatten(1).to(self.device), prompt)
        return macs(network, self.lent(self._plain_codec().to(self.device)), self.cells[0], prompt=PROMPT)

    def cost(self, name: str) -> float:
        """Multiply-accumulates of training on one clip: a backward is two forwards, an estimate one more."""
        return self.macs(name) * (3 + self.config.self_conditioning * (name == "W.A.L.T"))


def recipe() -> TokenModels:
    """The experiment."""
    return TokenModels()
