"""Ids that lead into a table: labels, words, codes. One past its end would be an error of the table, or another's row."""

from __future__ import annotations

import torch
from torch import Tensor

from tubelet.core.errors import UserError


def check_ids(what: str, ids: Tensor, count: int, least: int = 0) -> None:
    """Raises UserError when one of `ids (...)` is not from `least` up to `count` - 1.

    Looked at on a CPU alone, and not while torch compiles: an accelerator would wait for the answer.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < least or high >= count:
        wrong = low if low < least else high
        raise UserError(f"{what} are from {least} to {count - 1}, got {wrong}; correct them")
