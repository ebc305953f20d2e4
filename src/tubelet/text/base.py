"""What every text encoder is: prompts in, token states and a mask out, never a pooled vector.

Pooled sentence vectors hardly tell "left" from "right", so the denoiser looks at single tokens by cross-attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition


class TextEncoder(nn.Module, ABC):
    """Prompts to token states.

    `trainable` says whether the encoder learns with the denoiser (and is saved with it) or stays frozen (and is found
    again by name or path). `config` is a frozen dataclass that rebuilds the encoder through `tubelet.text.build_text`.
    """

    trainable: bool
    config: Any

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels `D` of the token states."""

    @abstractmethod
    def truncated(self, prompt: str) -> bool:
        """Whether `encode` drops the end of this prompt because it is too long. Callers show this to the user."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Condition:
        """Encode checked prompts."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Token states `(B, L, D)` and mask `(B, L)`; `L` is the longest prompt of the batch, each has at least one real token.

        States of padded tokens are zero. Frozen encoders keep no graph. Raises UserError on an empty batch or on
        anything but strings.
        """
        return self._encode(checked_prompts(prompts))

    def null(self, batch: int) -> Condition:
        """The empty prompt, `batch` times: what classifier-free guidance steers away from. Raises UserError when batch < 1."""
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise UserError(f"an empty condition needs a batch of at least 1, got {batch!r}; ask for 1 or more")
        one = self._encode([""])
        return Condition(one.states.expand(batch, -1, -1), one.mask.expand(batch, -1))


def checked_prompts(prompts: object) -> list[str]:
    """`prompts` as a non-empty list of strings. Raises UserError otherwise."""
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of strings, got one string; put it into a list")
    if not isinstance(prompts, (list, tuple)):
        raise UserError(f"prompts must be a list of strings, got {type(prompts).__name__}; pass a list")
    if not prompts:
        raise UserError("there is no prompt to encode; pass at least one (an empty string is allowed)")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {index} is {type(prompt).__name__}, not a string; pass strings only")
    return list(prompts)
