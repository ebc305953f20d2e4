"""Frozen text encoders of the transformers library, by hub name or local folder: T5, UMT5 and CLIP.

transformers is imported when an encoder is built, not before. Nothing is fetched unless `allow_download` says so, code
that comes with a model is never run, and only safetensors weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.text.base import TextEncoder

# transformers' `model_type` and the class that gives token states without a decoder or a projection
ENCODERS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


@dataclass(frozen=True)
class HFTextConfig:
    """`path`: a local folder or a hub name such as `google/umt5-xxl`; `max_tokens` is lowered to what the model can read;
    `allow_download`: fetch a hub name from the network; `dtype`: of the frozen weights (states are always float32)."""

    path: str
    max_tokens: int = 256
    allow_download: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


class HFTextEncoder(TextEncoder):
    """Token states of a frozen T5, UMT5 or CLIP text model: its last hidden states, after the final norm."""

    trainable = False

    def __init__(self, config: HFTextConfig, folder: Path | None = None) -> None:
        """Raises UserError when transformers or the model is missing, or the model is of another kind."""
        super().__init__()
        self.config = config
        self.frozen = FrozenStates(
            resolved(config.path, folder),
            classes=ENCODERS,
            max_tokens=config.max_tokens,
            allow_download=config.allow_download,
            dtype=getattr(torch, config.dtype),
        )

    @property
    def width(self) -> int:
        return self.frozen.width

    def truncated(self, prompt: str) -> bool:
        return self.frozen.truncated(prompt)

    def _encode(self, prompts: list[str]) -> Condition:
        return self.frozen(prompts)


class FrozenStates(nn.Module):
    """A pretrained tokenizer and model that never train: prompts to the last hidden states `(B, L, D)`, float32."""

    def __init__(
        self, path: str, *, classes: dict[str, str], max_tokens: int, allow_download: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        """`classes`: transformers' model type -> name of the class to load. Raises UserError as `HFTextEncoder` does."""
        super().__init__()
        if max_tokens < 2:
            raise UserError(f"max_tokens must be at least 2 to hold a model's own marks, got {max_tokens}; raise it")
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                'this text encoder needs the transformers library; run pip install "tubelet[hf]" or use the "own" encoder'
            ) from error
        options: dict[str, Any] = {"local_files_only": not allow_download, "trust_remote_code": False}
        try:
            about = transformers.AutoConfig.from_pretrained(path, **options)
            if about.model_type not in classes:
                raise UserError(
                    f"{path} is a {about.model_type} model; text encoders of kind {', '.join(classes)} are supported"
                )
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
            model_class = getattr(transformers, classes[about.model_type])
            self.model, loading = model_class.from_pretrained(
                path, use_safetensors=True, dtype=dtype, output_loading_info=True, local_files_only=not allow_download
            )
        except UserError:
            raise
        # transformers reports missing files, broken JSON and broken weights with many kinds of errors.
        except Exception as error:
            remedy = "check the path" if allow_download or Path(path).is_dir() else "pass a local folder or set allow_download"
            raise UserError(f"cannot load a text encoder from {path} ({first_line(error)}); {remedy}") from error
        # Both would pass silently: transformers fills missing weights with noise and makes up an empty tokenizer.
        missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise UserError(f"the weights in {path} lack {missing[0]} ({len(missing)} missing); restore them from their source")
        ids = len(self.tokenizer)
        if ids - len(set(self.tokenizer.all_special_ids)) < 2 or ids > self.model.get_input_embeddings().num_embeddings:
            raise UserError(
                f"{path} has no tokenizer that fits its model ({ids} ids); put the tokenizer's files beside the weights"
            )
        self.model.requires_grad_(False).eval()
        text = getattr(about, "text_config", about)
        self.width: int = text.d_model if hasattr(text, "d_model") else text.hidden_size
        self.max_tokens: int = min(max_tokens, getattr(text, "max_position_embeddings", None) or max_tokens)

    def train(self, mode: bool = True) -> FrozenStates:
        """Stays in evaluation mode: dropout of a frozen encoder would only add noise."""
        return super().train(False)

    def truncated(self, prompt: str) -> bool:
        return len(self.tokenizer([prompt], verbose=False)["input_ids"][0]) > self.max_tokens

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Condition:
        # Half a surrogate pair has no UTF-8 form, which the Rust tokenizers insist on.
        prompts = [prompt.encode(errors="replace").decode() for prompt in prompts]
        rows = self.tokenizer(prompts, truncation=True, max_length=self.max_tokens)["input_ids"]
        pad = self.tokenizer.pad_token_id or 0
        rows = [row or [pad] for row in rows]  # a tokenizer without end mark makes nothing of an empty prompt
        longest = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)  # (B, L)
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows], device=device)  # (B, L)
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # (B, L, D)
        return Condition(states.float() * mask[..., None], mask)


def resolved(path: str, folder: Path | None) -> str:
    """`path` inside a system's folder where it exists there, else as it is."""
    inside = folder / path if folder is not None else None
    return str(inside) if inside is not None and inside.is_dir() else path


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind when it has none: enough for one sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
