"""Captions as ids and back, and what a captioner is trained on."""

from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.text.bpe import train
from tubelet.train.captioning import STYLES, CaptionObjective, Writing

TEXTS = ["a red ball falls", "a large blue square slides to the left"]


@pytest.fixture(scope="module")
def writing() -> Writing:
    return Writing(train(TEXTS * 8, 300), limit=16)


def test_captions_come_back(writing: Writing) -> None:
    ids, mask = writing.encode(TEXTS, STYLES)
    assert ids.shape == mask.shape
    assert ids[:, 0].tolist() == [writing.start("short"), writing.start("dense")]
    assert int(ids.max()) == writing.end == writing.size - 1
    assert writing.decode(ids) == TEXTS
    assert mask.sum(1).tolist() == [int((row == writing.end).nonzero()[0]) + 1 for row in ids]


def test_a_long_caption_loses_its_end(writing: Writing) -> None:
    ids, mask = writing.encode(["xyz " * 40], ["short"])
    assert ids.shape == (1, 16)
    assert bool(mask.all())
    assert writing.end not in ids


def test_an_unknown_style_is_refused(writing: Writing) -> None:
    with pytest.raises(UserError, match="no style 'poem' of caption; choose short or dense"):
        writing.encode(TEXTS[:1], ["poem"])


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
