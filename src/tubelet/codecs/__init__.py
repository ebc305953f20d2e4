"""Pixels to latents and back: the codecs and how to build one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tubelet.codecs.base import Codec
from tubelet.codecs.causal_conv import CausalConv, CausalConvConfig
from tubelet.codecs.transformer import Transformer, TransformerConfig
from tubelet.core.config import from_dict
from tubelet.core.errors import UserError

__all__ = ["CODECS", "Codec", "CodecEntry", "build_codec"]


@dataclass(frozen=True)
class CodecEntry:
    """One line of the catalogue: the settings' class and the module's."""

    config: type[Any]
    module: Callable[[Any], Codec]


CODECS: dict[str, CodecEntry] = {
    "transformer": CodecEntry(TransformerConfig, Transformer),
    "causal_conv": CodecEntry(CausalConvConfig, CausalConv),
}


def build_codec(name: str, config: Mapping[str, Any] | Any | None = None) -> Codec:
    """A fresh codec with random weights. `config` is the entry's dataclass, its JSON values, or None for the defaults.

    Raises UserError on an unknown name or setting.
    """
    if name not in CODECS:
        raise UserError(f"there is no codec {name!r}; choose one of {', '.join(CODECS)}")
    entry = CODECS[name]
    if config is None or isinstance(config, Mapping):
        config = from_dict(entry.config, config or {})
    if not isinstance(config, entry.config):
        raise UserError(f"codec {name!r} is set by {entry.config.__name__}, got {type(config).__name__}; use its own settings")
    return entry.module(config)
