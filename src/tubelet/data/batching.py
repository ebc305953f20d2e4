"""Records to batches: stacking of equal shapes, and buckets of equal shapes under a token budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tubelet.core.errors import UserError
from tubelet.data.schema import Record


def collate(records: Sequence[Record]) -> dict[str, Any]:
    """Stack records: tensors `(B, ...)` by name, `key` a list of B, `fps (B,)` where every record has it.

    Raises UserError when names or shapes differ.
    """
    assert records, "a batch has at least one record"
    first = records[0]
    for record in records[1:]:
        if record.tensors.keys() != first.tensors.keys():
            raise UserError(
                f"records {first.key!r} and {record.key!r} hold different tensors "
                f"({sorted(first.tensors)} and {sorted(record.tensors)}); keep such data apart"
            )
        for name, tensor in record.tensors.items():
            if tensor.shape != first.tensors[name].shape or tensor.dtype != first.tensors[name].dtype:
                raise UserError(
                    f"{name!r} is {tuple(first.tensors[name].shape)} in record {first.key!r} and {tuple(tensor.shape)} in "
                    f"{record.key!r}; use buckets of equal shapes"
                )
    batch: dict[str, Any] = {
        name: torch.stack([record.tensors[name] for record in records]) for name in first.tensors
    }  # (B, ...)
    batch["key"] = [record.key for record in records]
    if all("fps" in record.meta for record in records):
        batch["fps"] = torch.tensor([float(record.meta["fps"]) for record in records])  # (B,)
    return batch


def batch_size(shape: tuple[int, ...], count: int, budget: int | None, tokens_per_cell: float = 1.0) -> int:
    """How many items of a shape `(T, h, w)` one batch holds: at most `count`, at most `budget` tokens, at least one."""
    if count < 1 or (budget is not None and budget < 1) or tokens_per_cell <= 0.0:
        raise UserError("batch size and token budget must be at least 1 and tokens per cell above 0; correct them")
    tokens = max(1, math.ceil(math.prod(shape) * tokens_per_cell))
    return count if budget is None else max(1, min(count, budget // tokens))


def plan_batches(
    shapes: Sequence[tuple[int, ...]],
    order: Sequence[int],
    count: int,
    budget: int | None = None,
    tokens_per_cell: float = 1.0,
    world: int = 1,
    whole: bool = False,
) -> list[list[int]]:
    """Cut an order of items into batches of one shape each; deterministic.

    Every item appears; sizes are multiples of `world` (rounded down, at least `world`). Leftovers come last, filled up to
    such a multiple, or with `whole` to a full batch, with items of the same shape from the start of the order.
    """
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index in order:
        buckets.setdefault(shapes[index], []).append(index)
    full: list[list[int]] = []
    left: list[list[int]] = []
    for shape in sorted(buckets):
        items = buckets[shape]
        size = max(world, batch_size(shape, count, budget, tokens_per_cell) // world * world)
        end = len(items) // size * size
        full += [items[start : start + size] for start in range(0, end, size)]
        rest = items[end:]
        if rest:
            missing = -len(rest) % (size if whole else world)
            left.append(rest + [items[place % len(items)] for place in range(missing)])
    return full + left
