"""What a captioner is trained on."""

from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.text.bpe import train
from tubelet.text.writing import STYLES, Writing
from tubelet.train.captioning import CaptionObjective

TEXTS = ["a red ball falls", "a large blue square slides to the left"]


@pytest.fixture(scope="module")
def writing() -> Writing:
    return Writing(train(TEXTS * 8, 300), limit=16)


def test_both_losses_fall_and_style_matters(writing: Writing) -> None:
    torch.manual_seed(0)
    model = CoCa(CoCaConfig(32, 2, 1, 64, 1, 64, image=16, patch=8, vocab=writing.size, queries=4, frames=2))
    video = torch.randint(0, 256, (2, 2, 16, 16, 3), dtype=torch.uint8)
    batch = {"video": video, "caption": TEXTS, "style": list(STYLES)}
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = CaptionObjective(writing)(model, batch, torch.Generator())
    for _ in range(30):
        loss = CaptionObjective(writing)(model, batch, torch.Generator())
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
    assert loss["captioning"] < 0.5 * first["captioning"]
    assert loss["contrastive"] < first["contrastive"]
    other = CaptionObjective(writing)(model, {**batch, "style": list(STYLES[::-1])}, torch.Generator())
    assert other["captioning"] > loss["captioning"]
    with pytest.raises(UserError, match="lacks 'style'"):
        CaptionObjective(writing)(model, {"video": video, "caption": TEXTS}, torch.Generator())
