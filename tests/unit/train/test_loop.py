from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from tubelet.core.errors import UserError
from tubelet.data.stream import TensorSource
from tubelet.train.loop import TrainConfig, learning_rate_scale, load_average, train
from tubelet.train.optim import OptimizerConfig, Split


def source() -> TensorSource:
    return TensorSource({"x": torch.randn(32, 4, generator=torch.Generator().manual_seed(0))}, seed=0)


def objective(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
    return {"loss": (model(batch["x"]) - batch["x"].flip(1)).square().mean()}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **({"steps": 6, "batch": 8, "precision": "fp32", "device": "cpu", "progress": False, "log_every": 1} | changes)
    )


def test_the_schedule_rises_falls_and_ends_at_zero() -> None:
    scales = [learning_rate_scale(step, 100, 9) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[4] == pytest.approx(0.5 * 0.96)
    assert scales[9] == pytest.approx(0.91)
    assert scales[50] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.01)
    assert scales[100] == 0.0
    assert learning_rate_scale(0, 10, 0) == 1.0
    assert scales.index(max(scales)) == 9


def test_a_stage_that_another_follows_ends_above_zero() -> None:
    scales = [learning_rate_scale(step, 100, 9, end=0.4) for step in range(101)]
    assert scales[50] == pytest.approx(0.7)
    assert scales[100] == pytest.approx(0.4)
    with pytest.raises(UserError, match="end is a share"):
        settings(end=1.5)


def test_accumulated_equals_whole(tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        results.append(train(model, objective, source(), settings(accumulate=accumulate), tmp_path / str(accumulate)))
    for a, b in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_first_update_is_the_written_one(tmp_path: Path) -> None:
    """Clipped gradient, warm-up share of the rate, AdamW's first step: sign(g) * rate."""
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    config = settings(steps=1, warmup=1, optimizer=OptimizerConfig(kind="adamw", learning_rate_adamw=0.01), clip=1e-2)
    result = train(model, objective, source(), config, tmp_path)
    change = before - result.model.weight.detach()  # type: ignore[union-attr]
    assert torch.allclose(change.abs(), torch.full_like(change, 0.005), rtol=1e-3)
    assert torch.equal(result.ema.weight, result.model.weight)  # type: ignore[arg-type]


def test_an_own_split_is_used(tmp_path: Path) -> None:
    asked = []

    def own(model: nn.Module) -> Split:
        asked.append(model)
        return Split({}, dict(model.named_parameters()))

    train(nn.Linear(4, 4), objective, source(), settings(), tmp_path, split=own)
    assert len(asked) == 1


class Block(nn.Module):
    """What is written here is compiled: torch's own layers are not, when they stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no compiler")
def test_compiled_equals_eager(tmp_path: Path) -> None:
    results, graphs = [], counters["stats"]["unique_graphs"]
    for compiled in (False, True):
        torch.manual_seed(0)
        results.append(train(Blocks(), objective, source(), settings(compile=compiled), tmp_path / str(compiled)))
    assert counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    eager, compiled = results
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
    for a, b in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_without_a_compiler_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    torch.manual_seed(0)
    train(Blocks(), objective, source(), settings(compile=True), tmp_path)
    assert "there is no C++ compiler" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_run_resumes_exactly(tmp_path: Path) -> None:
    results = []
    for name, stops in (("whole", (6,)), ("parts", (1, 4, 6))):
        for stop in stops:
            torch.manual_seed(0)
            model, where = Blocks(), tmp_path / name
            result = train(model, objective, source(), settings(compile=True), where, stop=lambda step, stop=stop: step == stop)
        results.append(result)
    whole, parts = results
    assert whole.finished
    assert parts.finished
    assert whole.losses == parts.losses
    for model in ("model", "ema"):
        for a, b in zip(getattr(whole, model).parameters(), getattr(parts, model).parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_has_one_form_is_compiled_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: asked.append(k["dynamic"]))

    class Uniform:
        uniform = True

        def __call__(self, *args: Any) -> dict[str, Tensor]:
            return objective(*args)

    train(Blocks(), Uniform(), source(), settings(compile=True), tmp_path / "a")
    train(Blocks(), objective, source(), settings(compile=True), tmp_path / "b")
    assert asked == [False, False, None, None]


def test_the_blocks_are_compiled_or_the_whole_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    model = nn.Sequential(Blocks())
    train(model, objective, source(), settings(compile=True), tmp_path / "a")
    assert compiled == list(model[0].blocks)  # type: ignore[arg-type]
    compiled.clear()
    plain = nn.Linear(4, 4)
    train(plain, objective, source(), settings(compile=True), tmp_path / "b")
    assert compiled == [plain]


def test_a_run_of_which_every_update_was_skipped_is_no_run(tmp_path: Path) -> None:
    def lost(model: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        return {"loss": objective(model, batch, rng)["loss"] * float("nan")}

    with pytest.raises(UserError, match="each of the 6 updates was skipped"):
        train(nn.Linear(4, 4), lost, source(), settings(), tmp_path)
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_average(tmp_path, nn.Linear(4, 4))
    assert train(nn.Linear(4, 4), objective, source(), settings(), tmp_path).finished, "the mended command begins anew"


def test_metrics_say_what_was_decided(tmp_path: Path) -> None:
    result = train(nn.Linear(4, 4), objective, source(), settings(precision="auto", log_every=2, tensorboard=True), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start"
    assert rows[0]["bf16"] == rows[0]["trial"]["fast"]
    assert rows[0]["parameters"] == 20
    assert [row["step"] for row in rows[1:]] == [2, 4, 6]
    assert rows[-1]["loss"] == result.losses["loss"]
    assert {"gradient_norm", "scale", "clips_per_second", "share_data", "share_gradient", "share_optimizer"} <= rows[1].keys()
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_progress_bar_and_other_threads_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: list[Any] = []

    def work() -> None:
        results.append(train(nn.Linear(4, 4), objective, source(), settings(progress=True), tmp_path))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].finished
    shown = capsys.readouterr()
    assert "6/6" in shown.err
    assert shown.out == ""  # stdout stays data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"accumulate": 3}, "does not divide"),
        ({"warmup": -1}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes"),
        ({"precision": "fp16"}, "precision"),
        ({"keep": 0}, "keep"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    def go(**more: Any) -> None:
        torch.manual_seed(0)
        train(nn.Linear(4, 4), objective, source(), settings(tensorboard=True, checkpoint_every=2), tmp_path, **more)

    def stop(step: int) -> bool:
        if step == 3:
            raise KeyboardInterrupt  # at once: the last checkpoint is that of step 2
        return False

    with pytest.raises(KeyboardInterrupt):
        go(stop=stop)
    go()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train(nn.Linear(4, 4), objective, source(), settings(), tmp_path / "file")
    with pytest.raises(UserError, match="device"):
        train(nn.Linear(4, 4), objective, source(), settings(device="tpu"), tmp_path / "run")
    with pytest.raises(UserError, match="sigma_rel"):
        train(nn.Linear(4, 4), objective, source(), settings(ema=0.5), tmp_path / "run")
