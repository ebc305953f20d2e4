"""worlds-64: the shipped system. Words to 17 frames of 64 x 64 pixels at 8 fps, phys2d and persist2d.

Paper: the road of the Sora report (2024) at the smallest size that shows it.
Command: tubelet train worlds-64
Cost: 75 minutes on two busy cores, of which clips and codec 16, encoding 5, images about 20, films 35.
Score: the table of the README; first weights, trained far too briefly. Not yet made by one unbroken run of this recipe: image
steps and schedules differed, as docs/log.md, 2026-11-23, says.
"""

from __future__ import annotations

from tubelet.codecs.causal_conv import CausalConvConfig
from tubelet.models.spacetime import SpacetimeConfig
from tubelet.recipes.worlds import Clips, WorldsRecipe
from tubelet.text.own import OwnTextConfig
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig


def recipe() -> WorldsRecipe:
    """A codec that sees one frame at a time, because fast objects do not fit into fewer; the denoiser's patches take four."""
    return WorldsRecipe(
        name="worlds-64",
        clips=Clips(codec=12_000, denoiser=24_000),
        causal_conv=CausalConvConfig(channels=8, temporal_stride=1, temporal_kernel=1),
        codec_train=TrainConfig(
            steps=3000,
            batch=8,
            warmup=50,
            optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3),
            checkpoint_minutes=3.0,
        ),
        denoiser=SpacetimeConfig(width=256, depth=8, heads=4, in_channels=8, patch=(4, 2, 2), text_width=256),
        text=OwnTextConfig(vocab_size=1024, width=256, depth=2, heads=4),
        images=TrainConfig(
            steps=1950,
            batch=64,
            warmup=100,
            optimizer=OptimizerConfig(learning_rate=1.2e-3, learning_rate_adamw=1.2e-3),
            compile=True,
            checkpoint_minutes=4.0,
        ),
        denoise=TrainConfig(
            steps=1850,
            batch=48,
            warmup=100,
            optimizer=OptimizerConfig(learning_rate=1.2e-3, learning_rate_adamw=1.2e-3),
            compile=True,
            sample_every=400,
            checkpoint_minutes=4.0,
        ),
        captions={"short": 0.55, "human": 0.3, "dense": 0.15},
    )
