"""smoke: proves in half a minute on two idle cores, a few minutes on busy ones, that the road trains, end to end.

Paper: none; this is the project's own pulse.
Command: tubelet train smoke
Cost: half a minute on two idle cores
Score: the codec at 23 dB, the denoiser loss from 1.75 to .64 (step 170), a system that loads and samples. No good films.
"""

from __future__ import annotations

from tubelet.codecs.causal_conv import CausalConvConfig
from tubelet.models.spacetime import SpacetimeConfig
from tubelet.recipes.worlds import Clips, WorldsRecipe
from tubelet.text.own import OwnTextConfig
from tubelet.train.loop import TrainConfig
from tubelet.train.optim import OptimizerConfig


def recipe() -> WorldsRecipe:
    """A tiny codec and a tiny denoiser on 32 x 32 clips of 9 frames."""
    return WorldsRecipe(
        name="smoke",
        clips=Clips(codec=512, denoiser=512, size=(32, 32), frames=9),
        causal_conv=CausalConvConfig(channels=8, fine_width=32, coarse_width=64, decoder_blocks=(1, 1, 1)),
        codec_train=TrainConfig(
            steps=150, batch=8, warmup=10, optimizer=OptimizerConfig(learning_rate=3e-3, learning_rate_adamw=3e-3)
        ),
        denoiser=SpacetimeConfig(width=128, depth=3, heads=2, in_channels=8, patch=(2, 2, 2), text_width=128),
        text=OwnTextConfig(vocab_size=512, width=128, depth=1, heads=2),
        denoise=TrainConfig(
            steps=200, batch=32, warmup=10, optimizer=OptimizerConfig(learning_rate=2e-3, learning_rate_adamw=2e-3)
        ),
    )
