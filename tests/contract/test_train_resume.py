"""The promises of a training run: resumed == uninterrupted bit for bit, and no crash loses the newest whole checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

from unpickling import assert_quiet, watched

from tubelet.core.errors import UserError
from tubelet.data.schema import Record
from tubelet.data.shards import ShardDataset, ShardWriter
from tubelet.data.stream import BucketStream, Source, Stream, TensorSource
from tubelet.train import checkpoint
from tubelet.train.loop import TrainConfig, TrainResult, load_average, train
from tubelet.train.optim import OptimizerConfig

STEPS = 24


class Network(nn.Module):
    """Blocks for Muon, dropout for the global generator, batch statistics for buffers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width)) for _ in range(2)]
        )
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x.flatten(0, -2)).view(x.shape))


def objective(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
    x = batch["latent"].float().movedim(1, -1)  # (B, T, h, w, C)
    noisy = x + 0.1 * torch.randn(x.shape, generator=rng) + 0.01 * float(np.random.rand())
    letters = torch.tensor([float(len(caption)) for caption in batch["caption"]])  # (B,): the drawn captions matter
    loss = (model(noisy) - x.roll(1, -1)).square().mean() + 1e-3 * letters.mean()
    return {"loss": loss, "letters": letters.mean()}


def records(shapes: list[tuple[int, int, int]], count: int = 30) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    captions = [{"text": "a" * n, "kind": kind} for n, kind in ((3, "short"), (7, "dense"), (5, "human"))]
    return [
        Record(f"r{n}", {"latent": torch.randn(4, *shapes[n % len(shapes)], generator=generator)}, {"captions": captions})
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sets_in(tmp_path_factory.mktemp("shards"))


def sets_in(base: Path) -> dict[str, Path]:
    """Two data sets in a folder: of equal shapes and of mixed ones."""
    for name, shapes in (("equal", [(3, 2, 2)]), ("mixed", [(3, 2, 2), (1, 2, 2), (3, 1, 2)])):
        with ShardWriter(base / name, 8000) as writer:
            for record in records(shapes):
                writer.add(record)
    return {"equal": base / "equal", "mixed": base / "mixed"}


def make_source(kind: str, folders: dict[str, Path]) -> Source:
    if kind == "memory":
        return TensorSource.load(ShardDataset(folders["equal"]), ["latent"], seed=5)
    if kind == "stream":
        return Stream(ShardDataset(folders["equal"]), seed=5)
    data = ShardDataset(folders["mixed"])
    return BucketStream(data, [shape[1:] for shape in data.shapes("latent")], seed=5, budget=40)


def settings(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": STEPS, "batch": 8, "accumulate": 2, "warmup": 4, "log_every": 5, "checkpoint_every": 7, "precision": "fp32",
        "device": "cpu", "progress": False, "seed": 11,
    }  # fmt: skip
    return TrainConfig(**(defaults | changes))


def call(
    folder: Path,
    source: Source,
    config: TrainConfig | None = None,
    stop_at: int | None = None,
    objective: Any = objective,
    **more: Any,
) -> TrainResult:
    torch.manual_seed(99)
    stop = None if stop_at is None else lambda step: step >= stop_at
    return train(Network(), objective, source, config or settings(), folder, stop=stop, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The logged numbers without the clock's."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("share_", "clips_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "event" not in row]


def assert_same_run(one: TrainResult, other: TrainResult, folder: Path, other_folder: Path) -> None:
    for a, b in ((one.model, other.model), (one.ema, other.ema)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    assert lines(folder) == lines(other_folder)
    assert one.losses == other.losses
    found, twin = checkpoint.newest(folder / "checkpoints"), checkpoint.newest(other_folder / "checkpoints")
    assert found is not None
    assert twin is not None
    assert found.step == twin.step
    assert found.state() == twin.state()
    for part in ("model", "ema", "optimizer", "random"):
        a, b = found.tensors(part), twin.tensors(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)) for name in a), part


@pytest.mark.parametrize("kind", ["memory", "stream", "buckets"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_is_uninterrupted_at_many_stops(kind: str, optimizer: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = settings(optimizer=OptimizerConfig(kind=optimizer, weight_decay=0.01))
    whole = call(tmp_path / "whole", make_source(kind, folders), config)
    assert whole.finished
    assert whole.step == STEPS
    assert lines(tmp_path / "whole")[-1]["loss"] < lines(tmp_path / "whole")[0]["loss"]
    for stops in ([1], [3, 4, 5], [7, 14], [10, 23], list(range(2, STEPS, 2))):
        folder = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            part = call(folder, make_source(kind, folders), config, stop)
            assert (part.step, part.finished) == (stop, False)
        assert_same_run(whole, call(folder, make_source(kind, folders), config), tmp_path / "whole", folder)


def test_bf16_resumes_exactly_too(folders: dict[str, Path], tmp_path: Path) -> None:
    config = settings(precision="bf16")
    whole = call(tmp_path / "whole", make_source("memory", folders), config)
    call(tmp_path / "parts", make_source("memory", folders), config, 9)
    assert_same_run(
        whole, call(tmp_path / "parts", make_source("memory", folders), config), tmp_path / "whole", tmp_path / "parts"
    )


def test_an_old_checkpoint_replays_to_the_same_end(folders: dict[str, Path], tmp_path: Path) -> None:
    """As after a crash: steps beyond the newest whole checkpoint were done and logged, and are done again."""
    whole = call(tmp_path / "whole", make_source("memory", folders))
    call(tmp_path / "torn", make_source("memory", folders), stop_at=19)
    newest = tmp_path / "torn" / "checkpoints" / "step-00000019"
    (newest / "ema.safetensors").write_bytes(b"torn")
    with open(tmp_path / "torn" / "metrics.jsonl", "a") as file:
        file.write('{"step": 19, "lo')
    assert [row["step"] for row in lines_of_numbers(tmp_path / "torn")] == [5, 10, 15]
    assert_same_run(whole, call(tmp_path / "torn", make_source("memory", folders)), tmp_path / "whole", tmp_path / "torn")


def lines_of_numbers(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "event" not in row:
            rows.append(row)
    return rows


def test_samples_and_checkpoint_times_do_not_disturb_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    steps: list[int] = []

    def sample(model: nn.Module, step: int) -> None:
        assert not model.training
        steps.append(step)
        torch.rand(3)
        np.random.rand()

    whole = call(tmp_path / "whole", make_source("memory", folders), settings(checkpoint_every=0))
    other = call(
        tmp_path / "other", make_source("memory", folders), settings(sample_every=6, checkpoint_minutes=1e-9), sample=sample
    )
    assert steps == [6, 12, 18, 24]
    assert lines(tmp_path / "whole") == lines(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.parameters(), other.ema.parameters(), strict=True))
    assert sorted(path.name for path in (tmp_path / "other" / "checkpoints").iterdir()) == ["step-00000023", "step-00000024"]
    again = call(tmp_path / "other", make_source("memory", folders), sample=sample)
    assert again.finished
    assert steps == [6, 12, 18, 24], "a finished run does nothing more"
    assert again.losses == other.losses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, folders: dict[str, Path], tmp_path: Path) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 21:  # inside step 11, before its second micro-batch
            os.kill(os.getpid(), number)
        return objective(model, batch, rng)

    before = signal.getsignal(number)
    whole = call(tmp_path / "whole", make_source("memory", folders))
    part = call(tmp_path / "part", make_source("memory", folders), objective=interrupted)
    assert (part.step, part.finished) == (11, False)
    assert signal.getsignal(number) == before
    assert_same_run(whole, call(tmp_path / "part", make_source("memory", folders)), tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_kill_9_leaves_a_whole_checkpoint_and_the_same_end(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch
        from torch import nn
        from tubelet.data.stream import TensorSource
        from tubelet.train.loop import TrainConfig, train
        torch.set_num_threads(1)
        torch.manual_seed(0)
        def objective(model, batch, rng):
            return {"loss": (model(batch["x"] + torch.randn(batch["x"].shape, generator=rng)) - batch["x"]).square().mean()}
        source = TensorSource({"x": torch.randn(64, 32)}, seed=1)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        config = TrainConfig(steps=60, batch=8, checkpoint_every=1, precision="fp32", device="cpu", progress=False)
        train(model, objective, source, config, sys.argv[1])
        """)
    )

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE)

    killed = tmp_path / "killed"
    for least in (3, 20):
        process = start(killed)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            found = [int(path.name[5:]) for path in (killed / "checkpoints").glob("step-*")]
            if found and max(found) >= least:
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
        found = checkpoint.newest(killed / "checkpoints")
        assert found is not None
        assert found.step >= least
    for folder in (killed, tmp_path / "whole"):
        process = start(folder)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    ends = [checkpoint.newest(folder / "checkpoints") for folder in (killed, tmp_path / "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    for part in ("model", "ema", "optimizer"):
        one, other = ends[0].tensors(part), ends[1].tensors(part)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert lines(killed) == lines(tmp_path / "whole")


def test_a_full_disk_stops_with_the_old_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call(tmp_path / "whole", make_source("memory", folders))
    real, saves = checkpoint.save_file, 0

    def full(*args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > 9:  # four files a checkpoint: the third one does not fit
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="make room"):
        call(tmp_path / "full", make_source("memory", folders))
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path / "full" / "checkpoints")
    assert found is not None
    assert found.step == 14
    assert_same_run(whole, call(tmp_path / "full", make_source("memory", folders)), tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(where: str, folders: dict[str, Path], tmp_path: Path) -> None:
    calls = 0

    def spiky(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        losses = objective(model, batch, rng)
        if calls in (5, 6, 12):
            # sqrt at 0 has an infinite slope, times 0: a finite loss with a gradient of NaN.
            weight = next(model.parameters())
            bad = losses["loss"] * float("nan") if where == "loss" else losses["loss"] + (weight * 0).sum().sqrt()
            return {**losses, "loss": bad}
        return losses

    result = call(tmp_path / "run", make_source("memory", folders), settings(accumulate=1), objective=spiky)
    assert result.finished
    assert result.skipped == 3
    assert all(p.isfinite().all() for p in result.model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("event") == "skip"] == [5, 6, 12]
    assert rows[-1]["skipped"] == 3
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.state()["updates"] == STEPS - 3


def test_a_run_that_stays_not_finite_stops_and_says_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    calls = 0

    def lost(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        losses = objective(model, batch, rng)
        return {"loss": losses["loss"] * (float("inf") if calls > 20 else 1.0)}

    config = settings(accumulate=1, patience=3)
    with pytest.raises(UserError, match=r"3 steps in a row \(step 23\).*lower the learning rate"):
        call(tmp_path / "run", make_source("memory", folders), config, objective=lost)
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 21, "the checkpoint of step 21 is from before the trouble was known"
    assert all(value.isfinite().all() for value in found.tensors("model").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 1}, "seed 11"), ({"batch": 4}, "batch 8"), ({"accumulate": 1}, "accumulate 2"), ({"ema": 0.05}, "ema 0.1")],
)
def test_a_run_cannot_go_on_with_other_settings(changes: dict, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    call(tmp_path, make_source("memory", folders), stop_at=2)
    with pytest.raises(UserError, match=message):
        call(tmp_path, make_source("memory", folders), settings(**changes))


def test_a_run_cannot_go_on_with_another_model_data_or_optimiser(folders: dict[str, Path], tmp_path: Path) -> None:
    call(tmp_path, make_source("memory", folders), stop_at=2)
    with pytest.raises(UserError, match="another model"):
        train(Network(8), objective, make_source("memory", folders), settings(), tmp_path)
    with pytest.raises(UserError, match="data position"):
        call(tmp_path, TensorSource({"latent": torch.zeros(3, 4, 3, 2, 2)}, seed=5))
    with pytest.raises(UserError, match="another optimiser"):
        call(tmp_path, make_source("memory", folders), settings(optimizer=OptimizerConfig(kind="adamw")))
    with pytest.raises(UserError, match="no trainable parameter"):
        call(
            tmp_path / "none",
            make_source("memory", folders),
            objective=lambda m, b, r: {"loss": torch.ones((), requires_grad=True)},
        )


def test_a_finished_run_can_be_made_longer(folders: dict[str, Path], tmp_path: Path) -> None:
    call(tmp_path, make_source("memory", folders))
    longer = call(tmp_path, make_source("memory", folders), settings(steps=30))
    assert (longer.step, longer.finished) == (30, True)
    model = Network()
    assert load_average(tmp_path, model) == 30
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), longer.ema.parameters(), strict=True))
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_average(tmp_path / "nowhere", model)


def test_a_run_that_goes_on_unpickles_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """It writes checkpoints, loads the newest one with its random states, and reads data of every kind."""
    code = """
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_train_resume import STEPS, Network, call, load_average, make_source
folders = {"equal": Path(sys.argv[2]), "mixed": Path(sys.argv[3])}
for kind in ("memory", "stream", "buckets"):
    folder = Path(sys.argv[4]) / kind
    assert not call(folder, make_source(kind, folders), stop_at=9).finished
    assert call(folder, make_source(kind, folders)).finished
    assert load_average(folder, Network()) == STEPS
"""
    assert_quiet(watched(code, Path(__file__).parent, folders["equal"], folders["mixed"], tmp_path))
