"""Codecs against discriminators: each player's gradient is that of its own loss, and a stopped contest goes on as if it had
not been."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.codecs import image_kl, magvit2
from tubelet.codecs.image_kl import ImageKL, ImageKLLossConfig, ImageKLObjective, discriminator_loss, image_kl_loss
from tubelet.codecs.losses import to_pixels
from tubelet.codecs.magvit2 import MAGVIT2, Discriminator3d, Weights, discriminator_losses, moved, tokenizer_losses
from tubelet.core.errors import UserError
from tubelet.data.stream import TensorSource
from tubelet.nn.adversarial import PatchDiscriminator
from tubelet.train import checkpoint
from tubelet.train.adversary import Contest, KLContestObjective, MAGVITContestObjective, contest_split
from tubelet.train.loop import TrainConfig, TrainResult, train
from tubelet.train.optim import OptimizerConfig, split

KL = ImageKLLossConfig(start=3, kl=1e-3)
MAGVIT = Weights(start=3, entropy_steps=8)
Objective = KLContestObjective | MAGVITContestObjective


def kl(judged: bool = True) -> Contest:
    torch.manual_seed(0)
    codec = ImageKL(image_kl.tiny(image_kl.SIZES["KL-f8"]))
    return Contest(codec, PatchDiscriminator(width=4, layers=1) if judged else None)


def magvit(judged: bool = True) -> Contest:
    torch.manual_seed(0)
    codec = MAGVIT2(magvit2.tiny(magvit2.SIZES["MAGVIT2"]))
    return Contest(codec, Discriminator3d((5, 16, 16), 4, (2, 2), 2) if judged else None)


BOTH = pytest.mark.parametrize(
    ("make", "objective"),
    [(kl, KLContestObjective(config=KL)), (magvit, MAGVITContestObjective(weights=MAGVIT))],
    ids=["KL-f8", "MAGVIT-v2"],
)


def films(count: int = 6) -> Tensor:
    return (torch.rand(count, 5, 16, 16, 3, generator=rng(1)) * 255).to(torch.uint8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    found, wanted = gradients(one), gradients(other)
    assert any(value is not None and value.any() for value in found.values())
    for name, value in found.items():
        theirs = wanted[name]
        assert (value is None) == (theirs is None), name
        if value is not None and theirs is not None:
            torch.testing.assert_close(value, theirs, atol=1e-7, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# Gradients


def test_both_players_of_kl_learn_from_their_own_loss_alone() -> None:
    model, batch = kl(), {"video": films(2)}
    model.step.fill_(KL.start)
    apart = deepcopy(model)
    losses = KLContestObjective(config=KL, perceptual=squared)(model, batch, rng())
    losses["loss"].backward()

    codec, judge = apart.codec, apart.discriminator
    assert isinstance(codec, ImageKL)
    assert isinstance(judge, PatchDiscriminator)
    pixels = to_pixels(batch["video"])
    restored, posterior = codec.restore(pixels, rng())
    own = image_kl_loss(codec, pixels, restored, posterior, KL, perceptual=squared, discriminator=judge, step=KL.start)
    own["loss"].backward()
    assert all(p.grad is None for p in judge.parameters())
    against = discriminator_loss(judge, pixels, restored)
    against.backward()
    torch.testing.assert_close(losses["loss"], own["loss"] + against)
    torch.testing.assert_close(losses["discriminator"], against)
    assert {"adversarial", "adaptive_weight"} <= losses.keys()
    assert_same(model, apart)


def test_both_players_of_magvit_learn_from_their_own_loss_alone() -> None:
    model, batch, step = magvit(), {"video": films(2)}, 5
    model.step.fill_(step)
    model.anchors.copy_(torch.tensor([0.3, -0.2]))
    weights = replace(MAGVIT, lecam=1.0)  # felt
    apart = deepcopy(model)
    losses = MAGVITContestObjective(weights=weights, perceptual=squared)(model, batch, rng())
    losses["loss"].backward()

    codec, judge = apart.codec, apart.discriminator
    assert isinstance(codec, MAGVIT2)
    assert judge is not None
    pixels = to_pixels(batch["video"])
    own, restored = tokenizer_losses(codec, judge, pixels, step, weights, perceptual=squared)
    own["loss"].backward()
    assert all(p.grad is None for p in judge.parameters())
    against = discriminator_losses(judge, pixels, restored, apart.anchors, weights)
    against["loss"].backward()
    torch.testing.assert_close(losses["loss"], own["loss"] + against["loss"])
    torch.testing.assert_close(losses["discriminator_lecam"], against["lecam"])
    assert losses["discriminator_lecam"] > 0
    assert_same(model, apart)
    torch.testing.assert_close(model.anchors, moved(apart.anchors, against["real"], against["fake"]))


def test_without_the_adversary_kl_learns_as_by_the_plain_objective() -> None:
    batch, plain = {"video": films(2)}, kl().codec
    wanted = ImageKLObjective(KL, squared)(plain, batch, rng())  # type: ignore[arg-type]
    wanted["loss"].backward()
    for model in (kl(), kl(judged=False)):
        losses = KLContestObjective(config=KL, perceptual=squared)(model, batch, rng())
        losses["loss"].backward()
        assert losses == wanted
        assert_same(model.codec, plain)
        assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("discriminator."))


def test_without_the_adversary_magvit_learns_as_by_the_plain_losses() -> None:
    batch, plain = {"video": films(2)}, magvit().codec
    assert isinstance(plain, MAGVIT2)
    for step, model in ((2, magvit()), (7, magvit(judged=False))):
        model.step.fill_(step)
        plain.zero_grad()
        wanted, _ = tokenizer_losses(plain, None, to_pixels(batch["video"]), step, MAGVIT, perceptual=squared)
        wanted["loss"].backward()
        losses = MAGVITContestObjective(weights=MAGVIT, perceptual=squared)(model, batch, rng())
        losses["loss"].backward()
        assert losses == wanted
        assert_same(model.codec, plain)
        assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("discriminator."))
        assert not model.anchors.any()


@BOTH
def test_half_precision_is_finite(make: Callable[[], Contest], objective: Objective) -> None:
    model = make()
    model.step.fill_(5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(model, {"video": films(2)}, rng())
    losses["loss"].backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_a_batch_without_films_is_refused() -> None:
    for model, objective in ((kl(), KLContestObjective()), (magvit(), MAGVITContestObjective())):
        with pytest.raises(UserError, match="the batch has latent; read shards of pixels"):
            objective(model, {"latent": films()}, rng())
        with pytest.raises(UserError, match="five axes"):
            objective(model, {"video": films()[0]}, rng())
    with pytest.raises(UserError, match="this discriminator sees clips"):
        MAGVITContestObjective()(magvit(), {"video": films()[:, :1]}, rng())


# Steps, anchors, and who trains whom


def test_the_weight_of_entropy_and_the_adversary_follow_the_step() -> None:
    model, objective, batch = magvit(), MAGVITContestObjective(weights=MAGVIT), {"video": films(2)}
    for step in range(6):
        losses = objective(model, batch, rng())
        assert int(model.step) == step + 1
        assert ("adversarial" in losses) == ("discriminator" in losses) == (step >= 3)
        terms = {name: losses[name] for name in ("reconstruction", "entropy", "commitment")}
        scales = {"reconstruction": 5.0, "commitment": 0.25, "entropy": 0.1 * (1 + 2 * (1 - step / 8))}
        total = sum(scales[name] * value for name, value in terms.items())
        if step >= 3:
            total = total + 0.1 * losses["adversarial"] + losses["discriminator"]
        torch.testing.assert_close(losses["loss"], total)
        assert bool(model.anchors.any()) == (step >= 3)
        losses["loss"].backward()
        more = objective(model, batch, rng())  # gradients are there: a further part of the same update
        assert int(model.step) == step + 1
        assert ("adversarial" in more) == (step >= 3)
        model.zero_grad()


def test_logits_that_are_not_finite_leave_the_anchors_as_they_are() -> None:
    model = magvit()
    model.move_anchors(torch.tensor(3.0), torch.tensor(-2.0))
    before = model.anchors.clone()
    torch.testing.assert_close(before, torch.tensor([0.003, -0.002]))
    model.move_anchors(torch.tensor(float("nan")), torch.tensor(1.0))
    model.move_anchors(torch.tensor(1.0), torch.tensor(float("-inf")))
    assert torch.equal(model.anchors, before)


@BOTH
def test_the_codec_is_split_as_alone_and_the_discriminator_goes_to_adamw(
    make: Callable[..., Contest], objective: Objective
) -> None:
    for model in (make(), make(judged=False)):
        muon, adamw = contest_split(model)
        assert muon.keys() == {f"codec.{name}" for name in split(model.codec).muon}
        assert muon
        assert muon.keys() | adamw.keys() == {name for name, _ in model.named_parameters()}
        assert not muon.keys() & adamw.keys()


# In the loop


def settings(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": 8, "batch": 4, "accumulate": 2, "warmup": 1, "log_every": 3, "precision": "fp32", "device": "cpu",
        "progress": False, "seed": 11, "clip": 1e6, "optimizer": OptimizerConfig(betas=(0.5, 0.9)),
    }  # fmt: skip
    return TrainConfig(**(defaults | changes))


def call(
    folder: Path, make: Callable[[], Contest], objective: Objective, stop_at: int | None = None, **changes: Any
) -> TrainResult:
    source = TensorSource({"video": films()}, seed=5)
    stop = None if stop_at is None else lambda step: step >= stop_at
    return train(make(), objective, source, settings(**changes), folder, split=contest_split, stop=stop)


@BOTH
def test_a_contest_resumed_is_the_uninterrupted_one(make: Callable[[], Contest], objective: Objective, tmp_path: Path) -> None:
    whole = call(tmp_path / "whole", make, objective)
    assert whole.finished
    for stop in (2, 3, 5):  # before the adversary joins, as it does, after
        assert call(tmp_path / "parts", make, objective, stop).step == stop
    parts = call(tmp_path / "parts", make, objective)
    for one, other in ((whole.model, parts.model), (whole.ema, parts.ema)):
        theirs = other.state_dict()
        for name, value in one.state_dict().items():
            assert torch.equal(value, theirs[name]), name
    assert whole.losses == parts.losses
    found = [checkpoint.newest(tmp_path / folder / "checkpoints") for folder in ("whole", "parts")]
    assert found[0] is not None
    assert found[1] is not None
    for part in ("model", "ema", "optimizer", "random"):
        a, b = found[0].tensors(part), found[1].tensors(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)) for name in a), part

    # Micro-batches are no updates, and what is averaged or kept has the step and the anchors, too.
    start, ended = make(), whole.model
    assert isinstance(ended, Contest)
    for contest in (ended, whole.ema):
        assert int(contest.step) == 8  # type: ignore[arg-type]
        assert torch.equal(contest.anchors, ended.anchors)  # type: ignore[arg-type]
    assert bool(ended.anchors.any()) == isinstance(objective, MAGVITContestObjective)
    assert {"step", "anchors"} <= found[0].tensors("model").keys()
    for name, value in start.named_parameters():
        # Inside the hinge real and made pull at this bias alike.
        if name != "discriminator.last.bias":
            assert not torch.equal(value, dict(ended.named_parameters())[name]), f"{name} has not learned"


@BOTH
def test_the_discriminator_learns_from_the_start_on_only(
    make: Callable[[], Contest], objective: Objective, tmp_path: Path
) -> None:
    early = call(tmp_path, make, objective, 3)
    fresh, judged = make().discriminator, early.model.discriminator
    assert isinstance(fresh, nn.Module)
    assert isinstance(judged, nn.Module)
    for (name, a), (_, b) in zip(fresh.state_dict().items(), judged.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    later = call(tmp_path, make, objective, 4).model.discriminator
    assert isinstance(later, nn.Module)
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), later.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not any("discriminator" in row for row in rows if row["step"] <= 3)
