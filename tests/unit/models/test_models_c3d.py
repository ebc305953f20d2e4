from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module
from tubelet.models.c3d import C3D, SIZES, C3DConfig, example, stated, tiny

TINY = tiny(SIZES["487"])


@pytest.mark.parametrize(("size", "published"), [("487", 79.99), ("101", 78.41)])
def test_counts(size: str, published: float) -> None:
    config = SIZES[size]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = C3D(config)
        model(*example(config))
    weights = sum(p.numel() for p in model.parameters())
    layers = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    linears = [(8192, 4096), (4096, 4096), (4096, config.classes)]
    assert weights == sum(27 * a * b + b for a, b in layers) + sum(a * b + b for a, b in linears)
    assert weights / 1e6 == pytest.approx(published, abs=0.006)
    cells = [16 * 112**2, 16 * 56**2, *[8 * 28**2] * 2, *[4 * 14**2] * 2, *[2 * 7**2] * 2]
    macs = sum(n * 27 * a * b for n, (a, b) in zip(cells, layers, strict=True)) + sum(a * b for a, b in linears)
    assert counter.get_total_flops() // 2 == macs


@pytest.mark.parametrize(("frames", "size", "cells"), [(16, 112, 16), (16, 64, 4), (17, 64, 4), (32, 48, 8), (16, 16, 1)])
def test_the_last_pool_loses_no_row(frames: int, size: int, cells: int) -> None:
    config = C3DConfig(3, frames, size, width=1, hidden=4)
    model = C3D(config)
    assert model.fc6.in_features == 8 * cells
    video = torch.zeros(1, 3, frames, size, size, requires_grad=True)
    for layer in model.modules():  # every value counts
        if isinstance(layer, torch.nn.Conv3d):
            torch.nn.init.constant_(layer.weight, 0.01)
            torch.nn.init.constant_(layer.bias, 1.0)
    torch.nn.init.constant_(model.fc6.weight, 1.0)
    model.features(video + torch.rand_like(video)).sum().backward()
    assert video.grad is not None
    seen = video.grad.abs().sum((0, 1, 2)) > 0
    assert seen[-1].any(), "the last row"
    assert seen[:, -1].any(), "the last column"


def test_the_first_pool_leaves_time_alone() -> None:
    model = C3D(TINY)
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        next(stage.children()).register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[2:])))
    model(*example(TINY))
    assert shapes == [(16, 48, 48), (16, 24, 24), (8, 12, 12), (4, 6, 6), (2, 3, 3)]


def test_contract(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = C3D(TINY)
    (video,) = example(TINY, 3)
    video.requires_grad_()
    out = model(video)
    assert out.shape == (3, 5)
    assert model.features(video).shape == (3, 16)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in video]), out, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    for name, p in [*model.named_parameters(), ("video", video)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    save_module(tmp_path / "m.safetensors", model)
    other = C3D(from_dict(C3DConfig, to_dict(TINY)))
    load_module(tmp_path / "m.safetensors", other)
    assert torch.equal(other(video), out)


def test_the_signal_keeps_its_size_through_the_layers() -> None:
    torch.manual_seed(0)
    model = C3D(replace(TINY, width=16, hidden=64))
    spread = model.features(*example(model.config, 2)).detach().square().mean().sqrt()
    assert 0.3 < float(spread) < 6


def test_dropout_is_for_training_only() -> None:
    model = C3D(replace(TINY, dropout=0.5))
    (video,) = example(TINY)
    assert not torch.equal(model(video), model(video))
    model.eval()
    assert torch.equal(model(video), model(video))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 0}, "at least 1"),
        ({"frames": 15}, "give a larger clip"),
        ({"size": 8}, "give a larger clip"),
        ({"dropout": 1.0}, "the paper's is 0.5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(C3DConfig, to_dict(C3DConfig()) | settings)


def test_another_video_is_refused_and_the_stated_one_is_made() -> None:
    with pytest.raises(UserError, match="resize or sample the clip"):
        C3D(TINY)(torch.randn(1, 3, 16, 48, 64))
    assert stated(SIZES["101"]) == "3 x 16 x 112 x 112 video (C, T, H, W)"
    with torch.device("meta"):
        assert example(SIZES["101"], 2)[0].shape == (2, 3, 16, 112, 112)
