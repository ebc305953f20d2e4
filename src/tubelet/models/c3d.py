"""C3D: 3-D convolutions over 16 frames (Tran et al. 2015, "Learning Spatiotemporal Features with 3D Convolutional Networks").

Eight convolutions of 3 x 3 x 3, five max-pools, two hidden layers (figure 3). The first pool leaves time alone, so that motion
survives the early layers. Before transformers this was the standard description of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError

# Figure 3: channels of a stage in multiples of the first, and how many convolutions it has; a pool ends every stage.
STAGES = ((1, 1), (2, 1), (4, 2), (8, 2), (8, 2))


@dataclass(frozen=True)
class C3DConfig:
    """Sizes of a `C3D`. Raises UserError when the five pools leave nothing of the input.

    `width`: channels of the first convolution. `hidden`: width of fc6 and fc7. `dropout`: after both, in training.
    """

    classes: int = 487
    frames: int = 16
    size: int = 112
    width: int = 64
    hidden: int = 4096
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if min(self.classes, self.width, self.hidden) < 1:
            raise UserError("every size of a C3D must be at least 1; raise the one that is not")
        if min(self.frames, self.size) < 16:
            raise UserError(
                f"five pools need at least 16 frames and 16 pixels, got {self.frames} and {self.size}; give a larger clip"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}; the paper's is 0.5")


class C3D(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1] to logits `(B, classes)`."""

    def __init__(self, config: C3DConfig) -> None:
        super().__init__()
        self.config = config
        stages, channels = [], 3
        for multiple, convolutions in STAGES:
            layers = nn.ModuleList()
            for _ in range(convolutions):
                layers.append(nn.Conv3d(channels, multiple * config.width, 3, padding=1))
                channels = multiple * config.width
            stages.append(layers)
        self.stages = nn.ModuleList(stages)
        side = (config.size // 16 + 1) // 2
        self.fc6 = nn.Linear(channels * (config.frames // 16) * side * side, config.hidden)
        self.fc7 = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.classes)
        self.dropout = nn.Dropout(config.dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Normal with variance 2 / fan-in (He et al. 2015, equation 10), which keeps the signal's size through eight rectified
        layers without the paper's long warm start; a small head.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None, "every layer has a bias"
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def features(self, video: Tensor) -> Tensor:
        """The paper's descriptor of a clip, fc6 `(B, hidden)` (section 3.3). Raises UserError on a video of another size."""
        T, size = self.config.frames, self.config.size
        if video.ndim != 5 or video.shape[1:] != (3, T, size, size):
            raise UserError(
                f"this C3D takes video (B, 3, {T}, {size}, {size}), got {tuple(video.shape)}; resize or sample the clip"
            )
        x = video
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList), "a stage is a list of convolutions"
            for convolution in stage:
                x = F.relu(convolution(x))  # (B, C, T, H, W)
            # At 112 pixels the last pool meets 7 x 7 cells and makes 4 x 4 of them, 8192 numbers for fc6: an odd side is
            # padded, so that no row is lost.
            odd = x.shape[-1] % 2 if i == len(STAGES) - 1 else 0
            x = F.max_pool3d(x, (1 if i == 0 else 2, 2, 2), padding=(0, odd, odd))  # (B, C, T/2, H/2, W/2)
        return F.relu(self.fc6(x.flatten(1)))  # (B, hidden)

    def forward(self, video: Tensor) -> Tensor:
        x = self.dropout(self.features(video))
        return self.head(self.dropout(F.relu(self.fc7(x))))


def tiny(config: C3DConfig) -> C3DConfig:
    """A config of the same shape, small enough for tests and without dropout."""
    return replace(config, classes=5, frames=16, size=48, width=4, hidden=16, dropout=0.0)


def example(config: C3DConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: videos of the config's size."""
    return (torch.randn(batch, 3, config.frames, config.size, config.size),)  # (B, 3, T, H, W)


def stated(config: C3DConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.frames} x {config.size} x {config.size} video (C, T, H, W)"


# Named by classes: 487 of Sports-1M, 101 of UCF101.
SIZES: dict[str, C3DConfig] = {"487": C3DConfig(classes=487), "101": C3DConfig(classes=101)}
