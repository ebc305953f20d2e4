"""A clip of the shipped system: warm, against its own floating-point work; and from a cold start, stage by stage."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.denoiser import _filled
from benchmarks.timing import Figure, Settings, attention, compare, macs, product
from tubelet.codecs import build_codec
from tubelet.generate.engine import Request, Sampling
from tubelet.generate.folder import find, save_system, shipped
from tubelet.generate.system import load
from tubelet.models.spacetime import Spacetime
from tubelet.nn.attention import fused
from tubelet.recipes.worlds_64 import recipe
from tubelet.runtime.cpu import attention_as_products, restore
from tubelet.text.own import OwnTextEncoder

NAME = "worlds-64"
PROMPT = "A large red ball bounces in from the left."


def clip(settings: Settings) -> Iterator[Figure]:
    """The warm clip in the system's own precision, with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        place, peer = _system(Path(folder))
        system = load(place)
        config, sampling = system.config, system.config.defaults

        def film(sampling: Sampling = sampling) -> object:
            with attention(attention_as_products):
                return system.engine.sample([Request(PROMPT, 0)], config.size, config.frames, sampling)

        for network in (system.codec, system.denoiser, system.text):
            restore(network)
        with attention(fused):
            work = 2.0 * macs(lambda: system.engine.sample([Request(PROMPT, 0)], config.size, config.frames, sampling))
        system = load(place)
        multiply, operations = product(system.dtype)
        with torch.inference_mode():
            seconds = compare({"film": film, "product": multiply}, settings)
        ideal = work / (operations / seconds["product"])
        what = f"{peer}, {config.frames} frames of {config.size[0]}x{config.size[1]}, {sampling.steps} steps, {system.dtype}"
        yield Figure("clip/seconds", seconds["film"], "s", what, "<= 0.3")
        yield Figure("clip/times_its_work", seconds["film"] / ideal, "x", "its operations at the rate of F.linear", "<= 3")
        yield Figure("clip/work", work / 1e9, "GFLOP")
        yield Figure("clip/matrix_rate", operations / seconds["product"] / 1e9, "GFLOP/s", "F.linear, 2560 x 384 x 1536")


def start(settings: Settings) -> Iterator[Figure]:
    """`tubelet generate` as a person calls it, a new process, by the wall clock.

    The stages are those that it tells itself; `process` is the rest: the interpreter's start and its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        place, peer = _system(Path(folder))
        words = ["generate", PROMPT, "--system", str(place), "--out", str(Path(folder) / "film.mp4"), "--json"]
        runs: list[dict[str, float]] = []
        for _ in range(max(2, settings.repeats // 3)):
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "tubelet", *words], check=True, capture_output=True, text=True)
            wall = time.perf_counter() - begin
            told = json.loads(done.stdout)["timings"]
            runs.append({"process": wall - told.pop("total"), **told, "wall": wall})
    for name in runs[0]:
        yield Figure(f"start/{name}", statistics.median(run[name] for run in runs), "s", peer)


def _system(folder: Path) -> tuple[Path, str]:
    """The shipped system, or one of the same sizes with random weights until there is one."""
    if NAME in shipped():
        return find(NAME), NAME
    run = recipe()
    torch.manual_seed(0)
    parts = (build_codec(run.codec, getattr(run, run.codec)), Spacetime(run.denoiser), OwnTextEncoder(run.text))
    for part in parts:
        _filled(part)
    save_system(
        folder / NAME,
        name=NAME,
        codec=(run.codec, parts[0]),
        denoiser=("spacetime", parts[1]),
        text=("own", parts[2]),
        size=run.clips.size,
        frames=run.clips.frames,
        fps=run.clips.fps,
        prediction=run.prediction,
        defaults=run.sampling,
    )
    return folder / NAME, f"random weights of the sizes of {NAME}"
