"""road.png: one sentence on the whole road, from the simulated world to the measured film, in six rows of real pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import tubelet
from tubelet.core.types import Video
from tubelet.evaluate.caption import follow, read
from tubelet.evaluate.reading import Reading
from tubelet.media.sheet import INK, PAPER, save_sheet
from tubelet.worlds import WORLDS
from tubelet.worlds.grammar import parse

SEED = 8
"""Of the simulated clip, which is of no training: its prompt makes the film, too."""
SIDE, GAP, LEFT, BETWEEN = 128, 6, 372, 46
FRAMES = (0, 3, 6, 9, 12, 16)
MIDDLE = 8
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
QUIET, TRAIL = (110, 110, 116), (20, 20, 20)


def road(path: Path = Path(__file__).parent / "road.png") -> None:
    """Draw the picture at `path` with the shipped weights."""
    system = tubelet.load("worlds-64")
    episode = WORLDS["phys2d"].sample(SEED, kind="parabola")
    fps = system.config.fps
    latents = system.engine.encode(Video.from_uint8(episode.video[None], fps).pixels)  # (1, C, T, H, W)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    watching = replace(system, engine=replace(system.engine, watch=lambda x_hat: seen.append(x_hat.clone())))
    clip = watching.generate(episode.short, seed=0)
    film = clip.video.to_uint8()[0]
    steps = sorted({1, 2, 4, 8, 12, len(seen)})
    beliefs = [(system.engine.decode(seen[step - 1])[0, :, MIDDLE] + 1) * 127.5 for step in steps]

    colours = _Colours(latents)
    reading = Reading(film, fps)
    rows: list[tuple[str, str, Sequence[np.ndarray], Sequence[str]]] = [
        (
            "world",
            f"simulated, with its exact state and a caption: “{episode.short}”",
            [episode.video[t] for t in FRAMES],
            [f"frame {t}" for t in FRAMES],
        ),
        (
            "codec.encode",
            "8 x 8 pixels become one cell of 8 numbers; three main directions of them as red, green, blue",
            [colours(latents[0, :, t]) for t in FRAMES],
            [f"frame {t}" for t in FRAMES],
        ),
        (
            "noise",
            f"frame {MIDDLE} on the straight path to noise: from any place on it the denoiser learns to tell the clean cells, "
            "with the caption beside",
            [colours(((1 - s) * latents + s * noise)[0, :, MIDDLE]) for s in LEVELS],
            [f"sigma {s:g}" for s in LEVELS],
        ),
        (
            "denoiser",
            f"the same sentence, from noise alone: what it believes of frame {MIDDLE} as the noise is taken away",
            [belief.permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy() for belief in beliefs],
            [f"step {step} of {len(seen)}" for step in steps],
        ),
        (
            "codec.decode",
            "a film that was never simulated: the seed's own answer to the sentence",
            [film[t] for t in FRAMES],
            [f"frame {t}" for t in FRAMES],
        ),
        (
            "evaluate",
            f"read from its pixels alone, by a tracker: {_told(read(film, fps))}; right by the sentence: "
            + ", ".join(name for name, so in follow(film, fps, parse(episode.short)).items() if so),
            _followed(film, reading),
            [f"frame {t}" for t in FRAMES],
        ),
    ]
    save_sheet(_drawn(rows), path)


def _told(seen: Mapping[str, Any]) -> str:
    """What `read` has read, as words."""
    thing = (
        " ".join(seen["objects"][0].get(name, "") for name in ("size", "color", "shape")) if seen.get("objects") else "nothing"
    )
    return ", ".join([thing, *(f"{name} {seen[name]}" for name in ("kind", "direction", "count") if name in seen)])


class _Colours:
    """Cells of 8 numbers as colours: their three main directions over one clip."""

    def __init__(self, latents: torch.Tensor):
        cells = latents[0].flatten(1).T  # (T * H * W, C)
        self.mean = cells.mean(0)
        _, _, directions = torch.linalg.svd(cells - self.mean, full_matrices=False)
        self.directions = directions[:3]  # (3, C)
        self.spread = ((cells - self.mean) @ self.directions.T).std(0)

    def __call__(self, cells: torch.Tensor) -> np.ndarray:
        """`(C, H, W)` to uint8 `(H, W, 3)`."""
        mixed = (cells.permute(1, 2, 0) - self.mean) @ self.directions.T / self.spread  # (H, W, 3)
        return (127.5 + 55 * mixed).clamp(0, 255).round().to(torch.uint8).numpy()


def _followed(film: np.ndarray, reading: Reading) -> list[np.ndarray]:
    """Frames with the way of the main object's centre drawn as far as it has come."""
    track = max(reading.tracks.values(), key=lambda found: float(found.area.mean()))
    scale = SIDE // film.shape[1]
    short = min(film.shape[1:3]) * scale
    frames = []
    for t in FRAMES:
        picture = Image.fromarray(film[t]).resize((film.shape[2] * scale, film.shape[1] * scale), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture)
        way = [(float(track.x[s]) * short, float(track.y[s]) * short) for s in range(t + 1) if track.present[s]]
        if len(way) > 1:
            draw.line(way, fill=TRAIL, width=2)
        for x, y in way:
            draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=TRAIL)
        frames.append(np.asarray(picture))
    return frames


def _drawn(rows: Sequence[tuple[str, str, Sequence[np.ndarray], Sequence[str]]]) -> np.ndarray:
    """Rows of (name, what happens, pictures, their labels) under each other, an arrow from each to the next."""
    head, text, small = (ImageFont.load_default(size=size) for size in (22, 15, 12))
    columns = max(len(pictures) for _, _, pictures, _ in rows)
    width, row_height = LEFT + columns * (SIDE + GAP) + 16, SIDE + 18
    height = 20 + len(rows) * row_height + (len(rows) - 1) * BETWEEN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, what, pictures, labels) in enumerate(rows):
        top = 10 + number * (row_height + BETWEEN)
        draw.text((20, top), name, fill=INK, font=head)
        for line, words in enumerate(_lines(what, text, LEFT - 50)):
            draw.text((20, top + 32 + 20 * line), words, fill=QUIET, font=text)
        for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            left = LEFT + column * (SIDE + GAP)
            sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            draw.text((left, top + SIDE + 2), label, fill=QUIET, font=small)
        if number + 1 < len(rows):
            x, y = LEFT + columns * (SIDE + GAP) // 2, top + row_height + 8
            draw.line((x, y, x, y + 22), fill=INK, width=2)
            draw.polygon([(x - 6, y + 20), (x + 6, y + 20), (x, y + 31)], fill=INK)
    return np.asarray(sheet)  # (H, W, 3)


def _lines(words: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


if __name__ == "__main__":
    road()
