"""What the evaluations share: a system whose films are noise."""

from __future__ import annotations

import pytest
import torch

from tubelet.codecs import build_codec
from tubelet.generate.engine import Engine, Sampling
from tubelet.generate.folder import Part, SystemConfig
from tubelet.generate.system import System
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text.bpe import train
from tubelet.text.own import OwnTextConfig, OwnTextEncoder


@pytest.fixture(scope="session")
def system() -> System:
    """Random weights, 64 x 64 pixels and 9 frames in one step: what it makes is noise."""
    torch.manual_seed(0)
    codec = build_codec("causal_conv", {"channels": 4, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]})
    denoiser = Spacetime(SpacetimeConfig(width=32, depth=1, heads=2, in_channels=4, patch=(1, 2, 2), text_width=32))
    text = OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2), train(["a red ball falls"] * 4, 280))
    defaults = Sampling(steps=1, guidance=1.0)
    part = Part("any")
    config = SystemConfig(
        1, "noise", part, Part("spacetime"), part, "skip", (64, 64), 9, 8.0, defaults, {}
    )  # fmt: skip
    return System(config, Engine(codec.eval(), denoiser.eval(), text.eval(), patch=(1, 2, 2)))
