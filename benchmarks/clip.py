"""A clip of the shipped system: warm, against its own floating-point work; and from a cold start, stage by stage."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
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


START = """
import sys, time
begin = time.perf_counter()
from tubelet.generate.system import load
laps = {"import": time.perf_counter() - begin}
begin = time.perf_counter()
system = load(sys.argv[1])
laps["load"] = time.perf_counter() - begin
clip = system.generate(sys.argv[2])
laps |= clip.timings
begin = time.perf_counter()
clip.save(sys.argv[3])
laps["write"] = time.perf_counter() - begin
import json
print(json.dumps(laps))
"""


def start(settings: Settings) -> Iterator[Figure]:
    """A new process from nothing to an mp4, by the wall clock; the stages are what `tubelet generate` does."""
    with tempfile.TemporaryDirectory() as folder:
        place, peer = _system(Path(folder))
        arguments = [sys.executable, "-c", START, str(place), PROMPT, str(Path(folder) / "film.mp4")]
        runs = []
        for _ in range(max(2, settings.repeats // 3)):
            done = subprocess.run(arguments, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for name in runs[0]:
        yield Figure(f"start/{name}", statistics.median(run[name] for run in runs), "s", peer)
    yield Figure("start/total", statistics.median(sum(run.values()) for run in runs), "s", peer)


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
