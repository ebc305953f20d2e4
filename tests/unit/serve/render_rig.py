"""What tests of rendering share: a tiny system of random weights, and what a job asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tubelet.codecs import build_codec
from tubelet.generate.engine import Sampling
from tubelet.generate.folder import save_system
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text.bpe import train
from tubelet.text.own import OwnTextConfig, OwnTextEncoder

WORDS = "a red ball falls"


def save_tiny(folder: Path) -> Path:
    """A system of random weights: native 32 x 32 pixels, 5 frames, 8 a second; sizes are multiples of 16."""
    torch.manual_seed(0)
    codec = build_codec("causal_conv", {"channels": 4, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]})
    denoiser = Spacetime(SpacetimeConfig(width=32, depth=1, heads=2, in_channels=4, patch=(1, 2, 2), text_width=32))
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2), train([WORDS] * 4, 280))
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    parts = {"codec": ("causal_conv", codec), "denoiser": ("spacetime", denoiser), "text": ("own", text)}
    save_system(folder, name="tiny", **parts, size=(32, 32), frames=5, fps=8.0, defaults=Sampling(steps=2))  # type: ignore[arg-type]
    return folder


def ask(task: str = "create", inputs: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """A request; `inputs` are file names by role."""
    media = {"png": "image/png", "mp4": "video/mp4"}
    named = [{"role": r, "asset": a, "media": media[a.rpartition(".")[2]]} for r, a in (inputs or {}).items()]
    plain = {"task": task, "prompt": WORDS, "size": None, "seconds": None, "seed": 3, "inputs": named, "expand": False}
    return {**plain, **more}
