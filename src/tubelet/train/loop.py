"""The only training loop. What is trained differs in the objective alone: `(model, batch, rng) -> losses`.

A run lives in a folder: `checkpoints/` and `metrics.jsonl` (and `tensorboard/`). The same call resumes it, and on a CPU the
resumed run is bit for bit the uninterrupted one: weights, averages, optimiser, random numbers, data position and logged losses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.core.config import to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import whole_file
from tubelet.core.log import console, warn
from tubelet.data.stream import Ahead, Source
from tubelet.runtime.device import bf16_trial, choose_device, fast_bf16
from tubelet.train import checkpoint
from tubelet.train.ema import PowerAverage, gamma_of
from tubelet.train.optim import Optimizer, OptimizerConfig, Split

Objective = Callable[[Any, dict[str, Any], torch.Generator], Mapping[str, Tensor]]
"""`(model, batch, rng) -> {"loss": scalar, ...}`: "loss" is optimised, all are logged. Random numbers come from `rng` only."""


class Sample(Protocol):
    """Called on the way with the averaged model (eval mode) and the step. Its random numbers do not disturb the run."""

    def __call__(self, model: Any, step: int, /) -> object: ...


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run but its model, data and objective."""

    steps: int
    """Optimiser updates of the whole run; the schedule is keyed on step / steps."""
    batch: int
    """Items per update."""
    accumulate: int = 1
    """Micro-batches per update, each of batch / accumulate items and equal weight."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warmup: int = 100
    """Updates over which the learning rates rise from 0."""
    end: float = 0.0
    """Share of the learning rates at the last update; above 0 where another stage goes on from here."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together."""
    ema: float = 0.10
    """sigma_rel of the power-function average."""
    precision: str = "auto"
    """auto | fp32 | bf16: arithmetic inside the objective; weights are always fp32."""
    compile: bool = False
    """Compile the modules of every `.blocks` (the whole model where there is none)."""
    device: str = "auto"
    log_every: int = 10
    """Updates between lines of metrics.jsonl (means over the interval)."""
    sample_every: int = 0
    """Updates between calls of `sample`; 0: at the end only."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0: by minutes only."""
    checkpoint_minutes: float = 5.0
    keep: int = 2
    """Checkpoints kept."""
    patience: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; each is skipped and counted."""
    seed: int = 0
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}; correct it")
        for name in ("warmup", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}; correct it")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"a seed is a whole number from 0 to 2**63 - 1, got {self.seed}; choose another")
        if self.batch % self.accumulate:
            raise UserError(f"a batch of {self.batch} does not divide into {self.accumulate} micro-batches; change one of them")
        if not (self.clip > 0.0 and self.checkpoint_minutes > 0.0):
            raise UserError(
                f"clip and checkpoint_minutes must be above 0, got {self.clip} and {self.checkpoint_minutes}; correct them"
            )
        gamma_of(self.ema)
        if not 0.0 <= self.end <= 1.0:
            raise UserError(f"end is a share of the learning rate and must lie in [0, 1], got {self.end}; 0 is usual")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision must be auto, fp32 or bf16, got {self.precision!r}; choose one of them")


@dataclass(frozen=True)
class TrainResult:
    """The end of a call of `train`: the model (weights as optimised), its average, and where it stands."""

    model: nn.Module
    ema: nn.Module
    step: int
    finished: bool
    """False when a signal or `stop` ended the call before the last step; the same call goes on from the checkpoint."""
    losses: dict[str, float]
    """The last logged means."""
    skipped: int
    """Steps skipped because a loss or gradient was not finite."""


def learning_rate_scale(step: int, steps: int, warmup: int, end: float = 0.0) -> float:
    """The share of the peak learning rate at update `step` (0-based): linear up over `warmup`, linear down to `end` at
    `steps`."""
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    return rise * max(end, 1.0 - (1.0 - end) * step / steps)


def train(
    model: nn.Module,
    objective: Objective,
    source: Source,
    config: TrainConfig,
    folder: str | Path,
    *,
    sample: Sample | None = None,
    split: Callable[[nn.Module], Split] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> TrainResult:
    """Train `model` in place for `config.steps` updates, or go on where the newest whole checkpoint in `folder` stands.

    stop: asked after every update with the number of updates done; True writes a checkpoint and returns early (so do SIGINT and
    SIGTERM). Settings other than `seed`, `batch`, `accumulate`, `ema` and the optimiser's kind may change between calls.
    Raises UserError when the checkpoint belongs to another model, data or setting, when the folder cannot be written, and when
    losses stay not finite.
    """
    return _Run(model, objective, source, config, Path(folder), sample, split, stop).go()


def load_average(folder: str | Path, model: nn.Module) -> int:
    """Fill `model` with the averaged weights of a run's newest whole checkpoint; returns its step. Raises UserError if none."""
    found = checkpoint.newest(Path(folder) / "checkpoints")
    if found is None:
        raise UserError(f"{folder} holds no whole checkpoint; train there first")
    _fill(model, found.tensors("ema"), found.path)
    return found.step


class _Run:
    """One call of `train`: the state that a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        source: Source,
        config: TrainConfig,
        folder: Path,
        sample: Sample | None,
        split: Callable[[nn.Module], Split] | None,
        stop: Callable[[int], bool] | None,
    ) -> None:
        self.objective, self.config, self.folder = objective, config, folder
        self.sample, self.stop = sample, stop
        self.device = choose_device(config.device)
        # A CPU that computes has no core to spare for it.
        self.source = source if self.device.type == "cpu" else Ahead(source)
        self.model = model.to(self.device).train()
        self.step, self.skipped, self.in_a_row = 0, 0, 0
        self.sums: dict[str, float] = {}
        self.counted = 0
        self.losses: dict[str, float] = {}
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.average = PowerAverage(self.model, config.ema)
        found = checkpoint.newest(folder / "checkpoints")
        stored = found.state() if found else None
        self.bf16 = self._precision(stored)
        self.optimizer = Optimizer(self.model, config.optimizer, torch.bfloat16 if self.bf16 else torch.float32, split)
        self.metrics = _Metrics(folder, config.tensorboard)
        if found and stored:
            self._restore(found, stored)
            self.metrics.cut(self.step)
        else:
            self._seed()
            self.metrics.cut(-1)
        self.metrics.event(
            "resume" if found else "start",
            self.step,
            config=to_dict(config),
            bf16=self.bf16,
            trial=to_dict(bf16_trial(self.device.type)) if config.precision == "auto" else None,
            threads=torch.get_num_threads(),
            parameters=sum(p.numel() for p in self.model.parameters()),
            device=str(self.device),
        )
        # What comes in one form per size is compiled for each; else the second form makes a graph for all.
        one_form = bool(getattr(objective, "uniform", False))
        compiles = config.compile and _compiles(self.device)
        self.network = _compiled(self.model, dynamic=False if one_form else None) if compiles else self.model
        self.seconds: dict[str, float] = defaultdict(float)
        self.clips = 0
        self.interrupted = False

    def go(self) -> TrainResult:
        try:
            return self._go()
        finally:
            if isinstance(self.source, Ahead):
                self.source.close()

    def _go(self) -> TrainResult:
        config = self.config
        saved = self.step
        saved_at = logged_at = time.monotonic()
        with _signals(self._interrupt), _progress(config, self.step) as show, self.metrics:
            while self.step < config.steps and not self.interrupted:
                self._update()
                self.step += 1
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.monotonic()
                    self._log(now - logged_at)
                    logged_at = now
                show(self.step, self.losses, self.seconds)
                if config.sample_every and self.step % config.sample_every == 0 and self.step < config.steps:
                    self._sample()
                if self.step == config.steps or (self.stop is not None and self.stop(self.step)):
                    break
                by_steps = config.checkpoint_every and self.step % config.checkpoint_every == 0
                if by_steps or time.monotonic() - saved_at > 60.0 * config.checkpoint_minutes:
                    self._save()
                    saved, saved_at = self.step, time.monotonic()
            finished = self.step >= config.steps
            if finished and not self.average.updates:
                # Nothing is saved: the same steps are taken again once the settings are better.
                raise UserError(
                    f"each of the {self.step} updates was skipped, as the loss or its gradient was never finite; "
                    "lower the learning rate or use precision fp32, then run again"
                )
            if saved != self.step or not self.step:
                if finished:
                    self._sample()
                self._save()
        return TrainResult(self.model, self.average.model, self.step, finished, self.losses, self.skipped)

    def _update(self) -> None:
        config = self.config
        means: dict[str, float] = defaultdict(float)
        for _ in range(config.accumulate):
            with self._clock("data"):
                drawn = self.source.draw(config.batch // config.accumulate)
                # Packs and buckets hold as many clips as fit, so they are counted.
                self.clips += len(next(iter(drawn.values())))
                batch = {name: _moved(value, self.device) for name, value in drawn.items()}
            with self._clock("gradient"):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.objective(self.network, batch, self.rng)
                (losses["loss"] / config.accumulate).backward()
                for name, value in losses.items():
                    means[name] += float(value.detach()) / config.accumulate
        with self._clock("optimizer"):
            gradients = [p.grad for p in self.optimizer.parameters if p.grad is not None]
            if not gradients:
                raise UserError("the loss depends on no trainable parameter; check the objective")
            norm = torch.nn.utils.get_total_norm(gradients)
            means["gradient_norm"] = float(norm)
            if all(math.isfinite(value) for value in (means["loss"], means["gradient_norm"])):
                self.in_a_row = 0
                torch.nn.utils.clip_grads_with_norm_(self.optimizer.parameters, config.clip, norm)
                self.optimizer.step(learning_rate_scale(self.step, config.steps, config.warmup, config.end))
                self.average.update(self.model)
                for name, value in means.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                self.counted += 1
            else:
                self._skip(means)
            self.optimizer.zero_grad()

    def _skip(self, means: Mapping[str, float]) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        values = {name: repr(value) for name, value in means.items()}
        self.metrics.event("skip", self.step + 1, values=values, skipped=self.skipped)
        if self.in_a_row >= self.config.patience:
            raise UserError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row (step {self.step + 1}); "
                "lower the learning rate or use precision fp32, then run again: the last checkpoint is from before"
            )

    def _log(self, wall: float) -> None:
        if self.counted:
            self.losses = {name: value / self.counted for name, value in self.sums.items()}
            scale = learning_rate_scale(self.step - 1, self.config.steps, self.config.warmup, self.config.end)
            rate = self.clips / max(wall, 1e-9)
            shares = {f"share_{name}": round(value / max(wall, 1e-9), 4) for name, value in self.seconds.items()}
            self.metrics.line(
                {"step": self.step, **self.losses, "scale": scale, "skipped": self.skipped, "clips_per_second": round(rate, 2)}
                | shares
            )
        self.sums, self.counted, self.clips = {}, 0, 0
        self.seconds.clear()

    def _sample(self) -> None:
        if self.sample is None:
            return
        before = checkpoint.random_state(self.rng)
        with self._clock("sample"), torch.no_grad():
            self.sample(self.average.model, self.step)
        self.average.model.eval()
        checkpoint.restore_random_state(before)

    def _save(self) -> None:
        with self._clock("checkpoint"):
            self.metrics.sync()
            parts = {
                "model": self.model.state_dict(),
                "ema": self.average.model.state_dict(),
                "optimizer": self.optimizer.state(),
                "random": checkpoint.random_state(self.rng),
            }
            state = {
                "step": self.step,
                "updates": self.average.updates,
                "skipped": self.skipped,
                "in_a_row": self.in_a_row,
                "sums": self.sums,
                "counted": self.counted,
                "losses": self.losses,
                "bf16": self.bf16,
                "source": self.source.state(),
                "config": to_dict(self.config),
            }
            checkpoint.save(self.folder / "checkpoints", self.step, parts, state, self.config.keep)

    def _restore(self, found: checkpoint.Checkpoint, stored: Mapping[str, Any]) -> None:
        now = to_dict(self.config)
        for name in ("seed", "batch", "accumulate", "ema"):
            if stored["config"][name] != now[name]:
                raise UserError(
                    f"the run in {self.folder} has {name} {stored['config'][name]}, now it is {now[name]}; "
                    "keep it, or train in a new folder"
                )
        if stored["config"]["optimizer"]["kind"] != now["optimizer"]["kind"]:
            raise UserError(f"the run in {self.folder} uses another optimiser; keep it, or train in a new folder")
        _fill(self.model, found.tensors("model"), found.path)
        _fill(self.average.model, found.tensors("ema"), found.path)
        self.optimizer.restore(found.tensors("optimizer"))
        self.source.restore(stored["source"])
        checkpoint.restore_random_state(found.tensors("random"), self.rng)
        self.step, self.average.updates = int(stored["step"]), int(stored["updates"])
        self.skipped, self.in_a_row = int(stored["skipped"]), int(stored["in_a_row"])
        self.sums, self.counted, self.losses = dict(stored["sums"]), int(stored["counted"]), dict(stored["losses"])

    def _precision(self, stored: Mapping[str, Any] | None) -> bool:
        if self.config.precision != "auto":
            return self.config.precision == "bf16"
        if stored is not None:  # timing again could decide otherwise and part the run from itself
            return bool(stored["bf16"])
        return fast_bf16(self.device)

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        random.seed(self.config.seed)

    def _interrupt(self) -> None:
        self.interrupted = True

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class _Metrics:
    """metrics.jsonl, one JSON object a line, each with its step; TensorBoard beside it where asked for."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.board: Any = None
        self._new_board: Callable[..., Any] | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # imported late: an optional package
            except ImportError as error:
                raise UserError("TensorBoard is not installed; pip install tensorboard, or leave tensorboard off") from error
            self._new_board = functools.partial(SummaryWriter, str(folder / "tensorboard"))

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def cut(self, step: int) -> None:
        """Keep the lines up to a step: what came after it will be written again. A torn last line goes too. TensorBoard, which
        cannot be cut, is told to hide what came after."""
        if self._new_board is not None:
            self.board = self._new_board(purge_step=step + 1)
        kept: list[str] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def event(self, name: str, step: int, **facts: Any) -> None:
        self._append({"event": name, "step": step, **facts})

    def line(self, values: Mapping[str, float]) -> None:
        self._append(values)
        if self.board is not None:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(values["step"]))

    def sync(self) -> None:
        """To the disk, so that no checkpoint is newer than its metrics."""
        with open(self.path, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def _append(self, values: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error}); make room, then run the same command again") from error


@contextlib.contextmanager
def _signals(call: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `call`; a second SIGINT interrupts at once. Outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        call()

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(config: TrainConfig, step: int) -> Iterator[Callable[[int, Mapping[str, float], Mapping[str, float]], None]]:
    """A bar with the loss, steps per second and the share of time that each part of a step takes."""
    if not config.progress:
        yield lambda step, losses, seconds: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console(), refresh_per_second=2) as bar:
        task = bar.add_task("train", total=config.steps, completed=step, note="")
        begin, first = time.monotonic(), step
        note = ""

        def show(step: int, losses: Mapping[str, float], seconds: Mapping[str, float]) -> None:
            nonlocal note
            whole = sum(seconds.values())
            if whole > 0.0:
                note = " ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items())
            rate = (step - first) / max(time.monotonic() - begin, 1e-9)
            loss = f"loss {losses['loss']:.4f}" if "loss" in losses else ""
            bar.update(task, completed=step, note=f"{loss} {rate:.2f} steps/s {note}")

        yield show


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and lists of them as packs have, on `device`; everything else as it is."""
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _compiles(device: torch.device) -> bool:
    """Whether there is a compiler for what is computed on a CPU; says so where there is none."""
    if device.type != "cpu":
        return True
    from torch._inductor import cpp_builder, exc  # seconds, which only a training that compiles needs

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        warn("there is no C++ compiler, so training is not compiled and slower; install g++, or set compile=false")
        return False
    return True


def _compiled(model: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """Compile the modules of every `.blocks` in place, or the whole model; names in `state_dict` stay. `dynamic` as in
    `torch.compile`."""
    # Sizes, lengths and ways of masking make more graphs than the default of 8, after which compilation is given up.
    torch._dynamo.config.recompile_limit = 64
    lists = [module.blocks for module in model.modules() if isinstance(getattr(module, "blocks", None), nn.ModuleList)]
    for blocks in lists:
        for block in blocks:  # type: ignore[union-attr]
            block.compile(dynamic=dynamic)
    if not lists:
        model.compile(dynamic=dynamic)
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise UserError(f"{where} was written by another model (it differs in {', '.join(wrong[:3])}); train in a new folder")
    model.load_state_dict(tensors)
