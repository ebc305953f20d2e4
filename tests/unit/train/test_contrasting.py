"""Captions as a CLIP reads them, and its loss."""

from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.models.clip import CLIP, CLIPConfig
from tubelet.text.bpe import train as train_tokenizer
from tubelet.train.contrasting import ContrastObjective, read

TOKENIZER = train_tokenizer(["a red ball falls", "a blue ring slides"] * 4, 280)


def test_every_caption_ends_with_the_largest_id_even_where_it_is_cut() -> None:
    ids = read(TOKENIZER, ["a red ball falls", "a", "a blue ring slides and slides and slides"], limit=6)
    assert ids.shape[1] <= 6
    assert ids.max(1).values.tolist() == [TOKENIZER.size] * 3
    assert (ids == TOKENIZER.size).sum(1).tolist() == [1, 1, 1]


def test_what_belongs_together_is_learned() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(
        embed=32, image=16, patch=8, image_width=32, image_depth=1, vocab=TOKENIZER.size + 1, context=16, text_width=32,
        text_depth=1, head=16, video="attention",
    )  # fmt: skip
    model, objective = CLIP(config), ContrastObjective(TOKENIZER)
    video = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
    video[0, ..., 0] = 255
    batch = {"video": video, "caption": ["a red ball falls", "a blue ring slides"]}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        out = objective(model, batch, torch.Generator())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert float(out["accuracy"]) == 1.0
    with pytest.raises(UserError, match="lacks 'caption'"):
        objective(model, {"video": video}, torch.Generator())
