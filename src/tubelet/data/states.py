"""Text states of a frozen encoder, computed once and kept as a data set: a caption is read many times, encoded once.

A record's key is the caption's hash; `states (L, D)` holds its real tokens only, in bf16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.text.base import TextEncoder

Encode = Callable[[list[str]], Condition]


def key_of(text: str) -> str:
    """A caption's key: the first 32 hex digits of its sha256."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


@torch.no_grad()
def cache_states(encode: Encode, texts: Iterable[str], folder: str | Path, batch: int = 64) -> int:
    """Encode every different text once and store it; what an interrupted call has finished is kept. Returns how many there are.

    The empty caption is always among them: guidance needs it. Raises UserError when the folder cannot be written.
    """
    unique = list(dict.fromkeys(["", *texts]))
    with ShardWriter(folder, essentials=()) as writer:
        missing = [text for text in unique if key_of(text) not in writer]
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            condition = encode(part)
            for text, states, mask in zip(part, condition.states, condition.mask, strict=True):
                writer.add(Record(key_of(text), {"states": states[mask].to(torch.bfloat16).cpu()}, {"text": text}))
    return len(unique)


class CachedStates:
    """The frozen encoder's stand-in during training: captions to `Condition`, from a folder that `cache_states` has written."""

    def __init__(self, folder: str | Path) -> None:
        self.dataset = ShardDataset(folder)
        self.known: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str]) -> Condition:
        """States `(B, L, D)` float32, zero where padded, and mask `(B, L)`. Raises UserError for a caption never cached."""
        rows = [self._row(text) for text in texts]
        longest = max(len(row) for row in rows)
        states = torch.zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, row in enumerate(rows):
            states[place, : len(row)] = row.float()
            mask[place, : len(row)] = True
        return Condition(states, mask)

    def _row(self, text: str) -> Tensor:
        key = key_of(text)
        if key not in self.known:
            place = self.dataset.places.get(key)
            record = self.dataset.read(place) if place is not None else None
            if record is None:
                raise UserError(f"the text-state cache has no states of {text[:60]!r}; cache the data set's captions again")
            self.known[key] = record.tensors["states"]
        return self.known[key]


class CachedTextEncoder(TextEncoder):
    """A frozen encoder in training: captions come from its cache, any other prompt from the encoder itself."""

    trainable = False

    def __init__(self, inner: TextEncoder, folder: str | Path) -> None:
        super().__init__()
        assert not inner.trainable, "states of an encoder that learns are not worth keeping"
        self.inner, self.cached, self.config = inner.requires_grad_(False), CachedStates(folder), inner.config

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTextEncoder:
        # A running average of weights copies the model: what is frozen may be shared.
        return self

    @property
    def width(self) -> int:
        return self.inner.width

    def truncated(self, prompt: str) -> bool:
        return self.inner.truncated(prompt)

    def _encode(self, prompts: list[str]) -> Condition:
        if all(key_of(prompt) in self.cached.dataset.places for prompt in prompts):
            return self.cached.encode(prompts)
        return self.inner.encode(prompts)
