"""Checkpoints that others have written: their settings read strictly, their weights brought under our names.

Settings are JSON, weights safetensors; a pickle is never opened. What a module of ours cannot follow is refused: a network
that is built almost as it was trained gives pictures that are almost right, which nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.files import read_json

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = "convert it to safetensors once, where you trust it (save_pretrained does so), and give that"


def told_by(path: Path, kinds: Collection[str], key: str = "_class_name") -> dict[str, Any]:
    """The settings in a JSON file that describes one of `kinds`. Raises UserError when it is missing, broken or of another."""
    told = read_json(path)
    if not isinstance(told, dict) or not isinstance(told.get(key), str):
        raise UserError(f"{path} does not say under {key} what it describes; restore it from its source")
    if told[key] not in kinds:
        raise UserError(f"{path} describes a {told[key]}; only {', '.join(sorted(kinds))} can be read, give a checkpoint of it")
    return told


def refuse_others(path: Path, told: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that our module cannot follow.

    `read`: names that the caller looks at, or that change nothing. `fixed`: names that have one value here. All others must be
    off, None or False.
    """
    for key, value in told.items():
        if key.startswith("_") or key in read:
            continue
        if key not in fixed and value is not None and value is not False:
            raise UserError(f"{path} sets {key} to {value!r}, which is not known here; take a checkpoint of the usual kind")
        if key in fixed and value != fixed[key]:
            raise UserError(
                f"{path} sets {key} to {value!r}, only {fixed[key]!r} can be followed; take a checkpoint of the usual kind"
            )


def part_of(folder: Path, name: str) -> Path:
    """The folder of a part. Raises UserError when it is missing."""
    if not (folder / name).is_dir():
        raise UserError(f"{folder} has no folder {name}; copy the whole checkpoint")
    return folder / name


def weights_of(folder: Path, stem: str) -> Path:
    """The file of weights, `stem.safetensors`. Raises UserError when there is none, with the remedy for what is there."""
    path = folder / f"{stem}.safetensors"
    if path.is_file():
        return path
    if (folder / f"{stem}.safetensors.index.json").is_file():
        raise UserError(
            f"the weights in {folder} lie in several files; save them as one (save_pretrained, max_shard_size='1TB')"
        )
    found = sorted(file for file in folder.glob("*") if file.suffix in (*PICKLES, ".safetensors"))
    if not found:
        raise UserError(f"{path} is missing; copy the whole checkpoint")
    for other in found:
        if other.suffix == ".safetensors":
            raise UserError(f"{folder} holds {other.name}, not {path.name}; rename it if it is the file you mean")
    raise UserError(f"{found[0]} is a pickle, which is never opened here; {CONVERT}")


def filled_from(
    module: ModuleT,
    found: Mapping[str, Tensor],
    theirs: Callable[[str], Sequence[str]],
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> ModuleT:
    """Fill a module, which may lie on the meta device, and freeze it. Returns it in evaluation mode.

    `theirs` gives for a name of ours those whose tensors, one below the other, are that parameter. A convolution whose kernel
    covers its stride is a linear here, over a patch with the channels fastest. Raises UserError when names, shapes or
    finiteness do not hold; `path` is what it names.
    """
    expected = module.state_dict()
    names = {ours: list(theirs(ours)) for ours in expected}
    wanted = {name for several in names.values() for name in several}
    missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    state, wrong = {}, []
    for ours, several in names.items():
        if missing:
            break
        flat = expected[ours].ndim == 2
        parts = [found[n].movedim(1, -1).flatten(1) if flat and found[n].ndim == 4 else found[n] for n in several]
        shape = (len(expected[ours]) // len(parts), *expected[ours].shape[1:])
        bad = [name for name, part in zip(several, parts, strict=True) if part.shape != shape]
        wrong += bad
        if not bad:
            state[ours] = torch.cat(parts).to(device, dtype)
    if missing or unknown or wrong:
        raise UserError(
            f"{path} does not fit its settings (missing {missing[:3]}, unknown {unknown[:3]}, wrong shape "
            f"{sorted(wrong)[:3]}); copy the whole checkpoint from one source"
        )
    broken = sorted(name for name, value in found.items() if not value.isfinite().all())
    if broken:
        raise UserError(f"{path} holds values that are not finite ({broken[:3]}); restore it from its source")
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()
