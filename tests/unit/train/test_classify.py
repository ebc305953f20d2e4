"""The classifier's objective: cross-entropy on pixels, accuracy beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.train.classify import ClassifyObjective, as_pixels


class Brightness(nn.Module):
    """Says 1 for bright clips."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, video: Tensor) -> Tensor:
        bright = self.gain * video.mean((1, 2, 3, 4))
        return torch.stack([-bright, bright], 1)


def test_loss_and_accuracy() -> None:
    video = torch.stack([torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 255)]).to(torch.uint8)
    assert as_pixels(video).shape == (2, 3, 2, 4, 4)
    assert as_pixels(video).amin() == -1
    model, rng = Brightness(), torch.Generator()
    right = ClassifyObjective(smoothing=0.0)(model, {"video": video, "label": torch.tensor([0, 1], dtype=torch.uint8)}, rng)
    torch.testing.assert_close(right["loss"], torch.tensor(-2.0).sub(2).exp().log1p())
    assert right["accuracy"] == 1
    wrong = ClassifyObjective()(model, {"video": video, "label": torch.tensor([1, 1])}, rng)
    assert wrong["accuracy"] == 0.5
    assert wrong["loss"] > right["loss"]
    wrong["loss"].backward()
    assert model.gain.grad is not None
    assert model.gain.grad.abs() > 0


def test_clips_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="lacks 'label'"):
        ClassifyObjective()(Brightness(), {"video": torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)}, torch.Generator())
