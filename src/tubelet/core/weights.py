"""Weights on disk: safetensors, read and written whole. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.files import whole_file

UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, OverflowError)
"""What reading a broken safetensors file raises: a header may hold shapes that the file format knows and torch does not."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under a temporary name, then rename."""
    with whole_file(path) as temporary:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, temporary, dict(metadata) if metadata else None)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError when it is missing, truncated or corrupt."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the name") from error
    except UNREADABLE as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); restore it from its source") from error


def save_module(path: str | Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state; `dtype` narrows floating tensors (shipped weights are bf16)."""
    state = module.state_dict()
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    save_tensors(path, state)


def load_module(path: str | Path, module: nn.Module) -> None:
    """Fill a module from a file, exactly. Raises UserError when names, shapes or finiteness do not hold."""
    tensors = load_tensors(path)
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or unknown or wrong:
        raise UserError(
            f"{path} does not fit {type(module).__name__} (missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shape {wrong[:3]}); load it with the config that it was saved with"
        )
    broken = [n for n, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite ({broken[:3]}); restore it from its source")
    module.load_state_dict(tensors)
