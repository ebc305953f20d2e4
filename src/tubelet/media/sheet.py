"""Contact sheets: many clips on one picture, a row each, a few frames per row, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tubelet.core.errors import UserError
from tubelet.core.files import whole_file

PAPER, INK = (250, 250, 248), (24, 24, 28)
MARGIN, GAP = 12, 4
TEXT_SIZE = 16


def contact_sheet(
    clips: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns_frames: int = 8,
    scale: int = 2,
    text_size: int = TEXT_SIZE,
) -> np.ndarray:
    """Draw clips, each uint8 `(T, H, W, 3)`, as rows of evenly chosen frames (first and last among them); uint8 `(H, W, 3)`.

    Frames are enlarged `scale` times by repeating pixels, so that a pixel stays a pixel. Clips may differ in size and length.
    A caption stands above its row and breaks into lines of the sheet's width.
    Raises UserError when there is nothing to draw or the counts differ.
    """
    if not clips:
        raise UserError("a contact sheet needs at least one clip; give one")
    if captions is not None and len(captions) != len(clips):
        raise UserError(f"{len(clips)} clips have {len(captions)} captions; give one caption per clip")
    if columns_frames < 1 or scale < 1:
        raise UserError(f"columns and scale must be at least 1, got {columns_frames} and {scale}; raise them")
    for clip in clips:
        assert clip.ndim == 4, f"a clip is (T, H, W, 3), got {clip.shape}"
        assert clip.shape[3] == 3, f"a clip is (T, H, W, 3), got {clip.shape}"
        assert clip.dtype == np.uint8, f"a clip is uint8, got {clip.dtype}"
    rows = [_row(clip, columns_frames, scale) for clip in clips]
    font = ImageFont.load_default(size=text_size)
    inner = max(row.shape[1] for row in rows)
    # A narrow sheet would break every caption into single words.
    if captions is not None:
        inner = max(inner, min(20 * text_size, max(int(font.getlength(c)) + 1 for c in captions)))
    lines = [_broken(caption, font, inner) for caption in captions] if captions is not None else [[] for _ in rows]
    line_height = round(text_size * 1.3)
    heights = [len(text) * line_height + (GAP if text else 0) + row.shape[0] for text, row in zip(lines, rows, strict=True)]
    height = 2 * MARGIN + sum(heights) + (len(rows) - 1) * MARGIN
    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text, row, used in zip(lines, rows, heights, strict=True):
        for number, line in enumerate(text):
            draw.text((MARGIN, top + number * line_height), line, fill=INK, font=font)
        sheet.paste(Image.fromarray(row), (MARGIN, top + used - row.shape[0]))
        top += used + MARGIN
    return np.asarray(sheet)  # (H, W, 3)


def _row(clip: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """Evenly chosen frames side by side, enlarged."""
    count = min(columns, len(clip))
    chosen = np.linspace(0, len(clip) - 1, count).round().astype(int)
    big = clip[chosen].repeat(scale, axis=1).repeat(scale, axis=2)  # (columns, H*scale, W*scale, 3)
    _, height, width, _ = big.shape
    row = np.empty((height, count * (width + GAP) - GAP, 3), np.uint8)
    row[:] = PAPER
    for number, frame in enumerate(big):
        row[:, number * (width + GAP) : number * (width + GAP) + width] = frame
    return row


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a caption into lines that fit; a single word that is too long stays whole and is cut by the edge."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_sheet(sheet: np.ndarray, path: str | Path) -> None:
    """Write a sheet `(H, W, 3)` as png. Raises UserError when the place cannot be written."""
    with whole_file(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", optimize=True)
