"""How attention over a pack of samples is computed on this device: chosen by a trial, equal in result.

A CPU goes sample by sample. On a CUDA device so many small calls leave it waiting, so other ways are tried once per process
on a pack of films, forward and backward; what fails there or differs from the reference is left out, and the fastest stays.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tubelet.nn.attention import PackBackend, by_segment
from tubelet.nn.packing import Segments
from tubelet.runtime.device import seconds_per_call

NARROW = (torch.float16, torch.bfloat16)
"""What flash attention computes in."""
TRIAL_LENGTHS = (272, 272, 80, 16, 476, 144, 272, 16, 16, 272, 612, 80, 272, 144, 272, 16)
"""Tokens of the trial's samples: films and pictures of several sizes, together a pack of 3,232."""
TRIAL_HEADS, TRIAL_HEAD = 6, 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far a way may be from the reference, as a part of its root mean square. Half precisions: their own rounding."""


def by_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A pack in one call of torch's flash attention for unequal lengths; sample by sample where that kernel does not apply
    (fp32, another device, a sample that has queries and no keys)."""
    hungry = any(one_q and not one_k for one_q, one_k in zip(segments.queries, segments.keys, strict=True))
    if q.dtype not in NARROW or q.device.type != "cuda" or hungry:
        return by_segment(q, k, v, segments)
    return _varlen(q, k, v, segments)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn  # younger than the oldest torch that is served
    begins_q, begins_k = (_begins(lengths, q.device) for lengths in (segments.queries, segments.keys))
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]  # 3 x (L, N, d)
    out = kernel(*rows, begins_q, begins_k, max(segments.queries, default=0), max(segments.keys, default=0))
    return out.transpose(0, 1)[None]  # (1, N, L, d)


@functools.lru_cache(maxsize=64)
def _begins(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where samples begin, and where the last one ends: `(samples + 1,)`. Kept, as every block of a network asks for it."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _narrowed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast would hand them to the fused kernel: that of packs is not on its list."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


WAYS: dict[str, PackBackend] = {"sample by sample": by_segment, "varlen": by_varlen}
"""The first is the reference. `by_mask` is not among them: it keeps samples apart only while all of them are finite."""


@dataclass(frozen=True)
class PackTrial:
    """The way that was chosen, how long each took (seconds, forward and backward), and why others were left out."""

    way: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@torch.inference_mode(False)  # a sampler's first pack is tried with its gradients, too
def trial(
    ways: Mapping[str, PackBackend], device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...] = TRIAL_LENGTHS
) -> PackTrial:
    """Try every way on one pack; the first one is the reference and always among those to choose from."""
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, TRIAL_HEADS, sum(lengths), TRIAL_HEAD, generator=g) for _ in range(4)]
    inputs = [one.to(device, dtype).requires_grad_() for one in drawn[:3]]
    (q, k, v), weights = inputs, drawn[3].to(device, dtype)  # (1, N, L, d) each
    segments = Segments.of_self(lengths)

    def run(way: PackBackend) -> list[Tensor]:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            out = way(q, k, v, segments)
            return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    @torch.no_grad()
    def poisoned(way: PackBackend) -> Tensor:
        """All but the last sample, whose keys and values are not finite."""
        first = sum(lengths[:-1])
        keys, values = k.clone(), v.clone()
        keys[:, :, first:], values[:, :, first:] = float("nan"), float("nan")
        return way(q, keys, values, segments)[:, :, :first]

    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    reference: list[Tensor] = []
    for name, way in ways.items():
        try:
            found = run(way)
        except (RuntimeError, ImportError, AttributeError, NotImplementedError) as error:
            if not reference:
                raise
            left_out[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        reference = reference or found
        apart = max(_apart(a, b) for a, b in zip(found, reference, strict=True))
        if not apart <= TOLERANCE[dtype]:  # NaN, too, is left out
            left_out[name] = f"{apart:.1e} from the reference"
            continue
        if not poisoned(way).isfinite().all():
            left_out[name] = "what is not finite in one sample comes into others"
            continue
        call: Callable[[], object] = functools.partial(run, way)
        seconds[name] = seconds_per_call(call, device, 0.05)
    return PackTrial(min(seconds, key=lambda name: seconds[name]), seconds, left_out)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@functools.cache
def pack_trial(device: torch.device, dtype: torch.dtype) -> PackTrial:
    """What this process has found for a device and precision. A CPU is not timed: sample by sample is right there
    (docs/runtime.md), and a film's bytes must not hang on a clock."""
    if device.type != "cuda" or dtype not in TOLERANCE:
        return PackTrial("sample by sample")
    return trial(WAYS, device, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The way that is chosen for these tensors; `nn.attention.use_pack_backend` takes it."""
    return by_segment(q, k, v, segments) if q.device.type != "cuda" else _chosen()(q, k, v, segments)


def _by_trial(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    q, k, v = _narrowed(q, k, v)
    return WAYS[pack_trial(q.device, q.dtype).way](q, k, v, segments)


@functools.cache
def _chosen() -> PackBackend:
    # Not in a graph, which would hold the trial and the lengths of one pack. Only when needed: this loads the compiler.
    return cast(PackBackend, torch.compiler.disable(_by_trial))
