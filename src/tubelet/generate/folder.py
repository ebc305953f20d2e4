"""The folder of a system: codec, denoiser and text encoder that were trained for each other, in one folder, loaded by name.

    worlds-64/
      system.json            what the parts are, native size, defaults, sha256 of every other file, how it was trained
      codec.safetensors      bf16, as the other two
      denoiser.safetensors   or, where it would be larger than PIECE, denoiser-1.safetensors, denoiser-2.safetensors, ...
      text.safetensors       only for a text encoder that was trained along
      tokenizer.json         only for a text encoder that needs one

The digest is one hash over the parts' settings and the files' hashes: equal digests mean equal networks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tubelet.codecs.base import Codec
from tubelet.core.config import from_file, to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import sha256, write_json
from tubelet.core.weights import load_tensors, save_tensors
from tubelet.diffusion.objectives import Prediction
from tubelet.generate.engine import Sampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text import TOKENIZER_FILE
from tubelet.text.base import TextEncoder

FORMAT = 1
SYSTEM_FILE = "system.json"
CODEC_FILE, DENOISER_FILE, TEXT_FILE = "codec.safetensors", "denoiser.safetensors", "text.safetensors"
PIECE = 15 * 2**20
"""Bytes that a file of weights has at most, where no tensor alone has more: large ones are a burden to a repository."""
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
    expander: str | None = None
    """Whose rules make of a prompt a caption of the kind that the system was trained on: "worlds", or nobody's."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise UserError(f"system format {self.format} is not known, this tubelet reads {FORMAT}; update tubelet")
        if self.denoiser.name not in DENOISERS:
            raise UserError(f"there is no denoiser {self.denoiser.name!r}; choose one of {', '.join(DENOISERS)}")
        if self.prediction not in get_args(Prediction):
            raise UserError(f"there is no prediction {self.prediction!r}; choose one of {', '.join(get_args(Prediction))}")
        if not all(isinstance(name, str) and isinstance(value, str) for name, value in self.files.items()):
            raise UserError(f"the hashes in {SYSTEM_FILE} must be strings; restore it from its source")
        if self.expander not in (None, "worlds"):
            raise UserError(f"there is no expander {self.expander!r}; write worlds, or null for none")
        if not self.fps > 0:
            raise UserError(f"fps must be positive, got {self.fps}; correct it")

    @property
    def digest(self) -> str:
        """sha256 over the hashes of all files and the settings that decide what the networks compute, as hex."""
        parts = {n: to_dict(getattr(self, n)) for n in ("codec", "denoiser", "text", "prediction", "files")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shipped() -> list[str]:
    """Names of the systems that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SYSTEM_FILE}"))


def find(name_or_path: str | Path) -> Path:
    """The folder of a system. Raises UserError that lists the shipped names when there is none."""
    if not isinstance(name_or_path, (str, Path)):
        raise UserError(f"a system is named by words or by its folder, got {name_or_path!r}; give one of these")
    by_name = SHIPPED / name_or_path if "/" not in str(name_or_path) and str(name_or_path) not in ("", ".", "..") else None
    with contextlib.suppress(OSError):  # a name that is too long, for one, is nobody's
        for folder in (by_name, Path(name_or_path)):
            if folder is not None and (folder / SYSTEM_FILE).is_file():
                return folder
        if Path(name_or_path).is_dir() and str(name_or_path):
            inside = Path(name_or_path) / "system"
            remedy = f"{inside} does, so name that" if (inside / SYSTEM_FILE).is_file() else "name the folder of a system"
            raise UserError(f"{name_or_path} holds no {SYSTEM_FILE}; {remedy}")
    names = ", ".join(shipped()) or "none yet"
    raise UserError(f"there is no system {str(name_or_path)!r}; shipped are: {names}; or give the folder of your own")


def read_config(folder: str | Path) -> SystemConfig:
    """A folder's `system.json`. Raises UserError when it is missing, broken, or of another format."""
    return from_file(SystemConfig, Path(folder) / SYSTEM_FILE)


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
    expander: str | None = None,
) -> SystemConfig:
    """Write a system's folder: weights in bf16, buffers (such as latent statistics) as they are. Returns its config.

    Each part is (catalogue name, module with `.config`); a text encoder with a tokenizer brings its file along, a frozen one is
    found again by its config. `training` is any JSON summary: data, steps, cost, scores. `expander` as in `SystemConfig`.
    `system.json` is written last, so that a folder with one is whole. Raises UserError when weights are not finite or the
    folder cannot be written.
    """
    folder = Path(folder)
    weights = {CODEC_FILE: _narrowed(codec[1], CODEC_FILE), DENOISER_FILE: _narrowed(denoiser[1], DENOISER_FILE)}
    if text[1].trainable:
        weights[TEXT_FILE] = _narrowed(text[1], TEXT_FILE)
    with contextlib.suppress(OSError):  # where nothing can be written, the first file says so
        (folder / SYSTEM_FILE).unlink(missing_ok=True)  # of a system that was saved here before: it is no longer whole
    names: list[str] = []
    for file, tensors in weights.items():
        names += _save_pieces(folder / file, tensors)
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
        expander=expander,
    )
    write_json(folder / SYSTEM_FILE, to_dict(config))
    return config


def verify(folder: Path, config: SystemConfig) -> None:
    for file in (CODEC_FILE, DENOISER_FILE):
        if not pieces(config, file):
            raise UserError(f"{folder / SYSTEM_FILE} lists no {file}; restore it from its source")
    for file, expected in config.files.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{path} is missing; restore it from its source")
        if sha256(path) != expected:
            raise UserError(
                f"{path} is truncated or altered (its sha256 is not the one in {SYSTEM_FILE}); restore it from its source"
            )


def pieces(config: SystemConfig, file: str) -> list[str]:
    """The files that hold a part's weights: `file` itself, or its numbered pieces; none where there are none."""
    stem, suffix = file.split(".")
    return [name for name in sorted(config.files) if re.fullmatch(rf"{stem}(-\d+)?\.{suffix}", name)]


def _save_pieces(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write a part's weights, in several files where they are larger than PIECE; returns the files' names."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        entry = value.nbytes + len(name) + 128  # its line in the header included
        if parts[-1] and size + entry > PIECE:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += entry
    files = [path] if len(parts) == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        save_tensors(file, part)
    for old in path.parent.glob(f"{path.stem}*{path.suffix}"):
        if re.fullmatch(rf"{path.stem}(-\d+)?", old.stem) and old not in files:
            old.unlink()  # of a system that was saved here before
    return [file.name for file in files]


def _narrowed(module: nn.Module, file: str) -> dict[str, Tensor]:
    """Parameters in bf16, buffers as they are: statistics stay exact."""
    parameters = {name for name, _ in module.named_parameters()}
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{name} of {file} is not finite; save an earlier checkpoint")
    return {name: value.to(torch.bfloat16) if name in parameters else value for name, value in state.items()}


def quick(build: Callable[[], ModuleT], what: str = "the network") -> ModuleT:
    """Build without memory or random numbers; the weights come from a file. Raises UserError for sizes that none holds."""
    try:
        with torch.device("meta"), _Unfilled():
            return build()
    except (MemoryError, OverflowError, RuntimeError) as error:  # what is computed, not loaded, takes memory
        why = str(error).partition("\n")[0]
        raise UserError(f"{what} cannot be built in its sizes ({why}); restore its settings from their source") from error


class _Unfilled(TorchFunctionMode):
    """Random filling does nothing. On the meta device it would have no effect, but import the compiler: 1.5 s."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def filled(module: ModuleT, paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> ModuleT:
    tensors = {name: value for path in paths for name, value in load_tensors(path).items()}
    parameters = dict(module.named_parameters())
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(tensors)) + [
        n for n in set(expected) & set(tensors) if expected[n].shape != tensors[n].shape
    ]
    if wrong:
        raise UserError(f"{paths[0]} does not fit the settings in {SYSTEM_FILE} ({wrong[0]}); restore both from their source")
    for name, value in tensors.items():
        value = value.to(device, dtype) if name in parameters else value.to(device)
        if expected[name].ndim == 4 and not expected[name].is_contiguous():
            value = value.contiguous(memory_format=torch.channels_last)
        tensors[name] = value
    module.load_state_dict(tensors, assign=True)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()]), "a buffer is neither saved nor computed"
    return module.requires_grad_(False).eval()
