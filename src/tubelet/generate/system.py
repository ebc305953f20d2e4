"""A system: codec, denoiser and text encoder that were trained for each other, in one folder, loaded by name.

    worlds-64/
      system.json            what the parts are, native size, defaults, sha256 of every other file, how it was trained
      codec.safetensors      bf16, as the other two
      denoiser.safetensors
      text.safetensors       only for a text encoder that was trained along
      tokenizer.json         only for a text encoder that needs one

The digest is one hash over the parts' settings and the files' hashes: equal digests mean equal networks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tubelet import __version__
from tubelet.codecs import build_codec
from tubelet.codecs.base import Codec
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, sha256, write_json
from tubelet.core.types import Video
from tubelet.core.weights import load_tensors, save_tensors
from tubelet.diffusion.objectives import Prediction
from tubelet.generate.clip import Clip
from tubelet.generate.engine import Engine, Progress, Request, Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.runtime.cpu import accelerate, use_fast_attention
from tubelet.runtime.device import choose_device, has_bf16_instructions
from tubelet.tasks.edit import blend, edit
from tubelet.tasks.given import Given
from tubelet.text import TOKENIZER_FILE, build_text
from tubelet.text.base import TextEncoder
from tubelet.text.expand import Expander

FORMAT = 1
SYSTEM_FILE = "system.json"
CODEC_FILE, DENOISER_FILE, TEXT_FILE = "codec.safetensors", "denoiser.safetensors", "text.safetensors"
SHIPPED = Path(__file__).resolve().parent.parent / "weights"

DENOISERS: dict[str, tuple[type[Any], Callable[[Any], nn.Module]]] = {"spacetime": (SpacetimeConfig, Spacetime)}
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_RANDOM_FILLS = {
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "orthogonal_",
}
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """A catalogue name and the settings that build it."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SystemConfig:
    """The contents of `system.json`. `size` is the native (height, width); `files` maps file names to their sha256."""

    format: int
    name: str
    codec: Part
    denoiser: Part
    text: Part
    prediction: str
    size: tuple[int, int]
    frames: int
    fps: float
    defaults: Sampling
    files: dict[str, str]
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"system format {self.format} is not known, this tubelet reads {FORMAT}; update tubelet")
        if self.denoiser.name not in DENOISERS:
            raise UserError(f"there is no denoiser {self.denoiser.name!r}; choose one of {', '.join(DENOISERS)}")
        if self.prediction not in get_args(Prediction):
            raise UserError(f"there is no prediction {self.prediction!r}; choose one of {', '.join(get_args(Prediction))}")
        if not all(isinstance(name, str) and isinstance(value, str) for name, value in self.files.items()):
            raise UserError(f"the hashes in {SYSTEM_FILE} must be strings; restore it from its source")
        if not self.fps > 0:
            raise UserError(f"fps must be positive, got {self.fps}; correct it")

    @property
    def digest(self) -> str:
        """sha256 over the hashes of all files and the settings that decide what the networks compute, as hex."""
        parts = {n: to_dict(getattr(self, n)) for n in ("codec", "denoiser", "text", "prediction", "files")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class System:
    """Words to films. `config` says what it is, `engine` holds the networks, `dtype` the precision they compute in."""

    config: SystemConfig
    engine: Engine
    dtype: torch.dtype = torch.float32

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

        `loop`: a film without a first frame, whose last leads to its first. `expander` rewrites the prompt into the kind of
        caption the model was trained on; both are kept in the settings.
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
        into: Video | None = None,
        expander: Expander | None = None,
    ) -> Clip:
        """A film made again by words from `film` (one, of a size that fits the system): near strength 0 it stays, at 1 only the
        words count. `into`: a second film of the same size; the first turns into it.

        Raises UserError as `generate`, and when the films do not fit.
        """
        latents = [self._encoded(one) for one in (film, into) if one is not None]  # (1, C, T, H, W) each
        given = edit(latents[0], strength) if into is None else blend(latents[0], latents[1], strength)
        return self._batch(
            [prompt],
            [seed],
            film.size,
            film.frames,
            {"steps": steps, "guidance": guidance},
            expander,
            1,
            progress,
            given=given,
            task={"task": "edit" if into is None else "blend", "strength": strength},
        )[0]

    def _encoded(self, film: Video) -> Tensor:
        if len(film) != 1:
            raise UserError(f"one film is edited at a time, got {len(film)}; give them one by one")
        self.engine.latent_shape(film.size, film.frames)
        with torch.inference_mode():
            return self.codec.encode(film.pixels.to(self.device)).float()  # (1, C, T, H, W)

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
        length = self.config.frames if frames is None else frames
        return self._batch(prompts, seeds, size or self.config.size, length, chosen, expander, batch, progress, loop=loop)

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
        sampling = replace(self.config.defaults, **{name: value for name, value in chosen.items() if value is not None})
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError('the prompt is empty; say what to show, for example "a red ball bounces"')
        texts = [expander.expand(prompt).text if expander is not None else prompt for prompt in prompts]
        return self._clips(prompts, texts, seeds, size, frames, sampling, batch, progress, **task)

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
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts have {len(seeds)} seeds; give one seed per prompt")
        requests = [Request(text, seed) for text, seed in zip(texts, seeds, strict=True)]
        if len(size) != 2:
            raise UserError(f"size is (height, width), got {size!r}; give two numbers")
        pixels, timings = self.engine.sample(
            requests, size, frames, sampling, batch=batch, given=given, loop=loop, progress=progress
        )
        shares = {name: seconds / len(requests) for name, seconds in timings.items()}
        common = {
            "size": list(size),
            "frames": frames,
            "fps": self.config.fps,
            **to_dict(sampling),
            **({"loop": True} if loop else {}),
            **(task or {}),
            "system": self.name,
            "digest": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "version": __version__,
        }
        return [
            Clip(
                Video(film[None], self.config.fps),
                {"prompt": prompt, "text": request.text, "seed": request.seed, **common},
                shares,
            )
            for film, prompt, request in zip(pixels, prompts, requests, strict=True)
        ]


def shipped() -> list[str]:
    """Names of the systems that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SYSTEM_FILE}"))


def load(name_or_path: str | Path, device: str = "auto", dtype: str | None = None) -> System:
    """A system by shipped name or by folder, ready to generate.

    `dtype` "float32" or "bfloat16" is the precision of the networks; by default bfloat16 where the device computes in it.
    Every file is verified by its sha256. Raises UserError for an unknown name, a missing, truncated or altered file.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    folder = find(name_or_path)
    config = read_config(folder)
    _verify(folder, config)
    place = choose_device(device)
    precision = DTYPES[dtype] if dtype is not None else default_dtype(place)
    if place.type == "cpu" and precision == torch.bfloat16:
        use_fast_attention()
    codec = _quick(lambda: build_codec(config.codec.name, config.codec.config))
    codec = _filled(codec, folder / CODEC_FILE, place, precision)
    config_class, build = DENOISERS[config.denoiser.name]
    settings = from_dict(config_class, config.denoiser.config)
    denoiser = _filled(_quick(lambda: build(settings)), folder / DENOISER_FILE, place, precision)
    if TEXT_FILE in config.files:
        text = _filled(
            _quick(lambda: build_text(config.text.name, config.text.config, folder)), folder / TEXT_FILE, place, precision
        )
    else:
        text = build_text(config.text.name, config.text.config, folder).to(place).eval()
    if place.type == "cpu":
        for network in (codec, denoiser, text):
            accelerate(network)
    return System(config, _engine(codec, denoiser, text, config.prediction), precision)


def find(name_or_path: str | Path) -> Path:
    """The folder of a system. Raises UserError that lists the shipped names when there is none."""
    by_name = SHIPPED / name_or_path if "/" not in str(name_or_path) and str(name_or_path) not in ("", ".", "..") else None
    for folder in (by_name, Path(name_or_path)):
        if folder is not None and (folder / SYSTEM_FILE).is_file():
            return folder
    if Path(name_or_path).is_dir() and str(name_or_path):
        raise UserError(f"{name_or_path} holds no {SYSTEM_FILE}; name the folder of a system")
    names = ", ".join(shipped()) or "none yet"
    raise UserError(f"there is no system {str(name_or_path)!r}; shipped are: {names}; or give the folder of your own")


def read_config(folder: str | Path) -> SystemConfig:
    """A folder's `system.json`. Raises UserError when it is missing, broken, or of another format."""
    path = Path(folder) / SYSTEM_FILE
    values = read_json(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must hold an object; restore it from its source")
    return from_dict(SystemConfig, values)


def save_system(
    folder: str | Path,
    *,
    name: str,
    codec: tuple[str, Codec],
    denoiser: tuple[str, nn.Module],
    text: tuple[str, TextEncoder],
    size: tuple[int, int],
    frames: int,
    fps: float,
    prediction: Prediction = "skip",
    defaults: Sampling | None = None,
    training: Mapping[str, Any] | None = None,
) -> SystemConfig:
    """Write a system's folder: weights in bf16, buffers (such as latent statistics) as they are. Returns its config.

    Each part is (catalogue name, module with `.config`); a text encoder with a tokenizer brings its file along, a frozen one is
    found again by its config. `training` is any JSON summary: data, steps, cost, scores. `system.json` is written last, so
    that a folder with one is whole. Raises UserError when weights are not finite or the folder cannot be written.
    """
    folder = Path(folder)
    weights: dict[str, nn.Module] = {CODEC_FILE: codec[1], DENOISER_FILE: denoiser[1]}
    if text[1].trainable:
        weights[TEXT_FILE] = text[1]
    for file, module in weights.items():
        save_tensors(folder / file, _narrowed(module, file))
    names = list(weights)
    tokenizer = getattr(text[1], "tokenizer", None)
    if tokenizer is not None and hasattr(tokenizer, "save"):
        tokenizer.save(folder / TOKENIZER_FILE)
        names.append(TOKENIZER_FILE)
    config = SystemConfig(
        format=FORMAT,
        name=name,
        codec=Part(codec[0], to_dict(codec[1].config)),
        denoiser=Part(denoiser[0], to_dict(denoiser[1].config)),
        text=Part(text[0], to_dict(text[1].config)),
        prediction=prediction,
        size=size,
        frames=frames,
        fps=fps,
        defaults=defaults or Sampling(),
        files={file: sha256(folder / file) for file in sorted(names)},
        training=dict(training or {}),
    )
    write_json(folder / SYSTEM_FILE, to_dict(config))
    return config


def regenerate(settings: Mapping[str, Any], system: System | None = None, *, progress: Progress | None = None) -> Clip:
    """Make a clip again from the settings that its file carries (`clip.read_settings`): byte for byte on the same machine.

    Without `system` the one that the settings name is loaded, in the precision they state. Raises UserError when
    the digests differ or settings are missing or of the wrong kind.
    """
    wanted = from_dict(_Recorded, {k: v for k, v in settings.items() if k in _Recorded.__dataclass_fields__})
    if wanted.task != "text":
        raise UserError(f"the film was made from another film ({wanted.task}), which it does not hold; make it again from that")
    if system is None:
        system = load(wanted.system, dtype=wanted.dtype)
    if system.digest != wanted.digest:
        raise UserError(
            f"the film was made by {wanted.system} {wanted.digest[:12]}, this is {system.name} {system.digest[:12]}; "
            "give the system it was made by, or generate anew from its prompt"
        )
    if str(system.dtype) != f"torch.{wanted.dtype}":
        raise UserError(f"the film was computed in {wanted.dtype}, this system in {system.dtype}; load it with that dtype")
    sampling = Sampling(wanted.steps, wanted.guidance, wanted.interval, wanted.solver, wanted.shift)
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
    loop: bool = False
    task: str = "text"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it. Read, not timed: a trial would cost more than it saves one clip."""
    if device.type == "cuda" or (device.type == "cpu" and has_bf16_instructions()):
        return torch.bfloat16
    return torch.float32


def _engine(codec: Codec, denoiser: nn.Module, text: TextEncoder, prediction: str) -> Engine:
    patch = getattr(denoiser.config, "patch", (1, 1, 1))
    return Engine(codec, denoiser, text, prediction, patch)  # type: ignore[arg-type]


def _verify(folder: Path, config: SystemConfig) -> None:
    needed = {CODEC_FILE, DENOISER_FILE} - set(config.files)
    if needed:
        raise UserError(f"{folder / SYSTEM_FILE} lists no {sorted(needed)[0]}; restore it from its source")
    for file, expected in config.files.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{path} is missing; restore it from its source")
        if sha256(path) != expected:
            raise UserError(
                f"{path} is truncated or altered (its sha256 is not the one in {SYSTEM_FILE}); restore it from its source"
            )


def _narrowed(module: nn.Module, file: str) -> dict[str, Tensor]:
    """Parameters in bf16, buffers as they are: statistics stay exact."""
    parameters = {name for name, _ in module.named_parameters()}
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{name} of {file} is not finite; save an earlier checkpoint")
    return {name: value.to(torch.bfloat16) if name in parameters else value for name, value in state.items()}


def _quick(build: Callable[[], ModuleT]) -> ModuleT:
    """Build without memory or random numbers; the weights come from a file."""
    with torch.device("meta"), _Unfilled():
        return build()


class _Unfilled(TorchFunctionMode):
    """Random filling does nothing. On the meta device it would have no effect, but import the compiler: 1.5 s."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _filled(module: ModuleT, path: Path, device: torch.device, dtype: torch.dtype) -> ModuleT:
    tensors = load_tensors(path)
    parameters = dict(module.named_parameters())
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(tensors)) + [
        n for n in set(expected) & set(tensors) if expected[n].shape != tensors[n].shape
    ]
    if wrong:
        raise UserError(f"{path} does not fit the settings in {SYSTEM_FILE} ({wrong[0]}); restore both from their source")
    for name, value in tensors.items():
        value = value.to(device, dtype) if name in parameters else value.to(device)
        if expected[name].ndim == 4 and not expected[name].is_contiguous():
            value = value.contiguous(memory_format=torch.channels_last)
        tensors[name] = value
    module.load_state_dict(tensors, assign=True)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()]), "a buffer is neither saved nor computed"
    return module.requires_grad_(False).eval()
