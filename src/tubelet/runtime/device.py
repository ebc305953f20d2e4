"""Which device, how many threads, and whether bf16 pays: measured once in a process, never assumed.

On processors without bf16 instructions a bf16 product is 44 to 499 times slower than fp32 (pytorch issue 146508) and
nothing warns about it; so the instruction set is read first and both precisions are timed only where it has them.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from tubelet.core.errors import UserError

MATRIX = (2560, 384, 1536)
"""Rows, inner and columns of the timed product: the MLP of a width-384 model on 8 clips of 320 tokens."""

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's name


@dataclass(frozen=True)
class Bf16Trial:
    """What was seen and decided: seconds per call of a product and of a 3x3 convolution, in fp32 and bf16 (0 if not timed)."""

    fast: bool
    reason: str
    matrix_fp32: float = 0.0
    matrix_bf16: float = 0.0
    convolution_fp32: float = 0.0
    convolution_bf16: float = 0.0


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises UserError when the named device is unknown or not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or mps") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise UserError(f"this machine has no {device.type} device; use device auto or cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"this machine has no {name}; use one up to cuda:{torch.cuda.device_count() - 1}")
    return device


def set_threads(count: int | None = None) -> int:
    """Set torch's number of threads: `count`, or OMP_NUM_THREADS, or the cores this process may use. Returns it."""
    if count is not None and count < 1:
        raise UserError(f"threads must be at least 1, got {count}; leave it out to use every core")
    if count is None:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = int(asked) if asked.isdigit() and int(asked) > 0 else cores
    torch.set_num_threads(count)
    return count


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read afterwards includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_per_call(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The fastest of repeated calls in about `budget` seconds (at least three): the least disturbed by other processes."""
    call()
    synchronize(device)
    best, calls, end = float("inf"), 0, time.perf_counter() + budget
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def has_bf16_instructions() -> bool:
    """Whether the processor names bf16 instructions (Linux: /proc/cpuinfo; elsewhere unknown, so no)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].split(":", 1)[1].split()) if lines else set()
    return any(name in flags for name in BF16_INSTRUCTIONS)


TRIAL_ROUNDS = 6


@functools.cache
def bf16_trial(device_type: str = "cpu") -> Bf16Trial:
    """Decide for a device type; a CPU with bf16 instructions is timed in both precisions (about 1 s)."""
    if device_type == "cuda":
        return Bf16Trial(torch.cuda.is_bf16_supported(including_emulation=False), "cuda reports its support")
    if device_type != "cpu":
        return Bf16Trial(False, f"not used on {device_type}")
    if not has_bf16_instructions():
        return Bf16Trial(False, "the processor has no bf16 instructions")
    device = torch.device("cpu")
    rows, inner, columns = MATRIX
    calls: list[Callable[[], object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.full((rows, inner), 0.5, dtype=dtype), torch.full((columns, inner), 0.5, dtype=dtype)
        image = torch.full((4, 64, 32, 32), 0.5, dtype=dtype)
        kernel = torch.full((64, 64, 3, 3), 0.5, dtype=dtype)
        calls += [functools.partial(F.linear, x, w), functools.partial(F.conv2d, image, kernel, padding=1)]
    times = [float("inf")] * len(calls)
    with torch.inference_mode():
        # In turns: what a busy neighbour slows in one round it leaves alone in another.
        for _ in range(TRIAL_ROUNDS):
            times = [min(best, seconds_per_call(call, device, 0.04)) for best, call in zip(times, calls, strict=True)]
    fast = times[2] < times[0] and times[3] < 1.2 * times[1]
    reason = f"timed: product {times[0] / times[2]:.2f}x, convolution {times[1] / times[3]:.2f}x the speed of fp32"
    return Bf16Trial(fast, reason, times[0], times[2], times[1], times[3])


def fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bf16 arithmetic is faster than fp32 here; measured once per process."""
    return bf16_trial(torch.device(device).type).fast


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seconds: float = 0.5) -> float:
    """Floating-point operations per second (2 per multiply-add) of `F.linear` on MATRIX: the yardstick of the benchmarks."""
    device = torch.device(device)
    rows, inner, columns = MATRIX
    x, w = (
        torch.full((rows, inner), 0.5, dtype=dtype, device=device),
        torch.full((columns, inner), 0.5, dtype=dtype, device=device),
    )
    with torch.inference_mode():
        return 2.0 * rows * inner * columns / seconds_per_call(lambda: F.linear(x, w), device, seconds)
