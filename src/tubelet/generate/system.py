"""A system: codec, denoiser and text encoder that were trained for each other, and every way to make films with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet import __version__
from tubelet.codecs import build_codec
from tubelet.codecs.base import Codec
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError, whole
from tubelet.core.log import warn
from tubelet.core.types import Video
from tubelet.generate.clip import Clip
from tubelet.generate.engine import Engine, Progress, Request, Sampling, checked_prompt, checked_size
from tubelet.generate.folder import (
    CODEC_FILE,
    DENOISER_FILE,
    DENOISERS,
    DTYPES,
    SYSTEM_FILE,
    TEXT_FILE,
    TOKENIZER_FILE,
    SystemConfig,
    filled,
    find,
    pieces,
    quick,
    read_config,
    verify,
)
from tubelet.generate.roll import roll
from tubelet.runtime.cpu import accelerate, use_fast_attention
from tubelet.runtime.device import choose_device, has_bf16_instructions
from tubelet.tasks.edit import blend, edit, resized
from tubelet.tasks.given import Given
from tubelet.tasks.region import inpaint, put_back
from tubelet.tasks.timeline import Span, place, plan
from tubelet.text import build_text
from tubelet.text.base import TextEncoder
from tubelet.text.expand import Expander, RuleExpander

EDITS_GUIDED = 1.5
"""How much more strongly than films from words alone edits are guided: what stays of the film speaks against the words."""


@dataclass(frozen=True)
class Shot:
    """A stretch of a film: its words, its length in frames, and the pictures (clips of one frame) that stand in it, by frame.

    Negative frames count from the end, as indices do: `{0: first, -1: last}`. A shot goes on from the one before, unless it has
    a first picture or `cut` says that it begins anew: words that name other things than the shot before are followed then.
    """

    prompt: str
    frames: int
    pictures: Mapping[int, Video] = field(default_factory=dict)
    cut: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise UserError(f"a shot lasts a whole number of frames from 1 on, got {self.frames!r}; correct it")
        for picture in self.pictures.values():
            if picture.frames != 1 or len(picture) != 1:
                raise UserError(f"a picture in a shot is a clip of one frame, got {picture.frames}; give one frame of it")

    def at(self, frame: int) -> int:
        """A frame of the shot, counted from its beginning. Raises UserError when it has no such frame."""
        if not -self.frames <= frame < self.frames:
            raise UserError(f"a shot of {self.frames} frames has no frame {frame} for a picture; give one that it has")
        return frame % self.frames


@dataclass(frozen=True)
class Rolling:
    """How a film longer than the network sees at once is made: latent frames seen together (`window`, 0: as many as the system
    was trained on), how many known ones each window looks back on at least (`overlap`, 0: a third of the window), the noise
    level at which one that looks back on those that were made is shown all it knows (`haze`), and how far before it the film's
    first frame stays in sight (`sink`, 0: not)."""

    window: int = 0
    overlap: int = 0
    haze: float = 0.0
    sink: int = 0

    def __post_init__(self) -> None:
        if self.window < 0 or self.overlap < 0 or self.sink < 0 or not 0 <= self.haze < 1:
            raise UserError("rolling needs a window and a sink from 0, an overlap from 0 and a haze in [0, 1); correct it")


@dataclass(frozen=True)
class System:
    """Words to films. `config` says what it is, `engine` holds the networks, `dtype` the precision they compute in."""

    config: SystemConfig
    engine: Engine
    dtype: torch.dtype = torch.float32
    expander: Expander | None = None
    """Rewrites every prompt, where a call brings no expander of its own."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def digest(self) -> str:
        return self.config.digest

    @property
    def codec(self) -> Codec:
        return self.engine.codec

    @property
    def denoiser(self) -> nn.Module:
        return self.engine.denoiser

    @property
    def text(self) -> TextEncoder:
        return self.engine.text

    @property
    def device(self) -> torch.device:
        return next(self.engine.denoiser.parameters()).device

    def generate(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        *,
        solver: str | None = None,
        expander: Expander | None = None,
        loop: bool = False,
    ) -> Clip:
        """One film that shows the prompt. What is left out comes from the system's defaults; `size` is (height, width).

        A film longer than the system's own (`config.frames`) is made in rolling windows, as `film` makes it.
        `loop`: a film without a first frame, whose last leads to its first, made at once. `expander` rewrites the prompt into
        the kind of caption the model was trained on; both are kept in the settings.
        Words beyond what the text encoder reads do not count; a warning says so.
        Raises UserError for an empty prompt and for sizes, frames, steps, guidance or a solver that cannot be.
        """
        return self.generate_batch(
            [prompt],
            [seed],
            size=size,
            frames=frames,
            steps=steps,
            guidance=guidance,
            progress=progress,
            solver=solver,
            expander=expander,
            loop=loop,
        )[0]

    def film(
        self,
        shots: Sequence[Shot],
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        *,
        solver: str | None = None,
        past: Video | None = None,
        future: Video | None = None,
        rolling: Rolling | None = None,
        expander: Expander | None = None,
    ) -> Clip:
        """One film of shots, each with its words, its length and the pictures that stand in it, between `past` and `future`.

        One mechanism for many tasks: a shot with a first picture is image to video; with a first and a last one, a film between
        two pictures; a shot with a `past` is an extension, with a `future` one backward, with both a connection; several shots
        are a storyboard; a long shot is made in rolling windows. What is known comes out as it went in.
        Raises UserError as `generate`, and when pictures or clips do not fit.
        """
        if not shots:
            raise UserError("a film needs at least one shot; say what it shows and for how many frames")
        size = size if size is None else checked_size(size)
        sampling = self._chosen({"steps": steps, "guidance": guidance, "solver": solver})
        texts = self._texts([shot.prompt for shot in shots], expander)
        return self._film(shots, texts, size, seed, sampling, past, future, rolling or Rolling(), progress)

    def edit(
        self,
        film: Video,
        prompt: str,
        strength: float = 0.6,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        *,
        size: tuple[int, int] | None = None,
        into: Video | None = None,
        expander: Expander | None = None,
    ) -> Clip:
        """A film made again by words from `film` (one, of a size that fits the system): near strength 0 it stays, at 1 only the
        words count. `into`: a second film of the same size; the first turns into it. `size`: make it so large; the small film
        says where things are, the network how they look (its latents are resized, noised and denoised).

        Below strength 1 guidance acts down to the end, wherever the system's interval begins, since less noise than that is all
        that an edit starts from, and `EDITS_GUIDED` times as strongly unless it is said. Raises UserError as `generate`, and
        when the films do not fit.
        """
        latents = [self._encoded(one) for one in (film, into) if one is not None]  # (1, C, T, H, W) each
        size = film.size if size is None else size
        shape = self.engine.latent_shape(size, film.frames)
        latents = [resized(one, (shape[2], shape[3])) for one in latents]
        given = edit(latents[0], strength) if into is None else blend(latents[0], latents[1], strength)
        low, high = self.config.defaults.interval
        if guidance is None and strength < 1:
            guidance = EDITS_GUIDED * self.config.defaults.guidance
        return self._batch(
            [prompt],
            [seed],
            size,
            film.frames,
            {"steps": steps, "guidance": guidance, "interval": (0.0 if strength < 1 else low, high)},
            expander,
            1,
            progress,
            given=given,
            task={"task": "edit" if into is None else "blend", "strength": strength},
        )[0]

    def inpaint(
        self,
        film: Video,
        mask: Tensor,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        *,
        expander: Expander | None = None,
    ) -> Clip:
        """`film` with what the mask `(T, H, W)` covers (above .5) made by words; the rest stays, pixel by pixel.

        `tubelet.tasks.region.around` makes a film and a mask of this kind for outpainting.
        Raises UserError as `generate`, and when the mask has another size or covers nothing.
        """
        mask = torch.as_tensor(mask)
        if mask.ndim != 3:
            raise UserError(f"a mask is (T, H, W), one value per pixel, got {tuple(mask.shape)}; give one for every frame")
        latents = self._encoded(film)  # (1, C, T, H, W)
        given = inpaint(latents, mask[None].to(latents.device), self.codec.strides)
        if bool((given.mask > 0).all()) and bool((mask <= 0.5).any()):
            height, width = self.codec.strides.h, self.codec.strides.w
            warn(
                f"no cell of {height}x{width} pixels lies wholly in what is to stay, so the model sees nothing of it; "
                "leave more of the film, or move the edge to a multiple of these"
            )
        clip = self._batch(
            [prompt],
            [seed],
            film.size,
            film.frames,
            {"steps": steps, "guidance": guidance},
            expander,
            1,
            progress,
            given=given,
            task={"task": "inpaint"},
        )[0]
        pixels = put_back(clip.video.pixels, film.pixels, (mask[None] > 0.5).float())
        return replace(clip, video=replace(clip.video, pixels=pixels))

    def _encoded(self, film: Video, later: bool = False) -> Tensor:
        """Latents `(1, C, T', h, w)`. `later`: of a clip that does not begin its film, so that no latent is of its first frame
        alone."""
        if len(film) != 1:
            raise UserError(f"one film is worked on at a time, got {len(film)}; give them one by one")
        stride = self.codec.strides.t
        if not later or stride == 1:
            return self.engine.encode(film.pixels)
        if film.frames % stride:
            raise UserError(
                f"a clip inside a film must have a multiple of {stride} frames, got {film.frames}; give more or fewer"
            )
        return self.engine.encode(torch.cat([film.pixels[:, :, :1], film.pixels], 2))[:, :, 1:]

    def _pictured(self, picture: Video, frame: int) -> tuple[int, Tensor]:
        """The latent frame that a picture at `frame` stands in, and its latents `(1, C, 1, h, w)`.

        A latent frame of several frames is known as a whole or not at all: the picture is held for all of them.
        """
        stride = self.codec.strides.t
        if frame == 0 or stride == 1:
            return frame, self._encoded(picture)
        held = picture.pixels.expand(-1, -1, 1 + self.engine.strides.t, -1, -1)  # (1, 3, 1 + t, H, W)
        return 1 + (frame - 1) // stride, self.engine.encode(held)[:, :, -1:]

    def _film(
        self,
        shots: Sequence[Shot],
        texts: Sequence[str],
        size: tuple[int, int] | None,
        seed: int,
        sampling: Sampling,
        past: Video | None,
        future: Video | None,
        rolling: Rolling,
        progress: Progress | None,
    ) -> Clip:
        size = self.config.size if size is None else size
        seed = Request(texts[0], seed).seed  # checked before anything is encoded
        self._check_past(past)
        clips = [(0, past)] if past is not None else []
        pictures: list[tuple[int, Video]] = []
        begins = [0 if past is None else past.frames]
        for shot in shots:
            pictures += [(begins[-1] + shot.at(frame), picture) for frame, picture in shot.pictures.items()]
            begins.append(begins[-1] + shot.frames)
        clips += [(begins[-1], future)] if future is not None else []
        known = clips + pictures
        frames = begins[-1] + (0 if future is None else future.frames)
        shape = self.engine.latent_shape(size, frames)
        cells = [self._cell(begin) for begin in begins]
        spans = [
            Span(begin, end, (shot.cut or 0 in shot.pictures) and begin > 0)
            for begin, end, shot in zip(cells[:-1], cells[1:], shots, strict=True)
        ]
        for _, clip in known:
            if clip.frames > 1 and abs(clip.fps - (fps := self.config.fps)) > 1e-3:
                raise UserError(f"a known clip has {clip.fps:g} frames a second, the film {fps:g}; decode it with fps={fps:g}")
            if clip.size != size:
                raise UserError(f"the film is {size[0]}x{size[1]}, a known clip {clip.size[0]}x{clip.size[1]}; fit it")
        parts = [(self._cell(begin), self._encoded(clip, later=begin > 0)) for begin, clip in clips]
        parts += [self._pictured(picture, frame) for frame, picture in pictures]
        parts = parts or [(0, torch.empty(1, shape[0], 0, *shape[2:], device=self.device))]
        if rolling.sink and self.engine.patch[0] > 1:
            raise UserError(
                f"this model reads {self.engine.patch[0]} frames as one, so a first frame cannot stay in sight; leave sink"
            )
        timeline = place(parts, shape[1])
        window = rolling.window or self.codec.strides.latent_shape(self.config.frames, *size)[0]
        windows = plan(timeline.known, spans, window, rolling.overlap or max(1, window // 3), rolling.sink)
        timings = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        latents = roll(
            self.engine, texts, seed, timeline, windows, sampling, haze=rolling.haze, progress=progress, timings=timings
        )
        pixels = self.engine.decode(latents, timings).clone()  # (1, 3, T, H, W)
        for begin, clip in known:
            pixels[:, :, begin : begin + clip.frames] = clip.pixels
        words = {
            "prompt": " | ".join(shot.prompt for shot in shots),
            "text": " | ".join(texts),
            "shots": [[shot.prompt, text, shot.frames] for shot, text in zip(shots, texts, strict=True)],
            "cuts": [number for number, shot in enumerate(shots) if shot.cut],
            "rolling": to_dict(rolling),
            "task": "known" if known else "film",
        }
        settings = {**words, "seed": seed, **self._settings(size, frames, sampling)}
        return Clip(Video(pixels, self.config.fps), settings, timings)

    def _check_past(self, past: Video | None) -> None:
        """Raises UserError when a film ends inside of a latent frame."""
        stride = self.codec.strides.t
        if past is not None and (left := (past.frames - 1) % stride):
            fewer = past.frames - left
            raise UserError(
                f"this system knows {stride} frames only together, so a film of {past.frames} frames cannot go on from its "
                f"end; keep {fewer} of them ({fewer / self.config.fps:g} seconds), and make a multiple of {stride}"
            )

    def _cell(self, frame: int) -> int:
        """The latent frame that begins at a frame of the film. Raises UserError when none does."""
        stride = self.codec.strides.t
        if frame and (frame - 1) % stride:
            raise UserError(f"a shot, clip or picture must begin at frame 1 + a multiple of {stride}, not {frame}; move it")
        return 0 if frame == 0 else 1 + (frame - 1) // stride

    def generate_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        expander: Expander | None = None,
        batch: int = 8,
        loop: bool = False,
        progress: Progress | None = None,
    ) -> list[Clip]:
        """A film for each pair of prompt and seed, as `generate` would make it up to float rounding.

        `batch` samples run together; the clips' timings are the whole call's, divided evenly. Raises UserError as `generate`.
        """
        chosen = {"steps": steps, "guidance": guidance, "solver": solver}
        length = self.config.frames if frames is None else whole("frames", frames)
        size = self.config.size if size is None else checked_size(size)
        if length > self.config.frames and not loop:
            _check_seeds(prompts, seeds)
            parts = [_part(progress, place, len(seeds)) for place in range(len(seeds))]
            return [
                self.film([Shot(prompt, length)], size, seed, progress=part, expander=expander, **chosen)
                for prompt, seed, part in zip(prompts, seeds, parts, strict=True)
            ]
        return self._batch(prompts, seeds, size, length, chosen, expander, batch, progress, loop=loop)

    def _batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        size: tuple[int, int],
        frames: int,
        chosen: Mapping[str, Any],
        expander: Expander | None,
        batch: int,
        progress: Progress | None,
        **task: Any,
    ) -> list[Clip]:
        """Prompts as the user gave them, and those of the sampler's settings that he chose; `task` as in `_clips`."""
        texts = self._texts(prompts, expander)
        return self._clips(prompts, texts, seeds, size, frames, self._chosen(chosen), batch, progress, **task)

    def _chosen(self, chosen: Mapping[str, Any]) -> Sampling:
        return replace(self.config.defaults, **{name: value for name, value in chosen.items() if value is not None})

    def _texts(self, prompts: Sequence[str], expander: Expander | None) -> list[str]:
        for prompt in prompts:
            checked_prompt(prompt)
        expander = expander or self.expander
        texts = [expander.expand(prompt).text if expander is not None else prompt for prompt in prompts]
        if any(self.text.truncated(text) for text in texts):
            warn("these are more words than the model reads; the last ones do not count")
        return texts

    def _settings(self, size: tuple[int, int], frames: int, sampling: Sampling) -> dict[str, Any]:
        """What a clip's file says beside its words, seed and task."""
        return {
            "size": list(size),
            "frames": frames,
            "fps": self.config.fps,
            **to_dict(sampling),
            "system": self.name,
            "digest": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "version": __version__,
        }

    def _clips(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        seeds: Sequence[int],
        size: tuple[int, int],
        frames: int,
        sampling: Sampling,
        batch: int,
        progress: Progress | None,
        *,
        given: Given | None = None,
        loop: bool = False,
        task: Mapping[str, Any] | None = None,
    ) -> list[Clip]:
        """`task`: what the settings say beside the words of how the film was made."""
        _check_seeds(prompts, seeds)
        requests = [Request(text, seed) for text, seed in zip(texts, seeds, strict=True)]
        pixels, timings = self.engine.sample(
            requests, size, frames, sampling, batch=batch, given=given, loop=loop, progress=progress
        )
        shares = {name: seconds / len(requests) for name, seconds in timings.items()}
        common = {**self._settings(size, frames, sampling), **({"loop": True} if loop else {}), **(task or {})}
        return [
            Clip(
                Video(film[None], self.config.fps),
                {"prompt": prompt, "text": request.text, "seed": request.seed, **common},
                shares,
            )
            for film, prompt, request in zip(pixels, prompts, requests, strict=True)
        ]


def _check_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts have {len(seeds)} seeds; give one seed per prompt")


def _part(progress: Progress | None, place: int, count: int) -> Progress | None:
    """The progress of one film as that of `count` equal ones, of which `place` are made."""
    return None if progress is None else lambda done, steps: progress(place * steps + done, count * steps)


def expander_of(config: SystemConfig) -> Expander | None:
    """What makes of a prompt a caption of the kind that a system was trained on, where it names one."""
    if config.expander is None:
        return None
    from tubelet.worlds.expand import compose_dense, parse_scene

    return RuleExpander(parse_scene, compose_dense)


def load(name_or_path: str | Path, device: str = "auto", dtype: str | None = None) -> System:
    """A system by shipped name or by folder, ready to generate.

    `dtype` "float32" or "bfloat16" is the precision of the networks; by default bfloat16 where the device computes in it.
    Every file is verified by its sha256. Raises UserError for an unknown name, a missing, truncated or altered file.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    folder = find(name_or_path)
    config = read_config(folder)
    verify(folder, config)
    place = choose_device(device)
    precision = DTYPES[dtype] if dtype is not None else default_dtype(place)
    if place.type == "cpu" and precision == torch.bfloat16:
        use_fast_attention()
    files = {file: [folder / name for name in pieces(config, file)] for file in (CODEC_FILE, DENOISER_FILE, TEXT_FILE)}
    codec = quick(lambda: build_codec(config.codec.name, config.codec.config), f"the codec of {folder}")
    codec = filled(codec, files[CODEC_FILE], place, precision)
    config_class, build = DENOISERS[config.denoiser.name]
    settings = from_dict(config_class, config.denoiser.config)
    denoiser = filled(quick(lambda: build(settings), f"the denoiser of {folder}"), files[DENOISER_FILE], place, precision)
    if files[TEXT_FILE]:
        text = quick(lambda: build_text(config.text.name, config.text.config, folder), f"the text encoder of {folder}")
        text = filled(text, files[TEXT_FILE], place, precision)
    else:
        text = build_text(config.text.name, config.text.config, folder).to(place).eval()
    told = {TEXT_FILE: not text.trainable or files[TEXT_FILE]}
    told[TOKENIZER_FILE] = not hasattr(getattr(text, "tokenizer", None), "save") or TOKENIZER_FILE in config.files
    for file, there in told.items():
        if not there:  # what nobody has trained, or verified, would be read
            raise UserError(f"{folder / SYSTEM_FILE} lists no {file}; restore it from its source")
    if place.type == "cpu":
        for network in (codec, denoiser, text):
            accelerate(network)
    return System(config, _engine(codec, denoiser, text, config.prediction), precision)


def regenerate(settings: Mapping[str, Any], system: System | None = None, *, progress: Progress | None = None) -> Clip:
    """Make a clip again from the settings that its file carries (`clip.read_settings`): byte for byte on the same machine.

    Without `system` the one that the settings name is loaded, in the precision they state. Raises UserError when
    the digests differ or settings are missing or of the wrong kind.
    """
    try:
        wanted = from_dict(_Recorded, {k: v for k, v in settings.items() if k in _Recorded.__dataclass_fields__})
    except UserError as error:
        said = str(error).partition(";")[0].replace(_Recorded.__name__, "it", 1)
        raise UserError(f"the film's record is not whole ({said}); generate it anew from its words") from error
    if wanted.task not in ("text", "film"):
        raise UserError(
            f"the film was made from a picture or film ({wanted.task}), which it does not hold; make it again from that"
        )
    if system is None:
        system = load(wanted.system, dtype=wanted.dtype)
    if system.digest != wanted.digest:
        raise UserError(
            f"the film was made by {wanted.system} {wanted.digest[:12]}, this is {system.name} {system.digest[:12]}; "
            "give the system it was made by, or generate anew from its prompt"
        )
    if str(system.dtype) != f"torch.{wanted.dtype}":
        raise UserError(f"the film was computed in {wanted.dtype}, this system in {system.dtype}; load it with that dtype")
    sampling = Sampling(**{f.name: getattr(wanted, f.name) for f in fields(Sampling)})
    if wanted.task == "film":
        shots = [Shot(words, frames, cut=number in wanted.cuts) for number, (words, _, frames) in enumerate(wanted.shots)]
        texts = [text for _, text, _ in wanted.shots]
        return system._film(shots, texts, wanted.size, wanted.seed, sampling, None, None, wanted.rolling, progress)
    whole = (wanted.size, wanted.frames, sampling, 1, progress)
    clips = system._clips([wanted.prompt], [wanted.text], [wanted.seed], *whole, loop=wanted.loop)
    return clips[0]


@dataclass(frozen=True)
class _Recorded:
    prompt: str
    text: str
    seed: int
    size: tuple[int, int]
    frames: int
    steps: int
    guidance: float
    interval: tuple[float, float]
    solver: str
    shift: float
    system: str
    digest: str
    dtype: str
    tokens: int = 0
    eta: float = 1.0
    eta_above: float = 0.0
    loop: bool = False
    task: str = "text"
    shots: tuple[tuple[str, str, int], ...] = ()
    cuts: tuple[int, ...] = ()
    rolling: Rolling = field(default_factory=Rolling)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it. Read, not timed: a trial would cost more than it saves one clip."""
    if device.type == "cuda" or (device.type == "cpu" and has_bf16_instructions()):
        return torch.bfloat16
    return torch.float32


def _engine(codec: Codec, denoiser: nn.Module, text: TextEncoder, prediction: str) -> Engine:
    patch = getattr(denoiser.config, "patch", (1, 1, 1))
    return Engine(codec, denoiser, text, prediction, patch)  # type: ignore[arg-type]
