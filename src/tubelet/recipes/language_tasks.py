"""language-tasks: one language model that makes films of words and goes on from pictures, beginnings and films with a hole.

Paper: VideoPoet (Kondratyuk et al. 2023), sections 3.3, 4.1 and 4.2; hints: MAGVIT (Yu et al. 2022), section 3.2.
Command: tubelet train language-tasks
Cost: 34 minutes of a core with fast bf16 beside another training: language model 12, masked model 3, super-resolution 3, the
rest tokenizer, words and films.
Score: all facets by the language model, the masked model (another's condition): text .09, .05 (.00), picture .17, .06 (.06),
beginning .20, .41 (.00), hole .14, .03 (.02), border .05, .25 (.02); docs/lineage.md.
A run leaves table.json, table.md and sheet.png in its folder.

Clips of one object, 9 frames in two seconds, are rendered at 64 x 64 pixels and halved. One tokenizer makes 9 x 4 x 4 words of
small clips and 9 x 8 x 8 of large ones. On small ones a language model is trained on a mixture of tasks, pictures first, and
beside it a masked model with hints of the same tasks. Each task stands beside truth through the tokenizer, beside doing nothing
(the picture or the last frame held, the last exact velocity kept, the backdrop in the hole) and beside itself with another
clip's condition: another's picture, beginning or film with a hole and its own prompt, in text to video another's prompt. Films
are read by what their captions name; a kept picture and what was made in a hole (the inner half of both sides, the outer
quarters of the width) by PSNR; a prediction, where the language model reads no prompt, by its object's velocity against exact
state, in short sides a second, and the share of frames where it is found. A super-resolution makes the words of large films of
those of small ones, true and made, beside small films decoded and enlarged by repeating pixels.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.log import note
from tubelet.core.types import Video
from tubelet.core.weights import load_tensors, save_tensors
from tubelet.data.stream import TensorSource
from tubelet.evaluate.caption import FACETS
from tubelet.evaluate.fidelity import foreground, foreground_psnr, psnr
from tubelet.evaluate.report import SPLITS as WORLD_SPLITS
from tubelet.evaluate.report import Case, make_cases, world_of
from tubelet.evaluate.tasks import MOVING, motion
from tubelet.generate.engine import Request
from tubelet.generate.tokens import Enlarger, EnlargeSampling, Known, WordEngine, WordSampling
from tubelet.models.super_resolution import SuperResolution, SuperResolutionConfig
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig, film_rows, reads_words
from tubelet.nn.subtokens import MASK
from tubelet.recipes.lent import check_kinds
from tubelet.recipes.lineage import Figures, Row, compare, device_of, facet_figures, macs_of, millions, plain, train_row
from tubelet.recipes.tokenizers import (
    clips_of,
    frozen_text,
    load_tokenizer,
    masked_model,
    to_words,
    train_tokenizer,
    word_engine,
)
from tubelet.runtime.cpu import accelerate, restore
from tubelet.tasks.region import box, cells
from tubelet.train.lineage import FrozenText
from tubelet.train.loop import Objective, TrainConfig
from tubelet.train.optim import OptimizerConfig
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import (
    PAINTING,
    FilmTasksObjective,
    MaskedObjective,
    Progressing,
    SuperResolutionObjective,
)
from tubelet.worlds import WORLDS
from tubelet.worlds.base import Episode

BEGINNINGS = ("image to video", "frame prediction")
TASKS = ("text to video", *BEGINNINGS, *PAINTING)
"""What is made of words of small films, and measured."""
Network = Literal["language", "masked"]
ROWS = (
    "truth",
    "truth through the tokenizer",
    "image to video, held",
    "frame prediction, held",
    "frame prediction, constant velocity",
    "inpainting, backdrop",
    "outpainting, backdrop",
    *TASKS,
    *(f"{task}, another's condition" for task in TASKS),
    *(f"masked model: {task}" for task in TASKS),
    "large: truth",
    "large: truth through the tokenizer",
    "large: small film enlarged",
    "large: super-resolution",
    "large: super-resolution, another's condition",
    "large: text to video",
)
"""What truth and doing nothing score comes first: it is known before the time is spent."""
SPLITS = ("in", "held_out")
TRAIN_SEED = 2_130_000_000
"""First seed of the training clips, among the worlds' training seeds."""
PROMPT = "a large red ball bounces once"
"""What multiply-accumulates are counted with."""
BATCH = 48
"""Films that are made together."""

COLUMNS = (
    *((facet, f"{facet}/in", plain()) for facet in (*FACETS, "all")),
    ("all, held-out", "all/held_out", plain()),
    ("first frame", "first", plain(1)),
    ("velocity error", "velocity", plain(3)),
    ("found", "found", plain()),
    *(
        (f"{what}{where}", f"{figure}/{task}", plain(1))
        for task, where in zip(PAINTING, (" inside", " around"), strict=True)
        for figure, what in (("psnr", "PSNR"), ("foreground", "of foreground"))
    ),
    ("PSNR", "psnr", plain(1)),
    ("of foreground", "psnr_foreground", plain(1)),
    ("s a film", "seconds", plain(3)),
    ("parameters", "parameters", millions),
    ("MACs", "macs", millions),
    ("steps", "steps", plain(0)),
    ("training, s", "train_seconds", plain(0)),
)


def _training(steps: int, batch: int) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3)
    return TrainConfig(steps=steps, batch=batch, warmup=40, optimizer=optimizer, checkpoint_minutes=4.0)


@dataclass(frozen=True)
class LanguageTasks:
    """Sizes, training and measures."""

    rows: tuple[str, ...] = ROWS
    """Which are measured; networks are trained where a row needs them."""
    lent: str | None = None
    """A row's folder of a run of `tokenizers`, or the folder tokenizer of one of this recipe: its tokenizer is taken."""
    text: str = "worlds-64"
    """The system, by name or folder, whose frozen text encoder reads prompts."""
    kinds: tuple[str, ...] = MOVING
    clips: int = 6000
    size: tuple[int, int] = (64, 64)
    """Of large clips; small ones are half as high and wide."""
    frames: int = 9
    fps: float = 4.0
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(12, temporal_stride=1, temporal_kernel=1))
    seen: int = 3
    """Frames of a clip that a step of the tokenizer sees, in one stretch."""
    halved: float = 0.75
    """Share of the tokenizer's steps that see small clips."""
    tokenizer_train: TrainConfig = field(
        default_factory=lambda: replace(
            _training(3200, 16), optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3)
        )
    )
    width: int = 128
    depth: int = 5
    heads: int = 4
    """Of the language model, and of the masked model."""
    shares: dict[str, float] = field(default_factory=lambda: dict(FilmTasksObjective().videos))
    """How often each task is trained on films."""
    given: int = 3
    """Token frames that frame prediction knows."""
    language_train: TrainConfig = field(default_factory=lambda: _training(1100, 32))
    masked_train: TrainConfig = field(default_factory=lambda: _training(500, 32))
    large_width: int = 96
    large_depth: int = 2
    large_heads: int = 2
    """Of the super-resolution; `large_depth` is in rounds of three layers."""
    noise: float = 0.3
    """Greatest share of small films' words that its training draws anew."""
    large_train: TrainConfig = field(default_factory=lambda: _training(450, 16))
    sampling: WordSampling = field(default_factory=WordSampling)
    large_sampling: EnlargeSampling = field(default_factory=EnlargeSampling)
    n: int = 64
    """Test clips of each split."""
    enlarged: int = 48
    """How many of the first split are enlarged."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on sizes that do not fit."""
        check_kinds(self.kinds)
        FilmTasksObjective(videos=self.shares)  # names tasks that are not there before the time is spent
        if any(side % 32 or side < 64 for side in self.size):
            raise UserError(f"sides are multiples of 32 from 64 on, so that halves can be read, got {self.size}; change size")
        if not 1 < self.enlarged <= self.n:
            raise UserError(f"2 to n={self.n} clips can be enlarged, got enlarged={self.enlarged}; correct one of them")
        return compare(folder, self, _Run(self, folder).rows(), COLUMNS, self.rows)


# Films with a hole


def hole_of(task: str, shape: tuple[int, int, int]) -> Tensor:
    """What a task of `PAINTING` makes of films of `shape (T, H, W)`, bool: MAGVIT's regions, the central half of both sides or
    the outer quarters of the width."""
    _, H, W = shape
    if task == "inpainting":
        return box(shape, H // 4, W // 4, H - H // 4, W - W // 4).bool()
    return ~box(shape, 0, W // 4, H, W - W // 4).bool()


def with_hole(task: str, video: Tensor) -> Tensor:
    """uint8 films `(n, T, H, W, 3)` without what a task makes: grey inside, outside the edges of what is left repeated."""
    _, T, H, W, _ = video.shape
    if task == "inpainting":
        return video.masked_fill(hole_of(task, (T, H, W))[..., None], 128)
    return video[:, :, :, torch.arange(W).clamp(W // 4, W - W // 4 - 1)]


def unseen(tokenizer: VideoTokenizer, mask: Tensor) -> Tensor:
    """Of which cells a mask `(T, H, W)` of what is to be made leaves nothing, bool `(T', h, w)` each."""
    return cells((~mask[None]).float(), tokenizer.strides)[0] == 0


def backdrop(film: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A uint8 film `(T, H, W, 3)` whose hole (bool `(T, H, W)`, the same in all frames) shows the backdrop of what is left:
    in each row the median over time of what is seen there."""
    out, hole = film.copy(), mask[0]
    for row in range(film.shape[1]):
        if hole[row].any():
            out[:, row, hole[row]] = np.median(film[:, row, ~hole[row]], axis=(0, 1))
    return out


def halve(video: Tensor) -> Tensor:
    """uint8 clips `(n, T, H, W, 3)` at half their height and width, each pixel the mean of four."""
    parts = []
    for part in video.split(64):
        flat = part.flatten(0, 1).permute(0, 3, 1, 2).float()  # (b*T, 3, H, W)
        small = F.avg_pool2d(flat, 2).round().to(torch.uint8).permute(0, 2, 3, 1)
        parts.append(small.unflatten(0, part.shape[:2]))
    return torch.cat(parts)  # (n, T, H/2, W/2, 3)


# A run


class _StoppedError(Exception):
    """A training was stopped before its end."""


@dataclass(frozen=True)
class _Test:
    """Test clips of one split: exact state, and cases whose truth is the large and the small clip."""

    episodes: list[Episode]
    large: list[Case]
    small: list[Case]

    @functools.cached_property
    def films(self) -> np.ndarray:
        """Small ones, uint8 `(n, T, h, w, 3)`."""
        return np.stack([case.truth for case in self.small])


class _Run:
    """One run: its data and networks, each made when a row first needs it. All raise `_StoppedError` where a training was."""

    def __init__(self, recipe: LanguageTasks, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.device = device_of(recipe.language_train)
        height, width = recipe.size
        self.small = (height // 2, width // 2)
        self.config = recipe.tokenizer if recipe.lent is None else load_tokenizer(Path(recipe.lent)).config
        strides = VideoTokenizer(self.config).strides
        self.cells, self.large_cells = (strides.latent_shape(recipe.frames, *size) for size in (self.small, recipe.size))
        if not 0 < recipe.given < self.cells[0]:
            raise UserError(f"of {self.cells[0]} token frames {recipe.given} cannot be given; set given to less, at least 1")
        if self.config.bits % 2:
            raise UserError(f"a super-resolution splits words in two, {self.config.bits} bits are odd; make them even")
        self.known_frames = 1 + (recipe.given - 1) * strides.t
        self.engines: dict[Network, tuple[WordEngine, Figures]] = {}
        self.test_words: dict[str, dict[str, Tensor]] = {}
        self.kept: dict[tuple[Network, str, str, bool], tuple[Tensor, float]] = {}

    def rows(self) -> dict[str, Callable[[Path], Row | None]]:
        """Row -> what measures it."""
        measures: dict[str, Callable[[], Row]] = {
            "truth": functools.partial(self.see, TASKS, self.true),
            "truth through the tokenizer": functools.partial(self.see, TASKS, self.coded),
            "frame prediction, constant velocity": self.constant,
            "large: truth": lambda: self.see_large(np.stack([case.truth for case in self.test_large])),
            "large: truth through the tokenizer": lambda: self.see_large(self.coded_large()),
            "large: small film enlarged": lambda: self.see_large(self.repeated()),
            "large: super-resolution": self.see_enlarged,
            "large: super-resolution, another's condition": functools.partial(self.see_enlarged, another=True),
            "large: text to video": self.see_enlarged_made,
        }
        for task in BEGINNINGS:
            measures[f"{task}, held"] = functools.partial(self.see, (task,), functools.partial(self.held, task))
        for task in PAINTING:
            measures[f"{task}, backdrop"] = functools.partial(self.see, (task,), functools.partial(self.filled, task))
        for task in TASKS:
            measures[task] = functools.partial(self.see_made, "language", task)
            measures[f"{task}, another's condition"] = functools.partial(self.see_made, "language", task, another=True)
            measures[f"masked model: {task}"] = functools.partial(self.see_made, "masked", task)

        def measured(row: Callable[[], Row], _: Path) -> Row | None:
            try:
                return row()
            except _StoppedError:
                return None

        return {name: functools.partial(measured, row) for name, row in measures.items()}

    # Rows

    def see(self, tasks: Sequence[str], films: Callable[[str], np.ndarray]) -> Row:
        """What small films of both splits, uint8 `(n, T, h, w, 3)`, show of captions, and of the first split for each task."""
        found = {split: films(split) for split in SPLITS}
        figures: Figures = {}
        for split, test in self.tests.items():
            figures |= facet_figures(list(found[split]), test.small, FACETS, split)
        for task in tasks:
            figures |= self.measured(task, found["in"])
        return Row(figures, found["in"][0])

    def measured(self, task: str, films: np.ndarray) -> Figures:
        """What a task asks for besides its caption, of films of the first split."""
        test = self.tests["in"]
        if task == "image to video":
            return {"first": float(np.mean([psnr(t[0], f[0]) for t, f in zip(test.films, films, strict=True)]))}
        if task == "frame prediction":
            return {name: value for name, value in self.moved(films).items() if name in ("velocity", "found")}
        if task not in PAINTING:
            return {}
        mask = self.hole(task)
        figures = {f"psnr/{task}": float(np.mean([psnr(t, f, mask) for t, f in zip(test.films, films, strict=True)]))}
        within = [(t, f, foreground(t) & mask) for t, f in zip(test.films, films, strict=True)]
        some = [psnr(*one) for one in within if one[2].any()]
        return figures | ({f"foreground/{task}": float(np.mean(some))} if some else {})

    def moved(self, films: np.ndarray) -> Figures:
        """`velocity`, its baselines and `found` of predicted frames, as `evaluate.tasks` has them."""
        values: dict[str, list[float]] = defaultdict(list)
        made = range(self.known_frames, self.recipe.frames)
        for film, episode in zip(films, self.tests["in"].episodes, strict=True):
            motion(lambda name, value: values[name].append(value), film, episode, made, 1)
        return {name: float(np.mean(found)) for name, found in values.items()}

    def constant(self) -> Row:
        """The last exact velocity kept: it makes no film."""
        return Row({"velocity": self.moved(self.tests["in"].films)["velocity/constant"], "found": 1.0})

    def see_made(self, network: Network, task: str, another: bool = False) -> Row:
        """Films that a model makes; of another's condition those of the first split alone."""
        engine, cost = self.engine(network)
        splits = SPLITS[:1] if another else SPLITS
        found = {split: self.shown(self.made(network, task, split, another)[0]) for split in splits}
        figures: Figures = {}
        for split in splits:
            figures |= facet_figures(list(found[split]), self.tests[split].small, FACETS, split)
        figures |= self.measured(task, found["in"]) | {"seconds": self.made(network, task, "in", another)[1]}
        return Row(figures if another else {**figures, **cost, "macs": self.macs(engine, task)}, found["in"][0])

    def see_large(self, films: np.ndarray, cost: Figures | None = None, true: bool = True) -> Row:
        """What large films show of captions, and, where they are of true small ones, how near they are to truth."""
        cases = self.test_large
        figures = facet_figures(list(films), cases, FACETS, "in")
        if true:
            pairs = [(case.truth, film) for case, film in zip(cases, films, strict=True)]
            figures |= {
                "psnr": float(np.mean([psnr(*pair) for pair in pairs])),
                "psnr_foreground": float(np.mean([foreground_psnr(*pair) for pair in pairs])),
            }
        return Row(figures | (cost or {}), films[0])

    def see_enlarged(self, another: bool = False) -> Row:
        """Large films of words of true small ones, or of the next clip's."""
        films, cost = self.large_films(self.words_of("in")["coarse"].roll(-1 if another else 0, 0))
        return self.see_large(films, {} if another else cost)

    def see_enlarged_made(self) -> Row:
        """Large films of words that the language model has made."""
        films, cost = self.large_films(self.made("language", TASKS[0], "in")[0])
        return self.see_large(films, cost, true=False)

    # Small films of the test clips, by split

    def true(self, split: str) -> np.ndarray:
        return self.tests[split].films

    def coded(self, split: str) -> np.ndarray:
        return self.shown(self.words_of(split)["coarse"])

    def held(self, task: str, split: str) -> np.ndarray:
        """What is known of the beginning, its last frame to the end."""
        known = 1 if task == "image to video" else self.known_frames
        films = self.tests[split].films.copy()
        films[:, known:] = films[:, known - 1 : known]
        return films

    def filled(self, task: str, split: str) -> np.ndarray:
        """The backdrop in the hole."""
        mask = self.hole(task)
        return np.stack([backdrop(film, mask) for film in self.tests[split].films])

    def hole(self, task: str) -> np.ndarray:
        """What a task makes of small films, bool `(T, h, w)`."""
        return hole_of(task, (self.recipe.frames, *self.small)).numpy()

    def made(self, network: Network, task: str, split: str, another: bool = False) -> tuple[Tensor, float]:
        """Words of a film for every test clip, `(n, T', h, w)`, each from its own random numbers, and seconds a film.

        `another`: the condition is the next clip's, which is of another kind; its prompt where there is nothing else.
        """
        key = (network, task, split, another)
        if key not in self.kept:
            engine, _ = self.engine(network)
            texts = [case.text for case in self.tests[split].small]
            if another and task == TASKS[0]:
                texts = [*texts[1:], *texts[:1]]
            requests = [Request(text, number) for number, text in enumerate(texts)]
            known = self.known(task, self.words_of(split), -1 if another else 0)
            made, timings = engine.words(
                requests, self.small, self.recipe.frames, self.recipe.sampling, known=known, batch=BATCH
            )
            self.kept[key] = made.cpu(), timings["words"] / len(texts)
        return self.kept[key]

    def known(self, task: str, words: dict[str, Tensor], roll: int) -> Known | None:
        """What a task is told of films with these words, moved on by so many clips."""
        if task == TASKS[0]:
            return None
        if task in BEGINNINGS:
            return Known(task, words["coarse"][:, : self.given(task)].roll(roll, 0))
        holed = words[task].roll(roll, 0)
        return Known(task, holed, self.unseen(task).expand(holed.shape))

    def given(self, task: str) -> int:
        """Token frames that are known of a beginning."""
        return 1 if task == "image to video" else self.recipe.given

    def unseen(self, task: str) -> Tensor:
        """Cells of small films of which a task leaves nothing, bool `(T', h, w)`."""
        return unseen(self.tokenizer, torch.from_numpy(self.hole(task)))

    # Large films of the test clips

    @property
    def test_large(self) -> list[Case]:
        return self.tests["in"].large[: self.recipe.enlarged]

    def repeated(self) -> np.ndarray:
        """Small films through the tokenizer, each pixel four times."""
        return self.coded("in")[: self.recipe.enlarged].repeat(2, axis=2).repeat(2, axis=3)

    def coded_large(self) -> np.ndarray:
        return self.shown(self.words_of("in")["tokens"][: self.recipe.enlarged])

    def large_films(self, coarse: Tensor) -> tuple[np.ndarray, Figures]:
        """What the super-resolution makes of words of small films `(n, T', h, w)`, and what that costs."""
        enlarger, cost = self.enlarger
        requests = [Request(case.text, number) for number, case in enumerate(self.test_large)]
        pixels, timings = enlarger.enlarge(requests, coarse[: len(requests)], self.recipe.large_sampling, batch=16)
        seconds = timings["words"] / len(requests)
        return Video(pixels, self.recipe.fps).to_uint8(), {**cost, "seconds": seconds, "macs": self.large_macs(enlarger)}

    # Words and back

    def shown(self, words: Tensor) -> np.ndarray:
        """Words `(n, T', h, w)` as the tokenizer shows them, uint8 `(n, T, H, W, 3)`."""
        with torch.inference_mode():
            films = [self.tokenizer.from_tokens(part.to(self.device)).float().cpu() for part in words.long().split(32)]
        return Video(torch.cat(films), self.recipe.fps).to_uint8()

    def words_of(self, split: str) -> dict[str, Tensor]:
        """Words of a split's test clips, as `to_all_words` has them."""
        if split not in self.test_words:
            large = np.stack([case.truth for case in self.tests[split].large])
            self.test_words[split] = self.to_all_words(torch.from_numpy(large))
        return self.test_words[split]

    def to_all_words(self, video: Tensor) -> dict[str, Tensor]:
        """Of large uint8 clips: `tokens (n, T', H, W)`, those of small ones, `coarse (n, T', h, w)`, and of small ones with a
        hole by the names of `PAINTING`."""
        small = halve(video)
        whole = {"tokens": to_words(self.tokenizer, video), "coarse": to_words(self.tokenizer, small)}
        return whole | {task: to_words(self.tokenizer, with_hole(task, small)) for task in PAINTING}

    # Data and networks

    @functools.cached_property
    def tests(self) -> dict[str, _Test]:
        return {split: self._test(split) for split in SPLITS}

    def _test(self, split: str) -> _Test:
        c = self.recipe
        large = make_cases(c.kinds, c.n, split, size=c.size, frames=c.frames, fps=c.fps)
        small = halve(torch.from_numpy(np.stack([case.truth for case in large]))).numpy()
        episodes = [
            WORLDS[world_of(case.kind)].sample(case.seed, *c.size, c.frames, c.fps, kind=case.kind, split=WORLD_SPLITS[split])
            for case in large
        ]
        return _Test(episodes, large, [replace(case, truth=film) for case, film in zip(large, small, strict=True)])

    @functools.cached_property
    def clips(self) -> tuple[Tensor, list[list[dict[str, str]]]]:
        """Large training clips, and their captions."""
        c = self.recipe
        return clips_of(c.kinds, c.clips, c.size, c.frames, c.fps, c.workers, TRAIN_SEED)

    @functools.cached_property
    def tokenizer(self) -> VideoTokenizer:
        """Lent, or trained on clips of both sizes."""
        place = self.folder / "tokenizer" if self.recipe.lent is None else Path(self.recipe.lent)
        if self.recipe.lent is None and not (place / "tokenizer.json").exists():
            note(f"{self.folder.name}: tokenizer")
            c = self.recipe
            if train_tokenizer(self.config, self.clips[0], c.seen, c.tokenizer_train, place, c.halved) is None:
                raise _StoppedError
        return load_tokenizer(place).to(self.device)

    @functools.cached_property
    def trained_on(self) -> tuple[dict[str, Tensor], list[list[dict[str, str]]]]:
        """Words of all training clips, as `to_all_words` has them, and their captions; kept, so that none is rendered again."""
        path, said = self.folder / "words.safetensors", self.folder / "captions.json"
        if not said.exists():
            video, captions = self.clips
            save_tensors(path, {name: value.int() for name, value in self.to_all_words(video).items()})
            write_json(said, [several[0]["text"] for several in captions])
        return load_tensors(path), [[{"text": text, "kind": "short"}] for text in read_json(said)]

    @functools.cached_property
    def text(self) -> FrozenText:
        return frozen_text(self.recipe.text, self.device)

    def engine(self, network: Network) -> tuple[WordEngine, Figures]:
        """What samples a model of words of small films, and what its training has cost."""
        if network not in self.engines:
            model, objective, tensors, how = self.language() if network == "language" else self.masked()
            average, cost = self.trained(network, model, objective, tensors, how)
            self.engines[network] = word_engine(self.tokenizer, average), cost
        return self.engines[network]

    def language(self) -> tuple[nn.Module, Objective, dict[str, Tensor], TrainConfig]:
        """The language model, untrained, what it is trained on, and how."""
        c, words = self.recipe, self.trained_on[0]
        torch.manual_seed(c.language_train.seed)  # the initial weights
        layout = Layout(2**self.config.bits, 1, 1)
        network = VideoPoet(VideoPoetConfig(c.width, c.heads, c.depth, self.text.width, layout))
        tensors = {"tokens": words["coarse"], **{task: words[task] for task in PAINTING}}
        return network, FilmTasksObjective(videos=c.shares, given=c.given), tensors, c.language_train

    def masked(self) -> tuple[nn.Module, Objective, dict[str, Tensor], TrainConfig]:
        """The same of the masked model, whose hints are what the language model's tasks know."""
        c, words = self.recipe, self.trained_on[0]
        torch.manual_seed(c.masked_train.seed)  # the initial weights
        network = masked_model(self.config.bits, self.cells, self.text, c.width, c.depth, c.heads)
        tensors = {"tokens": words["coarse"]}
        for task in BEGINNINGS:
            tensors[task] = words["coarse"].clone()
            tensors[task][:, self.given(task) :] = MASK
        for task in PAINTING:
            tensors[task] = words[task].masked_fill(self.unseen(task), MASK)
        whole = sum(c.shares.values())
        hints = {task: share / whole for task, share in c.shares.items() if task in tensors}
        return network, MaskedObjective(hints=hints), tensors, c.masked_train

    def trained(
        self, name: str, network: nn.Module, objective: Objective, tensors: dict[str, Tensor], how: TrainConfig
    ) -> tuple[TextToVideo, Figures]:
        """The average of a training on words and captions, and its cost."""
        note(f"{self.folder.name}: {name}")
        source = TensorSource(tensors, self.trained_on[1], seed=how.seed, proportions={"short": 1.0})
        model = TextToVideo(self.text, network)
        result = train_row(self.folder / name, model, objective, Progressing(source, how.steps * how.batch), how)
        if result is None:
            raise _StoppedError
        return result

    @functools.cached_property
    def enlarger(self) -> tuple[Enlarger, Figures]:
        """What enlarges words, and what its training has cost."""
        c, words = self.recipe, self.trained_on[0]
        T, H, W = self.large_cells
        windows = ((1, H, max(2, W // 2)), (1, max(2, H // 2), W), (T, max(2, H // 2), max(2, W // 2)))
        factor = 2 ** (self.config.bits // 2)
        config = SuperResolutionConfig(c.large_width, c.large_heads, c.large_depth, windows, self.text.width, factor)
        torch.manual_seed(c.large_train.seed)  # the initial weights
        tensors = {name: words[name] for name in ("tokens", "coarse")}
        objective = SuperResolutionObjective(noise=c.noise)
        average, cost = self.trained("super-resolution", SuperResolution(config), objective, tensors, c.large_train)
        network = average.denoiser
        assert isinstance(network, SuperResolution), "what was trained"
        if next(network.parameters()).device.type == "cpu":
            accelerate(network)
        return Enlarger(self.tokenizer, network, average.text), cost

    # Multiply-accumulates of one forward

    def macs(self, engine: WordEngine, task: str) -> float:
        """On one film, in a row of its task where that makes a difference."""
        words, prompt = torch.zeros(1, *self.cells, dtype=torch.long), self.text.encode([PROMPT])
        network = _plain(engine.network)
        if isinstance(network, VideoPoet):
            row, ids = film_rows(task, network.config.layout, words, words, self.recipe.given, prompt.states.shape[1])
            text = prompt if reads_words(task) else None
            return macs_of(network, ids.to(self.device), torch.tensor([row.prefix], device=self.device), text)
        return macs_of(network, words.flatten(1).to(self.device), prompt)

    def large_macs(self, enlarger: Enlarger) -> float:
        """On one large film."""
        fine, coarse = (torch.zeros(1, *cells, dtype=torch.long) for cells in (self.large_cells, self.cells))
        return macs_of(_plain(enlarger.network), fine.to(self.device), coarse.to(self.device), self.text.encode([PROMPT]))


def _plain(network: nn.Module) -> nn.Module:
    """A copy whose products are all counted: those of packed weights are not."""
    return restore(copy.deepcopy(network))


def recipe() -> LanguageTasks:
    """The experiment."""
    return LanguageTasks()
