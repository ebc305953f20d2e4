"""How the benchmarks measure: contestants take turns, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tubelet.nn import attention as attention_room

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
"""`processor` counts the work of all threads and not the waiting: for a machine that is busy, with one thread."""


@dataclass(frozen=True)
class Figure:
    """One line of the report: `value` in `unit`, against `peer`, with the goal it is held to, if any."""

    name: str
    value: float
    unit: str
    peer: str = ""
    goal: str = ""


@dataclass(frozen=True)
class Settings:
    """`repeats` turns for each contestant, read from `clock`."""

    repeats: int = 9
    clock: Clock = time.perf_counter


def compare(contestants: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    """Median seconds per call of each. One call each in turn, so that what disturbs the machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
        call()
    for _ in range(settings.repeats):
        for name, call in contestants.items():
            begin = settings.clock()
            call()
            times[name].append(settings.clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def macs(call: Callable[[], object]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in a call."""
    # The counter sees attention only as its two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() // 2


@contextmanager
def attention(backend: attention_room.Backend) -> Iterator[None]:
    """Use a way of attention for a while."""
    before = attention_room._backend
    attention_room.use_backend(backend)
    try:
        yield
    finally:
        attention_room.use_backend(before)


def product(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """The product whose rate is the yardstick, as `runtime.device.matrix_rate` has it, and its floating-point operations."""
    from tubelet.runtime.device import MATRIX

    rows, inner, columns = MATRIX
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return lambda: torch.nn.functional.linear(x, w), 2.0 * rows * inner * columns
