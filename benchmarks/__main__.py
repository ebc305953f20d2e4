"""`python -m benchmarks [--json] [--only denoiser codec training packing clip start serving accelerator]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from benchmarks.accelerator import accelerator
from benchmarks.clip import clip, start
from benchmarks.codec import codec
from benchmarks.denoiser import denoiser
from benchmarks.packing import packing
from benchmarks.serving import serving
from benchmarks.timing import CLOCKS, Figure, Settings
from benchmarks.training import training
from tubelet.runtime.device import set_threads

BENCHMARKS: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "denoiser": denoiser,
    "codec": codec,
    "training": training,
    "packing": packing,
    "clip": clip,
    "start": start,
    "serving": serving,
    "accelerator": accelerator,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Figures beside peers, measured in one run.")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="some of them")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contestant; medians are compared")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: for a busy machine, with one thread")
    parser.add_argument("--json", action="store_true", help="print one object of name -> figure")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    threads = set_threads()
    settings = Settings(arguments.repeats, CLOCKS[arguments.clock])
    figures: list[Figure] = []
    for name in arguments.only:
        for figure in BENCHMARKS[name](settings):
            figures.append(figure)
            if not arguments.json:
                print(line(figure), flush=True)
    if arguments.json:
        machine = {"threads": threads, "clock": arguments.clock, "torch": torch.__version__}
        print(json.dumps({"machine": machine, "figures": {f.name: asdict(f) for f in figures}}, indent=1))


def line(figure: Figure) -> str:
    """A figure as one line of text."""
    goal = f"  goal {figure.goal}" if figure.goal else ""
    peer = f"  ({figure.peer})" if figure.peer else ""
    return f"{figure.name:42s} {figure.value:10.4g} {figure.unit}{goal}{peer}"


if __name__ == "__main__":
    main()
