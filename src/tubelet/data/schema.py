"""The shape of one training record, and the check that a record has it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UserError

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
"""webdataset splits a member's name at its first dot, so a key has none; with its suffix it must fit in tar's 100 bytes."""

KNOWN: dict[str, tuple[torch.dtype | None, int]] = {
    "video": (torch.uint8, 4),  # (T, H, W, 3)
    "latent": (None, 4),  # (C, T, h, w), any float
    "foreground": (torch.uint8, 3),  # (T, h, w)
}
"""Tensors with a fixed meaning: dtype (None: any floating one) and number of dimensions. Other names are free."""


@dataclass(frozen=True)
class Record:
    """One clip or image: tensors by name and plain JSON facts.

    `meta["captions"]`, where present, is `[{"text": str, "kind": str, "source": str}, ...]`; `meta["fps"]` frames per second.
    """

    key: str
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def validate(record: Record) -> None:
    """Raises UserError that names the record and what is wrong with it."""

    def refuse(what: str) -> None:
        raise UserError(f"record {record.key!r} {what}; correct the record")

    if not KEY.fullmatch(record.key):
        refuse("has a key that is not 1 to 80 letters, digits, - or _")
    if not record.tensors:
        refuse("has no tensors")
    for name, tensor in record.tensors.items():
        if not isinstance(tensor, Tensor):
            refuse(f"has {name!r} as {type(tensor).__name__}, not as a tensor")
        if tensor.numel() == 0:
            refuse(f"has an empty tensor {name!r} {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            refuse(f"has values that are not finite in {name!r}")
        if name in KNOWN:
            dtype, dimensions = KNOWN[name]
            right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if not right or tensor.ndim != dimensions or (name == "video" and tensor.shape[-1] != 3):
                refuse(f"has {name!r} as {tensor.dtype} {tuple(tensor.shape)}")
    try:
        json.dumps(dict(record.meta), allow_nan=False)
    except (TypeError, ValueError) as error:
        refuse(f"has facts that are not plain JSON ({error})")
    captions = record.meta.get("captions", [])
    good = isinstance(captions, list) and all(
        isinstance(c, Mapping) and isinstance(c.get("text"), str) and isinstance(c.get("kind"), str) for c in captions
    )
    if not good or ("captions" in record.meta and not captions):
        refuse("has captions that are not a list of {text, kind, source} with at least one entry")
    fps = record.meta.get("fps", 1.0)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not fps > 0:
        refuse(f"has fps {fps!r}, which is not a positive number")
