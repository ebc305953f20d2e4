"""sound: a language model that hears films and sees sound: sound for a film, a film for a sound, sound for a sentence.

Paper: VideoPoet (Kondratyuk et al. 2023), section 3.1 and 4.1, with SoundStream (Zeghidour et al. 2021) for sound.
Command: tubelet train sound
Cost: 131 minutes of a core beside other trainings, 104 of them for the language model.
Score: sound for a film f1 .80 (another clip's .48), for a sentence .48 (.22), a film for a sound .35 (.29): docs/lineage.md.
A run leaves table.json, table.md, sheet.png and films that sound in its folder.

Clips of 17 frames of 32 x 32 pixels and their exact sound (`worlds.sound`) become words: 9 x 4 x 4 by a video tokenizer, and
two levels of 68 by a codec of sound. One small network is trained on rows of [text | video | sound] for three tasks. What it
makes is held against the impacts of the exact state: the share of onsets that are within a frame of an impact and of impacts
that are heard, how loudness ranks, and how often their number is right. Beside it stand the true sound, that sound through the
codec, the two controls of `worlds.sound`, and the sound of another clip. Films that are made for a sound are judged by the
kinks of tracks, beside true films, those through the tokenizer, and films made for another clip's sound. A sentence does not
say when things happen: for sound from text only the count tells something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.codecs.losses import to_pixels
from tubelet.codecs.soundstream import SoundObjective, SoundStream, SoundStreamConfig
from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.core.log import note
from tubelet.core.types import Video
from tubelet.core.weights import load_module, load_tensors, save_module, save_tensors
from tubelet.data.stream import TensorSource
from tubelet.decoding.autoregressive import Context, Sampling, sample
from tubelet.evaluate.sound import REFERENCES, agreement, audible, onsets, references, seen_impacts
from tubelet.generate.system import load
from tubelet.media.audio import Audio, spectrogram
from tubelet.media.encode import save
from tubelet.models.videopoet import Layout, VideoPoet, VideoPoetConfig, cut
from tubelet.recipes.lent import check_kinds
from tubelet.recipes.lineage import SHOWN, Figures, Row, compare, device_of, millions, plain, train_row
from tubelet.recipes.worlds import Job, in_memory
from tubelet.runtime.cpu import restore
from tubelet.train.lineage import FrozenText
from tubelet.train.loop import Objective, TrainConfig, train
from tubelet.train.optim import OptimizerConfig
from tubelet.train.sound import TASKS, SoundRowsObjective, reads_words, rows_of
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.tokens import TokenizerObjective
from tubelet.worlds.constants import TEST_SEEDS
from tubelet.worlds.sound import CONTROLS, Sound, sound

ROWS = (
    *REFERENCES,
    "truth through the codec",
    "seen: truth",
    "seen: truth through the tokenizer",
    *TASKS,
    "text to audio, another text",
    "audio to video, another sound",
)
"""What truth scores comes first: it is known before the time is spent. `TASKS` are made; what begins with "seen" and what
stands beside "audio to video" is read from films, the rest from sound."""
Coder = TypeVar("Coder", bound=nn.Module)
SPLITS = {"in": "train", "held_out": "held_out"}
TRAIN_SEED = 2_080_000_000
"""First seed of the training clips, among the worlds' training seeds."""
KEPT, ENLARGED = 4, 8
"""How many films of a row are kept, and how many pixels each of theirs becomes."""


COLUMNS = (
    *((head, f"{head}/in", plain()) for head in ("precision", "recall", "f1", "loudness", "count")),
    ("timing, s", "timing/in", plain(3)),
    ("f1, held out", "f1/held_out", plain()),
    ("loudness, held out", "loudness/held_out", plain()),
    ("parameters", "parameters", millions),
    ("training, s", "train_seconds", plain(0)),
)


@dataclass(frozen=True)
class Clips:
    """Films uint8 `(n, T, H, W, 3)`, their captions, and their sound."""

    films: Tensor
    captions: list[list[dict[str, str]]]
    hear: Callable[[int, str | None], Sound]
    """The sound of the clip at a place, true or under a control."""

    @functools.cached_property
    def sounds(self) -> list[Sound]:
        return [self.hear(place, None) for place in range(len(self.films))]

    @property
    def audio(self) -> Tensor:
        """int16 `(n, S)`."""
        return torch.from_numpy(np.stack([one.audio.samples for one in self.sounds]))

    @property
    def texts(self) -> list[str]:
        """The short captions."""
        return [next(one["text"] for one in several if one["kind"] == "short") for several in self.captions]


@dataclass(frozen=True)
class SoundRecipe:
    """Sizes, training and measures."""

    rows: tuple[str, ...] = ROWS
    """Which are measured; networks are trained where a row needs them."""
    text: str = "worlds-64"
    """The system, by name or folder, whose frozen text encoder reads prompts."""
    kinds: tuple[str, ...] = ("fall", "bounce", "parabola", "collision")
    clips: int = 6000
    size: tuple[int, int] = (32, 32)
    frames: int = 17
    fps: float = 8.0
    codec: SoundStreamConfig = field(default_factory=lambda: SoundStreamConfig(levels=2))
    codec_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800,
            batch=8,
            warmup=20,
            precision="fp32",
            optimizer=OptimizerConfig(learning_rate=6e-3, learning_rate_adamw=3e-3),
            checkpoint_minutes=4.0,
        )
    )
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(temporal_stride=1))
    tokenizer_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=900,
            batch=16,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    width: int = 192
    depth: int = 6
    heads: int = 4
    shares: dict[str, float] = field(default_factory=lambda: dict(SoundRowsObjective().shares))
    """How often each task is trained."""
    language_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2000,
            batch=32,
            warmup=60,
            optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=4.0,
        )
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    n: int = 96
    """Test clips of each split."""
    workers: int = 2

    def run(self, folder: Path) -> Path:
        """Every row that is not yet measured; returns the table's file. Raises UserError on an unknown row or kind, and where
        sound is no whole number of the codec's hops."""
        check_kinds(self.kinds)
        samples = round(self.frames / self.fps * self.codec.rate)
        if samples % self.codec.hop:
            raise UserError(f"{samples} samples of sound are no multiple of the hop of {self.codec.hop}; change codec.strides")
        return compare(folder, self, _Run(self, folder).rows(), COLUMNS, self.rows)

    def make_clips(self, first: int, count: int, split: str) -> Clips:
        """Clips of the kinds in turn."""
        kinds = [self.kinds[place % len(self.kinds)] for place in range(count)]
        jobs = [Job("phys2d", first + i, self.size, self.frames, self.fps, kind, split) for i, kind in enumerate(kinds)]
        form = (*self.size, self.frames, self.fps)

        def hear(place: int, control: str | None) -> Sound:
            job = jobs[place]
            return sound(job.seed, *form, kind=job.kind, split=split, rate=self.codec.rate, control=control)

        return Clips(*in_memory(jobs, self.workers, "clips"), hear)


class _StoppedError(Exception):
    """A training was stopped before its end."""


class _Run:
    """One run: its data and networks, each made when a row first needs it. All raise `_StoppedError` where a training was."""

    def __init__(self, recipe: SoundRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.device = torch.device(device_of(recipe.language_train))
        self.kept: dict[tuple[str, str, bool], Tensor] = {}

    def rows(self) -> dict[str, Callable[[Path], Row | None]]:
        """Row -> what measures it."""
        heard: dict[str, Callable[[str], list[Audio]]] = {
            "video to audio": functools.partial(self.made_sounds, "video to audio"),
            "text to audio": functools.partial(self.made_sounds, "text to audio"),
            "truth through the codec": self.coded_sounds,
            "text to audio, another text": self.sounds_of_other_texts,
        }
        seen: dict[str, Callable[[str], np.ndarray]] = {
            "audio to video": self.made_films,
            "seen: truth": self.true_films,
            "seen: truth through the tokenizer": self.coded_films,
            "audio to video, another sound": functools.partial(self.made_films, another=True),
        }
        known = {name: functools.partial(self.refer, name) for name in REFERENCES}
        hearing = {name: functools.partial(self.hear, name, sounds) for name, sounds in heard.items()}
        seeing = {name: functools.partial(self.see, name, films) for name, films in seen.items()}
        return {**known, **hearing, **seeing}

    # Rows

    def refer(self, name: str, place: Path) -> Row:
        """What true sounds and wrong ones score."""
        figures: Figures = {}
        for split, clips in self.tests.items():
            rows = references(clips.hear, self.recipe.n, 1 / self.recipe.fps, len(self.recipe.kinds))
            figures |= {f"{figure}/{split}": value for figure, value in rows[name].items()}
        clips = self.tests["in"]
        step = len(self.recipe.kinds) if name == "another clip" else 0
        control = name if name in CONTROLS else None
        sounds = [clips.hear((number + step) % self.recipe.n, control).audio for number in range(KEPT)]
        self.keep(place, clips.films.numpy(), sounds)
        return Row(figures, self.picture(sounds[0]))

    def hear(self, name: str, sounds: Callable[[str], list[Audio]], place: Path) -> Row | None:
        """What onsets of sounds tell of the test clips' impacts; a few films with them."""
        figures: Figures = {}
        try:
            found = {split: sounds(split) for split in SPLITS}
        except _StoppedError:
            return None
        for split, clips in self.tests.items():
            true = [audible(one.impacts) for one in clips.sounds]
            agreed = agreement([onsets(audio) for audio in found[split]], true, 1 / self.recipe.fps)
            figures |= {f"{figure}/{split}": value for figure, value in agreed.items()}
        films = self.true_films("in")
        if name.startswith("text to audio"):
            films = films[:, :1].repeat(self.recipe.frames, 1)  # nothing is seen but where it begins
        self.keep(place, films, found["in"])
        return Row(figures | self.cost(name), self.picture(found["in"][0]))

    def see(self, name: str, films: Callable[[str], np.ndarray], place: Path) -> Row | None:
        """What films show of the impacts of the test clips; a few of them with the sound that they were made for."""
        figures: Figures = {}
        try:
            found = {split: films(split) for split in SPLITS}
        except _StoppedError:
            return None
        fps = self.recipe.fps
        for split, clips in self.tests.items():
            true = [audible(one.impacts) for one in clips.sounds]
            agreed = agreement(
                [seen_impacts(f, fps) for f in found[split]], true, 1 / fps, (1 / fps, (self.recipe.frames - 2) / fps)
            )
            figures |= {f"{figure}/{split}": value for figure, value in agreed.items()}
        step = len(self.recipe.kinds) if name == "audio to video, another sound" else 0
        sounds = self.true_sounds("in")
        self.keep(place, found["in"], [*sounds[step:], *sounds[:step]])
        return Row(figures | self.cost(name), found["in"][0])

    def picture(self, audio: Audio) -> np.ndarray:
        """A spectrogram in as many pieces as a sheet has columns, `(SHOWN, H, W, 3)`."""
        height, width = self.recipe.size
        return np.stack(np.split(spectrogram(audio, height, SHOWN * width), SHOWN, axis=1))

    def keep(self, place: Path, films: np.ndarray, sounds: Sequence[Audio]) -> None:
        """The first films with their sounds, enlarged."""
        captions = self.tests["in"].texts
        for number, (film, audio, text) in enumerate(zip(films[:KEPT], sounds, captions, strict=False)):
            large = film.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)  # (T, H*ENLARGED, W*ENLARGED, 3)
            save(large, place / f"{number}.mp4", self.recipe.fps, {"prompt": text}, audio)

    def cost(self, name: str) -> Figures:
        """What the language model of a row has cost."""
        return self.language[1] if name in TASKS else {}

    # Sounds and films of the test clips, by split

    def true_sounds(self, split: str) -> list[Audio]:
        return [one.audio for one in self.tests[split].sounds]

    def coded_sounds(self, split: str) -> list[Audio]:
        return self.to_sounds(self.words(self.tests[split])["audio"])

    def made_sounds(self, task: str, split: str) -> list[Audio]:
        layout = self.layout
        return self.to_sounds(layout.audio_codes(self.made(task, split)))

    def sounds_of_other_texts(self, split: str) -> list[Audio]:
        """What was made for the next clip's text, which is of another kind."""
        made = self.made_sounds("text to audio", split)
        return [*made[1:], *made[:1]]

    def true_films(self, split: str) -> np.ndarray:
        return self.tests[split].films.numpy()

    def coded_films(self, split: str) -> np.ndarray:
        return self.to_films(self.words(self.tests[split])["tokens"])

    def made_films(self, split: str, another: bool = False) -> np.ndarray:
        """For the true sound of each clip, or for another's."""
        shape = self.tokenizer.strides.latent_shape(self.recipe.frames, *self.recipe.size)
        return self.to_films(self.layout.visual_codes(self.made("audio to video", split, another), shape))

    def made(self, task: str, split: str, another: bool = False) -> Tensor:
        """Ids of the output for every test clip, `(n, K)`, each from its own random numbers."""
        if (task, split, another) not in self.kept:
            clips, model = self.tests[split], self.language[0]
            words = self.words(clips)
            if another:
                words["audio"] = words["audio"].roll(-len(self.recipe.kinds), 0)  # of the same kind
            parts = []
            for begin in range(0, self.recipe.n, 48):
                part = slice(begin, begin + 48)
                video, audio = words["tokens"][part], words["audio"][part]
                rngs = [torch.Generator().manual_seed(begin + number) for number in range(len(video))]
                parts.append(self.continued(model, task, video, audio, clips.texts[part], rngs))
            self.kept[task, split, another] = torch.cat(parts)
        return self.kept[task, split, another]

    @torch.inference_mode()
    def continued(
        self, model: TextToVideo, task: str, video: Tensor, audio: Tensor, texts: list[str], rngs: list[torch.Generator]
    ) -> Tensor:
        """Ids `(B, K)` of what a task makes of words of films `(B, T, h, w)` or of sounds `(B, levels, S)`, and of texts."""
        network = model.denoiser
        assert isinstance(network, VideoPoet), "a network that reads words in a row"
        text = cut(model.text.encode(texts)) if reads_words(task) else None
        row, ids = rows_of(task, self.layout, video, audio, 0 if text is None else text.states.shape[1])
        context = Context(network.step(row.prefix, text), ids[:, : row.prefix].to(self.device), network.cache)
        follows = row.ids[row.prefix : -2]  # what ends a row goes without saying
        choices = self.layout.choices(follows)
        made = sample(context, len(follows), rngs, sampling=self.recipe.sampling, choices=choices)  # (B, 1 + K)
        return made[:, 1:].cpu()

    # Words and back

    def words(self, clips: Clips) -> dict[str, Tensor]:
        """Words of films, `tokens (n, T, h, w)`, and of their sound, `audio (n, levels, S)`."""
        tokenizer, codec = self.tokenizer, self.codec  # trained here, where they are not yet
        with torch.inference_mode():
            films = [tokenizer.tokens(to_pixels(part.to(self.device))).cpu() for part in clips.films.split(32)]
            sounds = [codec.tokens(part[:, None].float().to(self.device) / 32767).cpu() for part in clips.audio.split(32)]
        return {"tokens": torch.cat(films), "audio": torch.cat(sounds)}

    def to_sounds(self, words: Tensor) -> list[Audio]:
        codec = self.codec
        with torch.inference_mode():
            waves = [codec.from_tokens(part.to(self.device))[:, 0].cpu() for part in words.split(32)]  # (b, S) each
        return [Audio.from_float(wave.numpy(), self.recipe.codec.rate) for wave in torch.cat(waves)]

    def to_films(self, words: Tensor) -> np.ndarray:
        tokenizer = self.tokenizer
        with torch.inference_mode():
            films = [tokenizer.from_tokens(part.to(self.device)).cpu() for part in words.split(32)]
        return Video(torch.cat(films), self.recipe.fps).to_uint8()

    # Data and networks

    @property
    def layout(self) -> Layout:
        return Layout(self.tokenizer.words, self.recipe.codec.levels, self.recipe.codec.codes)

    @functools.cached_property
    def tests(self) -> dict[str, Clips]:
        return {split: self.recipe.make_clips(TEST_SEEDS[0], self.recipe.n, rule) for split, rule in SPLITS.items()}

    @functools.cached_property
    def clips(self) -> Clips:
        return self.recipe.make_clips(TRAIN_SEED, self.recipe.clips, "train")

    @functools.cached_property
    def codec(self) -> SoundStream:
        torch.manual_seed(self.recipe.codec_train.seed)  # the initial weights
        model = SoundStream(self.recipe.codec)
        return self.trained("codec", model, SoundObjective(), lambda: {"audio": self.clips.audio}, self.recipe.codec_train)

    @functools.cached_property
    def tokenizer(self) -> VideoTokenizer:
        how = self.recipe.tokenizer_train
        torch.manual_seed(how.seed)  # the initial weights
        model = VideoTokenizer(self.recipe.tokenizer)
        return self.trained("tokenizer", model, TokenizerObjective(), lambda: {"video": self.clips.films}, how)

    def trained(
        self, name: str, model: Coder, objective: Objective, data: Callable[[], dict[str, Tensor]], how: TrainConfig
    ) -> Coder:
        """The average of a codec or tokenizer, trained unless it is there already."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            note(f"{self.folder.name}: {name}")
            result = train(model, objective, TensorSource(data(), seed=how.seed), how, self.folder / name)
            if not result.finished:
                raise _StoppedError
            save_module(path, result.ema)
        load_module(path, model)
        return model.to(self.device).eval()

    @functools.cached_property
    def language(self) -> tuple[TextToVideo, Figures]:
        """The language model, and what it has cost."""
        recipe, path = self.recipe, self.folder / "words.safetensors"
        text = load(recipe.text, device=str(self.device), dtype="float32").text
        restore(text)  # it is read in training, too
        layout = self.layout
        if not path.exists():
            save_tensors(path, self.words(self.clips))
        source = TensorSource(
            load_tensors(path), self.clips.captions, seed=recipe.language_train.seed, proportions={"short": 1.0}
        )
        torch.manual_seed(recipe.language_train.seed)  # the initial weights
        network = VideoPoet(VideoPoetConfig(recipe.width, recipe.heads, recipe.depth, text.width, layout))
        note(f"{self.folder.name}: language model")
        objective = SoundRowsObjective(recipe.shares)
        result = train_row(
            self.folder / "language", TextToVideo(FrozenText(text), network), objective, source, recipe.language_train
        )
        if result is None:
            raise _StoppedError
        return result


def recipe() -> SoundRecipe:
    """The experiment."""
    return SoundRecipe()
