"""Contact sheets show the right frames, unblurred, under readable captions."""

from __future__ import annotations

import numpy as np
import pytest

from tubelet.core.errors import UserError
from tubelet.media.sheet import GAP, INK, MARGIN, PAPER, contact_sheet


def numbered(count: int, height: int = 8, width: int = 10) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def test_first_and_last_frames_are_shown_and_pixels_repeat() -> None:
    clip = np.random.default_rng(0).integers(0, 255, (17, 8, 10, 3), dtype=np.uint8)
    sheet = contact_sheet([clip], columns_frames=4, scale=3)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * MARGIN + 24, 2 * MARGIN + 4 * 30 + 3 * GAP, 3)
    for column, frame in enumerate((0, 5, 11, 16)):
        left = MARGIN + column * (30 + GAP)
        shown = sheet[MARGIN : MARGIN + 24, left : left + 30]
        assert (shown == clip[frame].repeat(3, 0).repeat(3, 1)).all()


def test_clips_of_different_size_and_length_share_a_sheet() -> None:
    sheet = contact_sheet([numbered(1), numbered(3, 20, 6), numbered(30)], columns_frames=8, scale=2)
    assert sheet.shape == (2 * MARGIN + 16 + MARGIN + 40 + MARGIN + 16, 2 * MARGIN + 8 * 20 + 7 * GAP, 3)


def test_captions_are_drawn_above_their_row_and_break_into_lines() -> None:
    clips = [numbered(8), numbered(8)]
    plain = contact_sheet(clips)
    short = contact_sheet(clips, ["a red ball", "a blue box"])
    long = contact_sheet(clips, ["a red ball " * 20, "a blue box"])
    assert plain.shape[0] < short.shape[0] < long.shape[0]
    text = short[MARGIN : MARGIN + 21, MARGIN:-MARGIN]
    dark = (np.abs(text.astype(int) - INK).max(-1) < 90).sum()
    assert dark > 60
    assert (short[:, :MARGIN] == PAPER).all()
    assert (short[:, -MARGIN:] == PAPER).all()


def test_an_empty_caption_takes_no_room() -> None:
    assert contact_sheet([numbered(8)], [""]).shape[0] == contact_sheet([numbered(8)]).shape[0]


def test_equal_clips_give_equal_sheets() -> None:
    assert (contact_sheet([numbered(8)], ["same"]) == contact_sheet([numbered(8)], ["same"])).all()


def test_wrong_input() -> None:
    for call in (
        lambda: contact_sheet([]),
        lambda: contact_sheet([numbered(2)], ["one", "two"]),
        lambda: contact_sheet([numbered(2)], scale=0),
        lambda: contact_sheet([numbered(2)], columns_frames=0),
    ):
        with pytest.raises(UserError):
            call()
    with pytest.raises(AssertionError):
        contact_sheet([numbered(2).astype(np.float32)])
