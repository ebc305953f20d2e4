"""What every room of `models/` promises, each entry of MODELS at its tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.catalogue import MODELS, count
from tubelet.core.types import Condition
from tubelet.core.weights import load_module, save_module

# Sizes that differ only in width and depth are one tiny model: each is tried once.
TINY: dict[tuple[Any, Any], str] = {}
for _name, _entry in MODELS.items():
    TINY.setdefault((_entry.build, _entry.tiny(_entry.config)), _name)

UNREAD = {"VTN-B": ("temporal.blocks.1.attention.qkv.",)}
"""Weights without gradient by design: only the class token leaves the last Longformer layer, by its global attention."""


@pytest.fixture(params=list(TINY.values()))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A tiny model as after some training (nothing is zero any more), and inputs of a batch of three."""
    entry = MODELS[name]
    config = entry.tiny(entry.config)
    torch.manual_seed(0)
    model = entry.build(config)
    for parameter in model.parameters():
        if parameter.eq(0).all() or parameter.eq(1).all():
            nn.init.normal_(parameter, mean=float(parameter.detach().flatten()[0]), std=0.05)
    return model, tuple(_real(value) for value in entry.example(config, 3))


def _real(value: Any) -> Any:
    """Inputs that differ from sample to sample; examples may be zeros, since they are counted and not looked at."""
    if isinstance(value, Tensor) and value.is_floating_point() and bool(value.eq(0).all()):
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    if isinstance(value, Condition):
        return Condition(_real(value.states), value.mask)
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Condition):
        return [value.states]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else vars(value).values()
    return [tensor for part in parts for tensor in tensors(part)]


def row(value: Any, place: int) -> Any:
    """One sample of an input."""
    return value[place : place + 1] if isinstance(value, (Tensor, Condition, list)) else value


def test_gradient_reaches_every_parameter(name: str) -> None:
    model, inputs = built(name)
    model.train()
    out = tensors(model(*inputs))
    assert all(one.isfinite().all() for one in out)
    torch.stack([(one.float() * torch.randn_like(one.float())).sum() for one in out]).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not any(key.startswith(start) for start in UNREAD.get(name, ())):
            assert parameter.grad.abs().sum() > 0, key


@torch.no_grad()
def test_a_batch_is_its_singles(name: str) -> None:
    model, inputs = built(name)
    model.eval()
    together = tensors(model(*inputs))
    batched = [i for i, one in enumerate(together) if one.ndim and len(one) == 3]
    assert batched, "some output has a row for each sample"
    for place in range(3):
        alone = tensors(model(*(row(value, place) for value in inputs)))
        for i in batched:
            torch.testing.assert_close(alone[i], together[i][place : place + 1], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_built_on_meta_then_filled_it_is_built_in_place(name: str) -> None:
    entry = MODELS[name]
    config = entry.tiny(entry.config)
    now: Any = entry.build(config)
    if not hasattr(now, "init_weights"):
        pytest.skip("a codec: it is filled from weights")
    with torch.device("meta"):
        late: Any = entry.build(config)
    late = late.to_empty(device="cpu")
    for parameter in late.parameters():
        parameter.fill_(float("nan"))
    for model in (late, now):
        torch.manual_seed(3)
        model.init_weights()
    for (key, ours), (_, theirs) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), key


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, inputs = built(name)
    model.eval()
    save_module(tmp_path / "model.safetensors", model)
    entry = MODELS[name]
    torch.manual_seed(1)
    other = entry.build(entry.tiny(entry.config)).eval()
    load_module(tmp_path / "model.safetensors", other)
    for ours, theirs in zip(tensors(model(*inputs)), tensors(other(*inputs)), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_same_seed_starts_the_same_and_finite(name: str) -> None:
    entry = MODELS[name]
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(entry.build(entry.tiny(entry.config)).state_dict())
    for key, value in states[0].items():
        assert value.isfinite().all(), key
        assert torch.equal(value, states[1][key]), key


@pytest.mark.slow
@torch.no_grad()
def test_compiled_is_eager(name: str) -> None:
    model, inputs = built(name)
    model.eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for ours, theirs in zip(tensors(model(*inputs)), tensors(compiled(*inputs)), strict=True):
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_counted_without_memory(name: str) -> None:
    counted = count(name)
    assert counted["parameters"] > 0
    assert counted["macs"] > 0


NAMED = (
    *(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)),
    *("VDT-S/2", "VDT-L/2", "WALT-L", "WALT-XL", "MAGVIT2", "LDM-KL-f8", "SD-UNet", "DDPM-CIFAR"),
    *("unCLIP-Prior", "unCLIP-Decoder", "VideoPoet-300M", "VideoPoet-1B", "VideoPoet-8B"),
)


def test_papers_that_make_are_in_the_catalogue() -> None:
    assert set(MODELS) >= set(NAMED)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("unCLIP-Upsampler-256", 0),
        ("unCLIP-Upsampler-1024", 0),
        ("LDM-KL-f8", 2 * 2 * 1024**2 * 512),  # encoder and decoder, queries by keys and weights by values, 32 x 32 places
    ],
)
def test_what_is_counted_is_what_the_layers_do(name: str, attention: int) -> None:
    entry, layers = MODELS[name], []
    with torch.device("meta"), torch.no_grad():
        model = entry.build(entry.config)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(lambda layer, _, out: layers.append(out.numel() * layer.weight[0].numel()))
        model(*entry.example(entry.config, 1))
    assert count(name)["macs"] == sum(layers) + attention
