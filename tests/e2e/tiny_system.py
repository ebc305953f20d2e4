"""A system of random weights that loads and samples in no time. Not in conftest: what else uses it could find another one."""

from __future__ import annotations

from pathlib import Path

import torch

from tubelet.codecs import build_codec
from tubelet.generate.engine import Sampling
from tubelet.generate.folder import save_system
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text.bpe import train
from tubelet.text.own import OwnTextConfig, OwnTextEncoder


def save_tiny(folder: Path, seed: int = 0, name: str = "tiny") -> Path:
    """A system of random weights, native 32 x 32 pixels and 5 frames, strides 1 x 8 x 8 and patch 2 x 2 x 2."""
    torch.manual_seed(seed)
    codec = build_codec("causal_conv", {"channels": 4, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]})
    denoiser = Spacetime(SpacetimeConfig(width=32, depth=1, heads=2, in_channels=4, patch=(1, 2, 2), text_width=32))
    tokenizer = train(["a red ball falls", "a blue box slides left"] * 4, 280)
    # Its few merges make many tokens of a dense caption.
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2, max_tokens=512), tokenizer)
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    save_system(
        folder,
        name=name,
        codec=("causal_conv", codec),
        denoiser=("spacetime", denoiser),
        text=("own", text),
        size=(32, 32),
        frames=5,
        fps=8.0,
        defaults=Sampling(steps=2),
        expander="worlds",
    )
    return folder
