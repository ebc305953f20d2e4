"""Tasks in time: a picture that moves, a film between two pictures, extension forward and backward, connection.

Each takes standardised latents `(B, C, t, H, W)` of what is known and says which film of T latent frames it is part of.
"""

from __future__ import annotations

from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.tasks.given import Given


def _film(parts: list[tuple[int, Tensor]], frames: int, haze: float = 0.0) -> Given:
    """A film of `frames` in which each part stands from its frame on; the rest is to be made."""
    one = parts[0][1]
    for _, part in parts:
        if part.ndim != 5 or part.shape[:2] != one.shape[:2] or part.shape[3:] != one.shape[3:]:
            raise UserError(
                f"known clips must be latents (B, C, T, H, W) of one size, got {tuple(part.shape)}, {tuple(one.shape)}; fit"
            )
    clean = one.new_zeros(*one.shape[:2], frames, *one.shape[3:])
    mask = one.new_ones(one.shape[0], frames, *one.shape[3:])
    for begin, part in parts:
        clean[:, :, begin : begin + part.shape[2]] = part
        mask[:, begin : begin + part.shape[2]] = 0
    return Given(clean, mask, haze)


def _room(known: int, frames: int) -> None:
    if known >= frames:
        raise UserError(f"{known} latent frames are known and {frames} wanted, nothing is left to make; ask for more frames")


def from_image(first: Tensor, frames: int) -> Given:
    """A film that begins with a picture, `first (B, C, 1, H, W)`."""
    _room(first.shape[2], frames)
    return _film([(0, first)], frames)


def between(first: Tensor, last: Tensor, frames: int) -> Given:
    """A film that begins with one picture and ends with another."""
    return connect(first, last, frames - first.shape[2] - last.shape[2])


def extend(past: Tensor, frames: int, haze: float = 0.0) -> Given:
    """A film of `frames` that begins with `past (B, C, t, H, W)`. `haze`: see `Given`."""
    _room(past.shape[2], frames)
    return _film([(0, past)], frames, haze)


def extend_backward(future: Tensor, frames: int, haze: float = 0.0) -> Given:
    """A film of `frames` that ends with `future`."""
    _room(future.shape[2], frames)
    return _film([(frames - future.shape[2], future)], frames, haze)


def connect(before: Tensor, after: Tensor, frames: int) -> Given:
    """`before`, then `frames` latent frames to be made, then `after`."""
    if frames < 1:
        raise UserError(f"between two clips at least 1 latent frame must be made, got {frames}; ask for a longer film")
    whole = before.shape[2] + frames + after.shape[2]
    return _film([(0, before), (before.shape[2] + frames, after)], whole)


def windows(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """How a film of `length` latent frames is made window by window: `(begin, end)` of each, every one but the first sharing
    `overlap` frames with what is there. Raises UserError when a window adds nothing."""
    if not 0 < overlap < window or length < 1:
        raise UserError(
            f"a window of {window} latent frames cannot overlap by {overlap}; overlap by at least 1 and less than it"
        )
    spans = [(0, min(window, length))]
    while spans[-1][1] < length:
        begin = spans[-1][1] - overlap
        spans.append((begin, min(begin + window, length)))
    return spans
