"""The road from simulated worlds to a system, in stages, each resumable: clips, codec, latents, denoiser, system.

A stage that has finished is skipped when the same command runs again; one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tubelet.codecs import build_codec
from tubelet.codecs.base import Codec
from tubelet.codecs.causal_conv import CausalConvConfig
from tubelet.codecs.losses import CodecLossConfig, CodecObjective, to_pixels
from tubelet.codecs.transformer import TransformerConfig
from tubelet.core.config import to_dict, with_defaults
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.log import note, progress
from tubelet.core.types import Strides, Video
from tubelet.core.weights import load_module, save_module
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.data.states import CachedTextEncoder, cache_states
from tubelet.data.stream import BucketStream, CaptionChoice, PackStream, Stream, TensorSource, names_of
from tubelet.diffusion.objectives import Prediction
from tubelet.diffusion.paths import SigmaSampling
from tubelet.generate.engine import Engine, Request, Sampling
from tubelet.generate.folder import Part, find, read_config, save_system
from tubelet.generate.system import load
from tubelet.media.sheet import contact_sheet, save_sheet
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.patch import token_grid
from tubelet.runtime.cpu import use_fast_attention
from tubelet.runtime.device import choose_device, fast_bf16
from tubelet.text import build_text
from tubelet.text.bpe import Tokenizer
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.loop import TrainConfig, load_average, train
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective
from tubelet.worlds import WORLDS, foreground
from tubelet.worlds.base import check_request
from tubelet.worlds.constants import KINDS, PERSIST2D_KINDS, TRAIN_SEEDS

Latents = TensorSource | PackStream | BucketStream
CODEC_SEED, DENOISER_SEED = 1_000_000_000, 0
"""First seeds of the codec's and the denoiser's clips, both among the worlds' training seeds."""

CAPTIONS = ("short", "dense", "human")
"""Kinds of captions that every rendered clip has."""

PROMPTS = (
    "A large red ball bounces once.",
    "A small blue square slides quickly to the right.",
    "A yellow ring is thrown up to the right.",
    "A medium purple triangle falls.",
    "a green ball passes behind a gray wall",
    "a blue ball hits an orange ball",
)
"""What is sampled on the way."""


@dataclass(frozen=True)
class Clips:
    """Which episodes are rendered."""

    codec: int = 12_000
    """Clips kept as pixels, for the codec."""
    codec_frames: int = 5
    """Their length. A codec that sees one frame at a time learns more from many short clips."""
    codec_fps: float = 2.0
    denoiser: int = 24_000
    """Clips kept as latents, for the denoiser."""
    first: int = 0
    """Place of the first of them among the seeds of training: a part of a training that goes on may take fresh ones."""
    persist: float = 0.22
    """Share of persist2d; the rest is phys2d, and each world draws its kinds evenly."""
    kinds: dict[str, float] = field(default_factory=dict)
    """Proportions of kinds among the denoiser's clips, of both worlds, in place of `persist`: what is hard is shown oftener."""
    size: tuple[int, int] = (64, 64)
    frames: int = 17
    fps: float = 8.0
    sizes: tuple[tuple[int, int], ...] = ()
    """Sizes (height, width) that the denoiser's clips take in turn, in place of `size`; one named twice comes twice as
    often."""
    lengths: tuple[int, ...] = ()
    """Frames that they take in turn, in place of `frames`."""
    square: bool = False
    """Cut clips of `sizes` to the square in their middle, as most video models are trained: the control of native sizes."""

    def __post_init__(self) -> None:
        last = CODEC_SEED - DENOISER_SEED
        if not 0 <= self.first < last:
            raise UserError(f"first is the place of a seed and must be between 0 and {last - 1}, got {self.first}; correct it")
        for name, greatest in (("codec", len(TRAIN_SEEDS) - CODEC_SEED), ("denoiser", last - self.first)):
            if not 1 <= getattr(self, name) <= greatest:
                raise UserError(
                    f"{name} counts clips and must be between 1 and {greatest}, got {getattr(self, name)}; correct it"
                )
        if not 0.0 <= self.persist <= 1.0:
            raise UserError(f"persist is a share of the clips and must lie in [0, 1], got {self.persist}; correct it")

    @property
    def mixed(self) -> bool:
        """Whether the denoiser's clips differ in size, so that they are packed or come in buckets."""
        return bool(self.sizes or self.lengths)


@dataclass(frozen=True)
class WorldsRecipe:
    """Everything about a run on the worlds."""

    name: str
    codec_train: TrainConfig
    denoise: TrainConfig
    start: str | None = None
    """A system, by name or folder, to go on from: its codec is kept, its text encoder and denoiser are trained further."""
    codec_from: str | None = None
    """A system, by name or folder, whose codec alone is kept: text encoder and denoiser begin anew."""
    sketch: TrainConfig | None = None
    """Trains on a few frames of each clip, before whole films: it costs a fraction and teaches what is where when."""
    sketch_frames: int = 5
    """Token frames that the sketch sees of each clip."""
    decoder_train: TrainConfig | None = None
    """Trains the decoder alone, last: the latents stay what the denoiser has learned, their rendering gets sharper."""
    clips: Clips = field(default_factory=Clips)
    codec: Literal["causal_conv", "transformer"] = "causal_conv"
    causal_conv: CausalConvConfig = field(default_factory=CausalConvConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    codec_loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    decoder_loss: CodecLossConfig = field(default_factory=lambda: CodecLossConfig(noise=0.1))
    denoiser: SpacetimeConfig = field(default_factory=SpacetimeConfig)
    text: OwnTextConfig = field(default_factory=OwnTextConfig)
    text_encoder: Literal["own", "minilm"] = "own"
    """`own` learns along, of the sizes in `text`; `minilm` is frozen and `denoiser.text_width` must be its 384."""
    captions: dict[str, float] = field(default_factory=lambda: {"short": 0.5, "human": 0.3, "dense": 0.2})
    """Proportions in which caption kinds are drawn."""
    prediction: Prediction = "skip"
    sigma: SigmaSampling = field(default_factory=SigmaSampling)
    text_drop: float = 0.1
    image_share: float = 0.1
    masks: dict[str, float] = field(default_factory=dict)
    """Tasks that the training on whole films mixes in, as `TextToVideoObjective.masks`."""
    haze: float = 0.0
    foreground: float = 4.0
    grouping: Literal["packs", "buckets"] = "packs"
    """How clips that differ in size share a step: `packs` of any sizes, of which a batch is a number, or `buckets`, of which a
    step sees one size, at most a batch of clips and one budget of tokens. Buckets can be compiled."""
    uniform: bool = False
    """Films of buckets take one form for each size (`TextToVideoObjective.uniform`), so that few graphs are compiled."""
    budget: int = 4096
    """Tokens of a pack or of a step on a bucket, where clips differ in size; in a sketch those that it sees."""
    sampling: Sampling = field(default_factory=Sampling)
    workers: int = 2
    """Processes that render."""

    def run(self, folder: Path) -> Path:
        """All stages; returns the system's folder. Raises UserError when `folder` holds a run of other settings."""
        self._check()
        use_fast_attention()
        self._claim(folder)
        clock: dict[str, float] = {}
        stages = {
            self.render: (self.start is None and self.codec_from is None) or self.decoder_train is not None,
            self.train_codec: self.start is None and self.codec_from is None,
            self.adopt_codec: self.codec_from is not None,
            self.adopt: self.start is not None,
            self.encode: True,
            self.train_sketch: self.sketch is not None,
            self.train_denoiser: True,
            self.train_decoder: self.decoder_train is not None,
            self.export: True,
        }
        for stage in (stage for stage, wanted in stages.items() if wanted):
            done = folder / f"{stage.__name__}.json"
            if done.exists():
                clock |= read_json(done)
                continue
            note(f"{self.name}: {stage.__name__}")
            started = time.perf_counter()
            if stage(folder) is False:
                note(f"stopped in {stage.__name__}; the same command goes on from there")
                return folder
            clock |= {stage.__name__: round(time.perf_counter() - started, 1)}
            write_json(done, {stage.__name__: clock[stage.__name__]})
        note(f"{self.name}: {folder / 'system'}")
        return folder / "system"

    def _check(self) -> None:
        """Refuse parts that do not fit each other, and settings of a late stage, before an hour of work finds out."""
        codec, network = build_codec(self.codec, getattr(self, self.codec)), self.denoiser
        if network.in_channels != codec.channels:
            raise UserError(f"denoiser.in_channels must be the codec's {codec.channels}, got {network.in_channels}; set it so")
        width = self.text.width if self.text_encoder == "own" else build_text(self.text_encoder).width
        if network.text_width != width:
            raise UserError(f"denoiser.text_width must be the text encoder's {width}, got {network.text_width}; set it so")
        codec.strides.latent_shape(self.clips.codec_frames, *self.clips.size)
        t, h, w = network.patch
        whole = Strides(codec.strides.t * t, codec.strides.h * h, codec.strides.w * w)
        tokens = [math.prod(whole.latent_shape(frames, *size)) for size, frames in self._forms()]
        packed = self.clips.mixed and self.grouping == "packs"
        if packed and (self.denoise.compile or (self.sketch is not None and self.sketch.compile)):
            raise UserError(
                "packs of clips of any size differ in length at every step; set denoise.compile=false or grouping=buckets"
            )
        if self.uniform and (self.text_encoder != "own" or packed):
            raise UserError("uniform is for buckets and the own text encoder; set uniform=false, or grouping=buckets")
        if self.budget < 1 or (packed and self.budget < max(tokens)):
            raise UserError(f"a budget of {self.budget} tokens does not hold a clip of {max(tokens)}; raise budget")
        if self.grouping not in ("packs", "buckets"):
            raise UserError(f"grouping must be packs or buckets, got {self.grouping!r}; choose one of them")
        check_workers(self.workers)
        unknown = sorted(set(self.clips.kinds) - set(KINDS))
        if unknown:
            raise UserError(f"there is no kind {unknown[0]!r} of clips; choose from {', '.join(KINDS)}")
        if self.clips.kinds and not (min(self.clips.kinds.values()) >= 0 and sum(self.clips.kinds.values()) > 0):
            raise UserError("proportions of clips.kinds must be at least 0 and not all 0; correct them")
        CaptionChoice(self.captions, self.denoise.seed)
        self._check_clips()
        self._films()
        self._objective(self.sketch_frames)
        new_codec = self.codec_train if self.start is None and self.codec_from is None else None
        for stage in (new_codec, self.sketch, self.denoise, self.decoder_train):
            if stage is not None:
                choose_device(stage.device)
        if self.start is not None and self.codec_from is not None:
            raise UserError("start keeps the codec already; set one of start and codec_from")
        if self.start is not None:
            self._check_start(self.start)
        if self.codec_from is not None:
            own = Part(self.codec, to_dict(getattr(self, self.codec)))
            if own != read_config(find(self.codec_from)).codec:
                raise UserError(f"{self.codec_from} has another codec than the recipe; take it from one with the same settings")

    def _check_clips(self) -> None:
        """Refuse clips that no world can render, and captions that they will not have."""
        few = replace(self, clips=replace(self.clips, denoiser=min(self.clips.denoiser, 100)))  # every hundred has all worlds
        worlds = {job.world for job in few._native_jobs()}
        forms = [(*form, self.clips.fps) for form in self._forms()]
        forms += [(self.clips.size, self.clips.codec_frames, self.clips.codec_fps)]
        for world, (size, frames, fps) in itertools.product(sorted(worlds), forms):
            check_request(world, (), ("train",), 0, *size, frames, fps, None, "train")
        known = {name for world in WORLDS for kind in CAPTIONS for name in names_of({"kind": kind, "source": world})}
        unknown = sorted(set(self.captions) - known)
        if unknown:
            raise UserError(f"there is no kind {unknown[0]!r} of captions; choose from {', '.join(CAPTIONS)}")
        wanted = {name for name, share in self.captions.items() if share > 0}
        for world in sorted(worlds):
            if wanted and not any(wanted & {*names_of({"kind": kind, "source": world})} for kind in CAPTIONS):
                raise UserError(f"captions leave none to clips of {world}; give a kind of {', '.join(CAPTIONS)} a share")

    def _forms(self) -> list[tuple[tuple[int, int], int]]:
        """Sizes and lengths of the denoiser's clips, in turn."""
        sizes, lengths = self.clips.sizes or (self.clips.size,), self.clips.lengths or (self.clips.frames,)
        return list(itertools.product(sizes, lengths))

    def _check_start(self, start: str) -> None:
        """Refuse to go on from a system whose networks are not the recipe's."""
        made = re.fullmatch(r"runs/([^/]+)/system", start)
        if made and not Path(start).exists():
            raise UserError(
                f"the recipe goes on from {start}, which is not there; tubelet train {made[1]} makes it, "
                "or go on from another with --set start=FOLDER"
            )
        found = read_config(find(start))
        parts = {
            "codec": (Part(self.codec, to_dict(getattr(self, self.codec))), found.codec),
            "denoiser": (Part("spacetime", to_dict(self.denoiser)), found.denoiser),
            "text": (Part(self.text_encoder, to_dict(self.text)), found.text),
        }
        for name, (own, theirs) in parts.items():
            if own != theirs and (name != "text" or own.name == "own" or own.name != theirs.name):
                raise UserError(f"{start} has another {name} than the recipe; start from a system with the same settings")

    def _claim(self, folder: Path) -> None:
        path, settings = folder / "recipe.json", to_dict(self)
        if not path.exists():
            write_json(path, settings)
        # Lengths and rates of the denoiser's training may change between calls; what the data and networks are may not.
        networks = ("codec", "causal_conv", "transformer", "denoiser", "text", "text_encoder")
        fixed = ("clips", *networks, "prediction", "start", "codec_from", "grouping")
        known = read_json(path)
        if not isinstance(known, dict):
            raise UserError(f"{path} must hold an object with settings; restore it, or use another --out")
        known = with_defaults(self, known)
        changed = [name for name in fixed if known.get(name) != settings[name]]
        if not changed:
            return
        # A name with a point before it is a lock's, or that of a file that was never finished.
        if any(one.is_file() and one != path and not one.name.startswith(".") for one in folder.rglob("*")):
            raise UserError(
                f"{folder} holds a run with other settings of {changed[0]!r}; use another --out, or the same settings"
            )
        write_json(path, settings)

    # Stages ------------------------------------------------------------------------------------------------------------------

    def render(self, folder: Path) -> None:
        """Clips as pixels for the codec."""
        with ShardWriter(folder / "clips") as writer, progress("rendering", "clips") as advance:
            jobs = [
                job
                for job in self._jobs(CODEC_SEED, self.clips.codec, self.clips.codec_frames, self.clips.codec_fps)
                if job.key not in writer
            ]
            for done, (job, video, _, captions) in enumerate(rendered(jobs, self.workers), start=1):
                meta = {"captions": captions, "fps": job.fps, "seed": job.seed, "world": job.world}
                writer.add(Record(job.key, {"video": torch.from_numpy(video)}, meta))
                advance(done, len(jobs))

    def train_codec(self, folder: Path) -> bool:
        """The codec and its latent statistics."""
        torch.manual_seed(self.codec_train.seed)  # the initial weights
        codec = build_codec(self.codec, getattr(self, self.codec))
        source = Stream(ShardDataset(folder / "clips"), self.codec_train.seed)
        result = train(codec, CodecObjective(self.codec_loss), source, self.codec_train, folder / "codec")
        if not result.finished:
            return False
        average = result.ema
        assert isinstance(average, Codec)
        with torch.no_grad():
            raw = torch.cat(
                [average.encode_raw(to_pixels(source.draw(64)["video"].to(average.mean.device))) for _ in range(8)]
            )  # (512, C, T, h, w)
        average.set_statistics(raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
        save_module(folder / "codec.safetensors", average)
        return True

    def adopt_codec(self, folder: Path) -> None:
        """A finished system's codec as this run's."""
        assert self.codec_from is not None, "a recipe that trains its codec has no such stage"
        save_module(folder / "codec.safetensors", load(self.codec_from, device="cpu", dtype="float32").codec)

    def adopt(self, folder: Path) -> None:
        """A finished system's parts as this run's beginning."""
        assert self.start is not None, "a recipe that begins anew has no such stage"
        system = load(self.start, device="cpu", dtype="float32")
        save_module(folder / "codec.safetensors", system.codec)
        if isinstance(system.text, OwnTextEncoder):
            system.text.tokenizer.save(folder / "tokenizer.json")
        save_module(folder / "start.safetensors", TextToVideo(system.text, system.denoiser))

    def encode(self, folder: Path) -> None:
        """Clips as standardised latents with foreground weights, for the denoiser."""
        codec = self.load_codec(folder).to(choose_device("auto"))
        encode(codec, self._native_jobs(), folder, self.workers, square=self.clips.square)

    def train_sketch(self, folder: Path) -> bool:
        """Denoiser and text encoder on a few frames of each clip."""
        assert self.sketch is not None, "a recipe without a sketch has no such stage"
        source = self._latents(folder, self.sketch.seed, self.sketch_frames)
        model = self.build_model(folder, source)
        if self.start is not None:
            load_module(folder / "start.safetensors", model)
        result = train(model, self._objective(self.sketch_frames), source, self.sketch, folder / "sketch")
        if result.finished:
            save_module(folder / "sketch.safetensors", result.model)
        return result.finished

    def train_denoiser(self, folder: Path) -> bool:
        """Denoiser and text encoder together."""
        source = self._latents(folder, self.denoise.seed)
        model = self.build_model(folder, source)
        if self.sketch is not None or self.start is not None:
            load_module(folder / ("sketch.safetensors" if self.sketch is not None else "start.safetensors"), model)
        objective = self._films()
        codec, prompts = self.load_codec(folder).to(choose_device(self.denoise.device)), self.prompts(folder)

        def sample(average: TextToVideo, step: int) -> None:
            average.eval()
            engine = Engine(codec, average.denoiser, average.text, self.prediction, self.denoiser.patch)
            requests = [Request(prompt, 0) for prompt in prompts]
            pixels, _ = engine.sample(requests, self.clips.size, self.clips.frames, self.sampling)  # (B, 3, T, H, W)
            frames = Video(pixels, self.clips.fps).to_uint8()
            save_sheet(contact_sheet(list(frames), prompts), folder / "samples" / f"{step:06d}.png")

        return train(model, objective, source, self.denoise, folder / "denoiser", sample=sample).finished

    def train_decoder(self, folder: Path) -> bool:
        """More of the codec's training with the encoder frozen."""
        assert self.decoder_train is not None, "a recipe without decoder_train has no such stage"
        codec = self.load_codec(folder)
        for name, parameter in codec.named_parameters():
            parameter.requires_grad_(not name.startswith(("encoder", "merge")))
        source = Stream(ShardDataset(folder / "clips"), self.decoder_train.seed)
        result = train(codec, CodecObjective(self.decoder_loss), source, self.decoder_train, folder / "decoder")
        if result.finished:
            save_module(folder / "codec-polished.safetensors", result.ema)
        return result.finished

    def export(self, folder: Path) -> None:
        """The averaged weights as a system, bf16."""
        model = self.build_model(folder)
        steps = load_average(folder / "denoiser", model)
        save_system(
            folder / "system",
            name=self.name,
            codec=(self.codec, self.load_codec(folder)),
            denoiser=("spacetime", model.denoiser),
            text=(self.text_encoder, model.text),
            size=self.clips.size,
            frames=self.clips.frames,
            fps=self.clips.fps,
            prediction=self.prediction,
            defaults=self.sampling,
            training={"recipe": self.name, "steps": steps, "batch": self.denoise.batch, "clips": self.seen(folder)},
            expander=self.expander,
        )

    def seen(self, folder: Path) -> int:
        """How many clips the denoiser was trained on."""
        return self.clips.denoiser

    @property
    def expander(self) -> str | None:
        """Whose rules rewrite the prompts of the system that is made."""
        return "worlds"

    def prompts(self, folder: Path) -> Sequence[str]:
        """What is sampled on the way."""
        return PROMPTS

    def _latents(self, folder: Path, seed: int, shown: int = 0) -> Latents:
        """The clips' latents. Of `shown` token frames of each, where that is not 0, more of them fit into a step's budget."""
        dataset = ShardDataset(folder / "latents")
        if self.clips.mixed:
            shapes = dataset.shapes("latent")
            grids = [token_grid((t, h, w), self.denoiser.patch) for _, t, h, w in shapes]
            shortest = min(t for t, _, _ in grids)
            budget = self.budget * shortest // min(shown or shortest, shortest)
            if self.grouping == "buckets":
                return BucketStream(dataset, grids, seed, budget=budget, proportions=self.captions, whole=self.uniform)
            tokens = [t * h * w for t, h, w in grids]
            return PackStream(dataset, tokens, budget, seed, proportions=self.captions)
        return TensorSource.load(dataset, ("latent", "foreground"), seed=seed, proportions=self.captions)

    def _objective(self, frames: int = 0) -> TextToVideoObjective:
        return TextToVideoObjective(
            prediction=self.prediction,
            sampling=self.sigma,
            text_drop=self.text_drop,
            image_share=self.image_share,
            frames=frames,
            foreground=self.foreground,
            uniform=self.uniform,
        )

    def _films(self) -> TextToVideoObjective:
        """What the training on whole films minimises."""
        return replace(self._objective(), masks=self.masks, haze=self.haze)

    # Parts -------------------------------------------------------------------------------------------------------------------

    def load_codec(self, folder: Path) -> Codec:
        """The trained codec of a run."""
        codec = build_codec(self.codec, getattr(self, self.codec))
        polished = folder / "codec-polished.safetensors"
        load_module(polished if polished.exists() else folder / "codec.safetensors", codec)
        return codec.eval()

    def build_model(self, folder: Path, source: Latents | None = None) -> TextToVideo:
        """Denoiser and text encoder, untrained; the tokenizer is learned from the captions once and kept, and so are the states
        of a frozen encoder."""
        if self.text_encoder != "own":
            inner, states = build_text(self.text_encoder), folder / "text-states"
            if source is not None:
                kinds = {kind for kind, share in self.captions.items() if share > 0}
                texts = (c["text"] for captions in _captions(source) for c in captions if kinds & {*names_of(c)})
                cache_states(inner.encode, texts, states)
            torch.manual_seed(self.denoise.seed)  # the initial weights
            return TextToVideo(CachedTextEncoder(inner, states), Spacetime(self.denoiser))
        path = folder / "tokenizer.json"
        if not path.exists():
            assert source is not None, "the tokenizer is learned from captions"
            some = [caption["text"] for captions in itertools.islice(_captions(source), 8000) for caption in captions]
            train_tokenizer(some, self.text.vocab_size).save(path)
        torch.manual_seed(self.denoise.seed)  # the initial weights
        return TextToVideo(OwnTextEncoder(self.text, Tokenizer.load(path)), Spacetime(self.denoiser))

    def _jobs(self, first_seed: int, count: int, frames: int, fps: float) -> list[Job]:
        persist = round(self.clips.persist * 100)
        return [
            Job("persist2d" if i % 100 < persist else "phys2d", first_seed + i, self.clips.size, frames, fps)
            for i in range(count)
        ]

    def _native_jobs(self) -> list[Job]:
        """The denoiser's clips, of their sizes and lengths in turn."""
        forms = self._forms()
        jobs = self._jobs(DENOISER_SEED + self.clips.first, self.clips.denoiser, self.clips.frames, self.clips.fps)
        if self.clips.kinds:
            kinds = in_turn(self.clips.kinds)
            jobs = [
                replace(job, world="persist2d" if kind in PERSIST2D_KINDS else "phys2d", kind=kind)
                for job, kind in zip(jobs, itertools.cycle(kinds), strict=False)
            ]
        # Every hundred clips the turns shift by one, so that every kind comes in every form.
        turns = [forms[(i + i // 100) % len(forms)] for i in range(len(jobs))]
        return [replace(job, size=size, frames=frames) for job, (size, frames) in zip(jobs, turns, strict=True)]


def in_turn(shares: Mapping[str, float], count: int = 100) -> list[str]:
    """`count` names in their proportions, each as evenly spread as it can be."""
    whole, given, names = sum(shares.values()), dict.fromkeys(shares, 0), []
    for place in range(1, count + 1):
        name = max(shares, key=lambda one: shares[one] / whole * place - given[one])
        given[name] += 1
        names.append(name)
    return names


@dataclass(frozen=True)
class Job:
    """One episode to render."""

    world: str
    seed: int
    size: tuple[int, int]
    frames: int
    fps: float
    kind: str | None = None
    split: str = "train"

    @property
    def key(self) -> str:
        return f"{self.world}-{self.seed:010d}"


Rendered = tuple[Job, np.ndarray, np.ndarray, list[dict[str, str]]]


def render_one(job: Job) -> Rendered:
    """One episode: uint8 `(T, H, W, 3)`, where its saturated colour is, and its captions."""
    episode = WORLDS[job.world].sample(job.seed, *job.size, job.frames, job.fps, kind=job.kind, split=job.split)
    captions = [{"text": getattr(episode, kind), "kind": kind, "source": job.world} for kind in CAPTIONS]
    return job, episode.video, foreground(episode.video), captions


def check_workers(workers: int) -> None:
    """Raises UserError when nobody would render."""
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}; it counts processes that render")


def rendered(jobs: Sequence[Job], workers: int) -> Iterator[Rendered]:
    """Episodes in order, rendered by a pool of processes. Raises UserError when nobody would render."""
    check_workers(workers)
    if workers < 2 or len(jobs) < 64:
        yield from map(render_one, jobs)
        return
    # spawn: a forked child would inherit torch's threads in an unknown state.
    # Ctrl-C reaches the whole group: only the parent answers it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(workers, initializer=signal.signal, initargs=ignore) as pool:
        # A bounded number of chunks ahead: a pool that runs free fills the memory where its clips are used more slowly.
        ahead: deque[AsyncResult[list[Rendered]]] = deque()
        for begin in range(0, len(jobs), 16):
            ahead.append(pool.map_async(render_one, jobs[begin : begin + 16], 16))
            if len(ahead) > 4 * workers:
                yield from ahead.popleft().get()
        while ahead:
            yield from ahead.popleft().get()


def encode(codec: Codec, wanted: Sequence[Job], folder: Path, workers: int, square: bool = False) -> None:
    """Episodes as standardised latents with foreground weights in folder/latents, those that are not there yet.

    The codec works where it lies; `square` cuts clips to the square in their middle.
    """
    device = next(codec.parameters()).device
    bf16 = fast_bf16(device)
    with ShardWriter(folder / "latents", shard_bytes=64 * 2**20) as writer, progress("encoding", "clips") as advance:
        jobs = [job for job in wanted if job.key not in writer]
        done = 0
        for group in _groups(rendered(jobs, workers), lambda pixels: 32 if device.type == "cpu" else max(1, 2**24 // pixels)):
            if square:
                group = [(job, _square(video), _square(colour), captions) for job, video, colour, captions in group]
            pixels = to_pixels(torch.from_numpy(np.stack([video for _, video, _, _ in group])).to(device))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                latents = codec.encode(pixels).to(torch.bfloat16).cpu()  # (n, C, T', h, w)
            for (job, _, colour, captions), latent in zip(group, latents, strict=True):
                weight = foreground_cells(colour, codec.strides)  # (T', h, w)
                meta = {"captions": captions, "fps": job.fps, "seed": job.seed, "world": job.world}
                writer.add(Record(job.key, {"latent": latent, "foreground": weight}, meta))
            done += len(group)
            advance(done, len(jobs))


def in_memory(jobs: Sequence[Job], workers: int, title: str) -> tuple[Tensor, list[list[dict[str, str]]]]:
    """Episodes of one size and length as uint8 `(B, T, H, W, 3)`, and the captions of each."""
    video = torch.empty(len(jobs), jobs[0].frames, *jobs[0].size, 3, dtype=torch.uint8)
    captions: list[list[dict[str, str]]] = []
    with progress(f"rendering {title}", "clips") as advance:
        for place, (_, frames, _, said) in enumerate(rendered(jobs, workers)):
            video[place] = torch.from_numpy(frames)
            captions.append(said)
            advance(place + 1, len(jobs))
    return video, captions


def _groups(items: Iterator[Rendered], size: Callable[[int], int]) -> Iterator[list[Rendered]]:
    """Clips of one shape, so many together as `size` says of clips of so many pixels."""
    waiting: dict[tuple[int, ...], list[Rendered]] = {}
    for item in items:
        group = waiting.setdefault(item[1].shape, [])
        group.append(item)
        if len(group) == size(math.prod(item[1].shape[:3])):
            yield waiting.pop(item[1].shape)
    yield from waiting.values()


def _captions(source: Latents) -> Iterator[Sequence[Mapping[str, str]]]:
    """The captions of every clip."""
    if isinstance(source, TensorSource):
        assert source.captions is not None, "the clips have no captions"
        yield from source.captions
        return
    for index in range(len(source.dataset)):
        record = source.dataset.read(index)
        if record is not None:
            yield record.meta["captions"]


def _square(frames: np.ndarray) -> np.ndarray:
    """The square in the middle of `(T, H, W, ...)`."""
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    return frames[:, top : top + side, left : left + side]


def foreground_cells(colour: np.ndarray, strides: Strides) -> Tensor:
    """How much saturated colour each latent cell holds, 0..255: uint8 `(T, H, W)` of 0 and 1 to uint8 `(T', h, w)`."""
    frames, height, width = colour.shape
    cells = colour.reshape(frames, height // strides.h, strides.h, width // strides.w, strides.w).mean((2, 4))  # (T, h, w)
    if strides.t > 1:
        groups = cells[1:].reshape(-1, strides.t, *cells.shape[1:]).mean(1)
        cells = np.concatenate([cells[:1], groups])  # (T', h, w)
    return torch.from_numpy((cells * 255).round().astype(np.uint8))
