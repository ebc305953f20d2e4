from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from tubelet.core.types import Condition
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn import attention as attention_room
from tubelet.nn.attention import CrossAttention, KeyValues, SelfAttention, fused
from tubelet.nn.mlp import SwiGLU
from tubelet.nn.positions import RotaryEmbedding
from tubelet.runtime import cpu
from tubelet.runtime.cpu import accelerate, attention_as_products, restore, use_fast_attention
from tubelet.train.optim import Optimizer, OptimizerConfig

PACKS = pytest.mark.skipif(not cpu.packs_linears(), reason="this processor keeps every part as it is")


@pytest.fixture(autouse=True)
def _backend_stays() -> Iterator[None]:
    before, packs = attention_room._backend, attention_room._pack_backend
    yield
    attention_room.use_backend(before)
    attention_room.use_pack_backend(packs)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=rng)
    return module.eval()


def spacetime(text: str = "cross") -> Spacetime:
    config = SpacetimeConfig(width=64, depth=2, heads=2, in_channels=4, patch=(2, 2, 2), text_width=24, text=text)  # type: ignore[arg-type]
    module = filled(Spacetime(config))
    assert isinstance(module, Spacetime)
    return module


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[-1, 1:] = False
    states = torch.randn(batch, 7, 24, generator=rng)
    return torch.randn(batch, 4, 5, 4, 6, generator=rng), torch.rand(batch, generator=rng), Condition(states, mask)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("text", ["cross", "joint"])
@torch.inference_mode()
def test_an_accelerated_denoiser_computes_the_same(text: str) -> None:
    model = spacetime(text)
    expected = model(*inputs())
    assert worst(accelerate(model)(*inputs()), expected) < 1e-5
    z, _, condition = inputs()
    per_frame = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    assert worst(model(z, per_frame, condition), restore(copy.deepcopy(model))(z, per_frame, condition)) < 1e-5


@torch.inference_mode()
def test_bf16_stays_as_close_to_fp32_as_it_was() -> None:
    exact, model = spacetime(), spacetime().to(torch.bfloat16)
    for a, b in zip(exact.parameters(), model.parameters(), strict=True):
        a.copy_(b)
    z, sigma, condition = inputs()
    narrow = Condition(condition.states.to(torch.bfloat16), condition.mask)
    wanted = exact(z, sigma, condition)
    plain = worst(model(z, sigma, narrow), wanted)
    use_fast_attention()
    quick = worst(accelerate(model)(z, sigma, narrow), wanted)
    assert quick < 0.05
    assert quick < 2 * plain


@PACKS
def test_parts_change_class_and_nothing_else() -> None:
    model = spacetime()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    classes = [type(part) for part in model.modules()]
    assert accelerate(model) is model
    with torch.inference_mode():
        model(*inputs())
    assert [type(part) for part in model.modules()] != classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert isinstance(model.patch_in, nn.Linear)
    assert isinstance(model.patch_in, cpu._PackedLinear)
    classes_quick = [type(part) for part in model.modules()]
    accelerate(model)
    assert [type(part) for part in model.modules()] == classes_quick
    assert restore(model) is model
    assert [type(part) for part in model.modules()] == classes
    assert not any(cpu._KEPT in part.__dict__ for part in model.modules())


@PACKS
@torch.no_grad()
def test_packed_weights_follow_the_weights() -> None:
    for change in ("in place", "load", "data", "dtype", "muon", "adamw"):
        model, other = spacetime(), filled(spacetime(), seed=5)
        accelerate(model)
        first = model(*inputs())
        if change == "in place":
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                a.copy_(b)
        elif change == "load":
            model.load_state_dict(other.state_dict())
        elif change == "data":
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                a.data = b.data.clone()
        elif change == "dtype":
            model.to(torch.bfloat16).to(torch.float32)
            other = restore(copy.deepcopy(model))
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            Optimizer(model, OptimizerConfig(kind=change, learning_rate=0.1, learning_rate_adamw=0.1)).step()
            other = restore(copy.deepcopy(model))
        assert worst(model(*inputs()), other(*inputs())) < 1e-5, change
        assert not torch.equal(model(*inputs()), first), change


def test_threads_share_an_accelerated_network() -> None:
    model = accelerate(spacetime())
    _, sigma, condition = inputs()
    rng = torch.Generator().manual_seed(3)
    films = [torch.randn(2, 4, 5, *size, generator=rng) for size in ((4, 6), (6, 4), (2, 8))]  # three grids, two of one length
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with torch.no_grad(), ThreadPoolExecutor(3) as pool:
            alone = [model(z, sigma, condition) for z in films]

            def same(place: int) -> bool:
                with torch.no_grad():
                    return all(torch.equal(model(films[place], sigma, condition), alone[place]) for _ in range(60))

            assert list(pool.map(same, range(3))) == [True] * 3
    finally:
        sys.setswitchinterval(before)


@PACKS
@pytest.mark.parametrize("inference", [False, True])
@torch.no_grad()
def test_a_copy_packs_for_itself(inference: bool) -> None:
    model = accelerate(spacetime())
    expected = model(*inputs())
    with torch.inference_mode() if inference else torch.no_grad():  # a copy made inside does not tell when it changes
        twin = copy.deepcopy(model)
        assert worst(twin(*inputs()), expected) < 1e-5
        twin.get_parameter("head.weight").mul_(2)
        assert worst(twin(*inputs()), expected) > 1e-3
    assert torch.equal(model(*inputs()), expected)


def test_gradients_and_autocast_are_those_of_the_plain_parts() -> None:
    plain = spacetime()
    quick = accelerate(copy.deepcopy(plain))
    for model in (plain, quick):
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(*inputs()), plain(*inputs()))


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64"])
def test_another_processor_keeps_its_parts(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpu.packs_linears.cache_clear()
    try:
        model = spacetime()
        classes = [type(part) for part in model.modules()]
        assert [type(part) for part in accelerate(model).modules()] == classes
        assert [type(part) for part in restore(model).modules()] == classes
    finally:
        cpu.packs_linears.cache_clear()


def test_torch_without_onednn_keeps_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    cpu.packs_linears.cache_clear()
    try:
        assert type(accelerate(nn.Linear(2, 2))) is nn.Linear
    finally:
        cpu.packs_linears.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (24,), (0, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_linears_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    linear = filled(nn.Linear(24, 10, bias=bias)).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = linear(x)
    got = accelerate(linear)(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.inference_mode()
def test_strided_input_and_a_wrong_width() -> None:
    linear = accelerate(filled(nn.Linear(24, 10)))
    x = torch.randn(24, 6).T
    torch.testing.assert_close(linear(x), restore(copy.deepcopy(linear))(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        linear(torch.randn(6, 23))


@torch.inference_mode()
def test_attention_parts_with_every_argument() -> None:
    rng = torch.Generator().manual_seed(4)
    x, context = torch.randn(2, 9, 32, generator=rng), torch.randn(2, 5, 16, generator=rng)
    rope = RotaryEmbedding((4, 6))(torch.rand(9, 2, generator=rng) * 5)  # 10 of 16 channels: the rest stays as it is
    per_sample = RotaryEmbedding((4, 6))(torch.rand(2, 9, 2, generator=rng) * 5)
    mask = torch.rand(2, 1, 9, 9, generator=rng) < 0.5
    mask[0, :, 3] = False
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[1] = False
    plain, cross, mlp = filled(SelfAttention(32, 2)), filled(CrossAttention(32, 2, 16)), filled(SwiGLU(32, 64))
    calls = [
        lambda m: m[0](x),
        lambda m: m[0](x, rope),
        lambda m: m[0](x, per_sample, causal=True),
        lambda m: m[0](x, rope, mask),
        lambda m: m[0](x, rope, causal=True, past=KeyValues()),
        lambda m: m[1](x, context),
        lambda m: m[1](x, context, seen),
        lambda m: m[1](x, context, seen, rope),
        lambda m: m[2](x),
    ]
    quick = [accelerate(copy.deepcopy(part)) for part in (plain, cross, mlp)]
    for number, call in enumerate(calls):
        assert worst(call(quick), call([plain, cross, mlp])) < 1e-5, number


@torch.inference_mode()
def test_another_rope_is_not_taken_for_the_last() -> None:
    attend = filled(SelfAttention(32, 2))
    quick, x = accelerate(copy.deepcopy(attend)), torch.randn(1, 6, 32)
    embed = RotaryEmbedding((16,))
    for offset in range(20):
        rope = embed(torch.arange(6.0)[:, None] * offset)
        assert worst(quick(x, rope), attend(x, rope)) < 1e-5
        del rope


@pytest.mark.parametrize("masked", ["no", "some", "whole rows"])
@pytest.mark.parametrize("grad", [False, True])
def test_products_equal_the_fused_kernel(masked: str, grad: bool) -> None:
    rng = torch.Generator().manual_seed(6)
    q = torch.randn(2, 3, 10, 16, generator=rng).bfloat16()
    k, v = torch.randn(2, 2, 3, 12, 16, generator=rng).bfloat16()
    mask = None if masked == "no" else torch.rand(2, 1, 10, 12, generator=rng) < 0.6
    if mask is not None:
        mask[..., 0] = True
    if masked == "whole rows" and mask is not None:
        mask[1, :, 4] = False
    expected = fused(q.float(), k.float(), v.float(), mask)
    with torch.set_grad_enabled(grad):
        got = attention_as_products(q.requires_grad_(grad), k, v, mask)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.03)
    if masked == "whole rows":
        assert not bool(got[1, :, 4].any())
    if grad:
        got.sum().backward()
        assert q.grad is not None
        assert bool(q.grad.isfinite().all())


def test_products_leave_fp32_and_long_sequences_to_the_fused_kernel() -> None:
    q = torch.randn(1, 1, 4, 8)
    k, v = torch.randn(2, 1, 1, cpu.LONGEST_AS_PRODUCTS + 1, 8)
    assert torch.equal(attention_as_products(q, k, v, None), fused(q, k, v, None))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    assert torch.equal(attention_as_products(q, k, v, None), fused(q, k, v, None))


def test_fast_attention_is_taken_by_the_process() -> None:
    use_fast_attention()
    assert attention_room._backend is attention_as_products


FAULTS = """
import json, resource, sys, torch
from tubelet.runtime.cpu import keep_freed_memory
scores = torch.zeros(4, 272, 272, dtype=torch.bfloat16)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        scores.float().softmax(-1)  # 1.2 MiB, twice
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
faults()
plain = faults()
taken = keep_freed_memory()
faults()
print(json.dumps([plain, taken, faults()]))
"""


def pages_asked_for(**environment: str) -> tuple[float, bool, float]:
    """Pages that the system hands out in a product and a softmax, before and after; and whether the advice was taken."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    plain, taken, kept = json.loads(done.stdout)
    return plain, taken, kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is another library's")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    plain, taken, kept = pages_asked_for()
    assert taken
    assert kept <= plain / 10, "of 600 pages of 4 KiB nearly none"


def test_a_heap_that_the_environment_has_set_stays_as_it_is() -> None:
    plain, taken, kept = pages_asked_for(MALLOC_TRIM_THRESHOLD_=str(1 << 17), MALLOC_MMAP_THRESHOLD_=str(1 << 17))
    assert not taken
    assert kept >= plain / 2
