"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-NNNNNNNN` of safetensors and JSON files. It is written under a name that starts with a dot, every
file is synced, `manifest.json` with all sizes and sha256 sums comes last, then one rename makes it visible. A reader takes the
newest folder whose manifest holds; whatever a crash left behind is ignored and cleared by the next writer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.files import sha256
from tubelet.core.log import warn
from tubelet.core.weights import load_tensors

NAME = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. `tensors(part)` and `state()` read it."""

    path: Path
    step: int

    def tensors(self, part: str) -> dict[str, Tensor]:
        """One part's tensors by name, e.g. `model`, `ema`, `optimizer`, `random`."""
        return load_tensors(self.path / f"{part}.safetensors")

    def state(self) -> dict[str, Any]:
        """The JSON values."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Checkpoint:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises UserError when the folder cannot be written or the disk is full; every older checkpoint is then still there.
    """
    assert keep >= 1, "a checkpoint must outlive its own writing"
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        if whole(final):  # a run resumed at its very end: the same step of the same run is the same checkpoint
            return Checkpoint(final, step)
        temporary.mkdir()
        for part, tensors in parts.items():
            save_file(_separate(tensors), temporary / f"{part}.safetensors")
        (temporary / STATE).write_text(json.dumps(dict(state)) + "\n", encoding="utf-8")
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            _sync(temporary / name)
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in names}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():  # torn, so no reader wants it
            os.rename(final, folder / f".{final.name}.old.{os.getpid()}")
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint of step {step} in {folder} ({error}); make room or choose another folder, "
            "then run the same command again: the checkpoints before it are kept"
        ) from error
    others = [path for path in _folders(folder) if path != final]
    kept = [path for path in others if _sized(path)][: keep - 1]
    for old in [path for path in others if path not in kept]:  # a torn one takes no place of a whole one
        # Renamed first, so that a crash inside the removal leaves no half-empty folder under a checkpoint's name.
        with contextlib.suppress(OSError):
            os.rename(old, folder / f".{old.name}.old.{os.getpid()}")
    _clear(folder)
    return Checkpoint(final, step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in which every file has its size and sha256; torn ones are passed over. None when there is none.

    Raises UserError when there are some and every one is torn: to start anew would take the place of what may be repaired.
    """
    found = _folders(folder)
    for place, path in enumerate(found):
        if whole(path):
            match = NAME.fullmatch(path.name)
            assert match is not None
            if place:
                warn(f"{found[0]} is damaged; {path.name} is taken in its place")
            return Checkpoint(path, int(match[1]))
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged; restore one, or remove the folder to start anew")
    return None


def whole(path: Path) -> bool:
    """Whether a checkpoint folder is complete and unchanged."""
    return _holds(path, lambda file, entry: _as_long(file, entry) and sha256(file) == entry["sha256"])


def _sized(path: Path) -> bool:
    """Whether it has all its files, each of its length: told without reading them."""
    return _holds(path, _as_long)


def _as_long(file: Path, entry: Mapping[str, Any]) -> bool:
    return file.stat().st_size == entry["bytes"]


def _holds(path: Path, good: Callable[[Path, Mapping[str, Any]], bool]) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return STATE in files and all(good(path / name, entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def random_state(generator: torch.Generator) -> dict[str, Tensor]:
    """The state of a generator and of the global ones of torch, numpy and Python, as tensors."""
    _, words, place, has_gauss, cached = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "numpy.words": torch.from_numpy(np.asarray(words, dtype=np.uint32).astype(np.int64)),
        "numpy.place": torch.tensor([int(place), int(has_gauss)]),
        "numpy.gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "python.numbers": torch.tensor([version, *numbers], dtype=torch.int64),
        "python.gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor], generator: torch.Generator | None = None) -> None:
    """The inverse of `random_state`; without `generator` only the global ones."""
    if generator is not None:
        generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    place, has_gauss = state["numpy.place"].tolist()
    words = state["numpy.words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, place, has_gauss, state["numpy.gauss"].item()))
    version, *numbers = state["python.numbers"].tolist()
    gauss = state["python.gauss"].item()
    random.setstate((version, tuple(numbers), None if gauss != gauss else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def _clear(folder: Path) -> None:
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies where needed: tied weights share memory, which the file format has no word for."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in seen:
            value = value.clone()
        seen.add(storage)
        separate[name] = value
    return separate


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
