"""Which cells a training step knows: random masks `(T, H, W)`, 1 where cells are to be made, 0 where they are known.

The first seven are VDT's recipes (Lu et al. 2023, section 3.3; numbers as in its released mask generator), the rest are what
people ask of a film: both ends, a part of the picture, more of what there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tubelet.core.errors import UserError

Grid = tuple[int, int, int]
Mask = Callable[[Grid, torch.Generator], Tensor]


def _whole(size: Grid) -> Tensor:
    return torch.ones(size)


def _number(low: int, high: int, rng: torch.Generator) -> int:
    """A whole number from low to high, both included; low where high is below."""
    return low + int(torch.randint(max(high - low, 0) + 1, (), generator=rng, device=rng.device))


def _known(size: Grid, frames: slice | Tensor) -> Tensor:
    mask = _whole(size)
    mask[frames] = 0
    return mask


def predict(size: Grid, rng: torch.Generator) -> Tensor:
    """The first half is known."""
    return _known(size, slice(0, size[0] // 2))


def backward(size: Grid, rng: torch.Generator) -> Tensor:
    """The last half is known."""
    return _known(size, slice(size[0] - size[0] // 2, size[0]))


def interpolate(size: Grid, rng: torch.Generator) -> Tensor:
    """Every fourth frame is known."""
    return _known(size, slice(0, size[0], 4)) if size[0] > 1 else _whole(size)


def unconditional(size: Grid, rng: torch.Generator) -> Tensor:
    """Nothing is known."""
    return _whole(size)


def one_frame(size: Grid, rng: torch.Generator) -> Tensor:
    """One random frame is known."""
    frame = _number(0, size[0] - 1, rng)
    return _known(size, slice(frame, frame + 1)) if size[0] > 1 else _whole(size)


def some_frames(size: Grid, rng: torch.Generator) -> Tensor:
    """Each frame is known with probability .2, but not all of them."""
    draws = torch.rand(size[0], generator=rng, device=rng.device).cpu()
    kept = draws < 0.2
    return _known(size, kept) if size[0] > 1 and not bool(kept.all()) else _whole(size)


def blocks(size: Grid, rng: torch.Generator) -> Tensor:
    """Blocks of cells, half of a frame together, are to be made in all frames but up to three at either end, which are known.

    The blocks are BEiT's (Bao et al. 2021, algorithm 1): of four cells or more, up to 3.3 times as long as wide, one after the
    other until half of the cells are covered or ten tries fail. (The release leaves nothing to make where it draws no frame for
    the end; here all frames up to the end are made.)
    """
    frames = size[0]
    begin = _number(0, min(3, frames - 1), rng)
    end = frames - _number(0, min(3, frames - 1 - begin), rng)
    covered = _blocks(size[1], size[2], rng)
    if not bool(covered.any()):
        return _whole(size)
    mask = torch.zeros(size)
    mask[begin:end] = covered
    return mask


def _blocks(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """BEiT's blocks on `(rows, columns)` cells, 1 where covered; nothing where the grid is too small for one."""
    covered = torch.zeros(rows, columns)
    steep = math.log(0.3)
    while (room := rows * columns // 2 - int(covered.sum())) > 0:
        for _ in range(10):
            share, slant = torch.rand(2, generator=rng, device=rng.device).tolist()
            area, aspect = min(4, room) + share * (room - min(4, room)), math.exp(steep * (2 * slant - 1))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < tall < rows and 0 < wide < columns):
                continue
            top, left = _number(0, rows - tall, rng), _number(0, columns - wide, rng)
            block = covered[top : top + tall, left : left + wide]
            if 0 < tall * wide - int(block.sum()) <= room:
                block[:] = 1
                break
        else:
            break
    return covered


def first(size: Grid, rng: torch.Generator) -> Tensor:
    """The first frame is known: a picture starts to move."""
    return _known(size, slice(0, 1)) if size[0] > 1 else _whole(size)


def last(size: Grid, rng: torch.Generator) -> Tensor:
    """The last frame is known."""
    return _known(size, slice(size[0] - 1, size[0])) if size[0] > 1 else _whole(size)


def both(size: Grid, rng: torch.Generator) -> Tensor:
    """First and last frame are known."""
    return _known(size, torch.tensor([0, size[0] - 1])) if size[0] > 2 else _whole(size)


def ends(size: Grid, rng: torch.Generator) -> Tensor:
    """A random beginning and a random end are known, something between them is not: two clips to be connected."""
    if size[0] < 3:
        return _whole(size)
    left = _number(1, size[0] - 2, rng)
    right = _number(1, size[0] - 1 - left, rng)
    return _known(size, slice(0, left)) * _known(size, slice(size[0] - right, size[0]))


def prefix(size: Grid, rng: torch.Generator) -> Tensor:
    """A beginning of random length is known: extension."""
    return _known(size, slice(0, _number(1, size[0] - 1, rng))) if size[0] > 1 else _whole(size)


def suffix(size: Grid, rng: torch.Generator) -> Tensor:
    """An end of random length is known: extension backward."""
    return _known(size, slice(_number(1, size[0] - 1, rng), size[0])) if size[0] > 1 else _whole(size)


def box(size: Grid, rng: torch.Generator) -> Tensor:
    """A random box of cells in all frames is to be made (inpainting) or, as often, all but it (outpainting)."""
    sides = []
    for extent in size[1:]:
        length = _number(max(1, extent // 4), max(1, 3 * extent // 4), rng)
        begin = _number(0, extent - length, rng)
        sides.append(slice(begin, begin + length))
    inside = torch.zeros(size)
    inside[:, sides[0], sides[1]] = 1
    return inside if _number(0, 1, rng) else 1 - inside


MASKS: Mapping[str, Mask] = {
    "predict": predict,
    "backward": backward,
    "interpolate": interpolate,
    "unconditional": unconditional,
    "one_frame": one_frame,
    "some_frames": some_frames,
    "blocks": blocks,
    "first": first,
    "last": last,
    "both": both,
    "ends": ends,
    "prefix": prefix,
    "suffix": suffix,
    "box": box,
}
"""Every recipe by name. A new one is a function and a line here."""
RELEASED = {**dict.fromkeys(tuple(MASKS)[:6], 0.8 / 6), "blocks": 0.2}
"""The mixture that VDT's code trains: one film in five has blocks to be completed, the others share its six recipes in time."""


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises UserError on an unknown recipe or shares that are no proportions."""
    unknown = [name for name in shares if name not in MASKS]
    if unknown:
        raise UserError(f"there is no mask {unknown[0]!r}; choose among {', '.join(MASKS)}")
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise UserError(f"mask shares must be at least 0 and not all 0, got {dict(shares)}; correct them")


def draw_name(shares: Mapping[str, float], rng: torch.Generator) -> str:
    """One recipe's name by its share."""
    weights = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    at = torch.rand((), generator=rng, device=rng.device, dtype=torch.float64).cpu() * weights[-1]
    return list(shares)[min(int(torch.searchsorted(weights, at, right=True)), len(shares) - 1)]
