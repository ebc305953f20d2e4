"""Captions as a captioner's ids and back."""

from __future__ import annotations

import pytest

from tubelet.core.errors import UserError
from tubelet.text.bpe import train
from tubelet.text.writing import STYLES, Writing

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
