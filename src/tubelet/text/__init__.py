"""From words to token states: the encoders by name, and how a prompt is expanded (`tubelet.text.expand`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.core.config import from_dict
from tubelet.core.errors import UserError
from tubelet.text.base import TextEncoder
from tubelet.text.bpe import Tokenizer
from tubelet.text.hf import HFTextConfig, HFTextEncoder
from tubelet.text.minilm import MiniLMConfig, MiniLMTextEncoder
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

__all__ = ["TEXT_ENCODERS", "TOKENIZER_FILE", "TextEncoder", "TextEntry", "build_text"]

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextEntry:
    """One line of the catalogue: the config's class, and a function from it and a system's folder to the encoder."""

    config: type[Any]
    build: Callable[[Any, Path | None], TextEncoder]


def _own(config: OwnTextConfig, folder: Path | None) -> TextEncoder:
    return OwnTextEncoder(config, Tokenizer.load(folder / TOKENIZER_FILE) if folder is not None else None)


TEXT_ENCODERS: dict[str, TextEntry] = {
    "own": TextEntry(OwnTextConfig, _own),
    "minilm": TextEntry(MiniLMConfig, MiniLMTextEncoder),
    "hf": TextEntry(HFTextConfig, HFTextEncoder),
}


def build_text(name: str, config: Any = None, folder: str | Path | None = None) -> TextEncoder:
    """Build a text encoder by catalogue name.

    `config`: the entry's dataclass, its JSON form, None for the defaults, or (minilm, hf) only the model's name or path.
    `folder`: a system's folder; "own" reads `tokenizer.json` there (without it: single bytes), the others look there
    for a relative model path first. Weights of a trainable encoder are loaded by the caller.
    Raises UserError on an unknown name or setting and when a file or package is missing.
    """
    entry = TEXT_ENCODERS.get(name)
    if entry is None:
        raise UserError(f"there is no text encoder {name!r}; choose one of {', '.join(TEXT_ENCODERS)}")
    if isinstance(config, (str, Path)):
        if name == "own":
            raise UserError("the own text encoder has no model path; pass its settings, and the tokenizer's place as folder")
        config = {"path": str(config)}
    if config is None:
        config = {}
    if isinstance(config, Mapping):
        config = from_dict(entry.config, config)
    if not isinstance(config, entry.config):
        raise UserError(f"text encoder {name!r} takes a {entry.config.__name__}, got {type(config).__name__}; correct it")
    return entry.build(config, Path(folder) if folder is not None else None)
