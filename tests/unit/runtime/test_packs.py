"""Packs: ways that are equal in result, and a trial that chooses among those that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.types import Condition
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.attention import by_mask, by_segment
from tubelet.nn.packing import Segments
from tubelet.runtime import packs
from tubelet.runtime.packs import PackTrial, attend, by_varlen, pack_trial, trial

CPU = torch.device("cpu")
LENGTHS = (5, 5, 1, 9, 2)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def drawn(segments: Segments, grad: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    queries, keys = sum(segments.queries), sum(segments.keys)
    return [torch.randn(1, 2, n, 8, generator=g, requires_grad=grad) for n in (queries, keys, keys)]


def as_documented(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """What torch says of `varlen_attn`, `(L, N, d)` each, computed plainly."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    assert (max_q, max_k) == (int(lengths_q.max()), int(lengths_k.max()))
    pieces = zip(*(x.split(n.tolist()) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True)
    outs = [F.scaled_dot_product_attention(*(one.transpose(0, 1) for one in piece)).transpose(0, 1) for piece in pieces]
    return torch.cat(outs)


def test_the_varlen_kernel_is_asked_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", as_documented)
    segments = Segments((5, 5, 1, 9), (2, 2, 7, 3))
    q, k, v = drawn(segments)
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = packs._varlen(q, k, v, segments), by_segment(q, k, v, segments)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), [q, k, v]),
        torch.autograd.grad((theirs * weights).sum(), [q, k, v]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_where_the_kernel_does_not_apply_samples_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *_: pytest.fail("asked of what it cannot do"))
    for segments in (Segments.of_self(LENGTHS), Segments((3, 2), (0, 2))):
        q, k, v = drawn(segments)
        assert by_varlen(q, k, v, segments).equal(by_segment(q, k, v, segments))
        q, k, v = (x.bfloat16() for x in (q, k, v))
        assert by_varlen(q, k, v, segments).equal(by_segment(q, k, v, segments))


def test_autocast_narrows_what_the_kernel_gets() -> None:
    q, k, v = drawn(Segments.of_self(LENGTHS))
    assert {x.dtype for x in packs._narrowed(q, k, v)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in packs._narrowed(q, k.bfloat16(), v)} == {torch.bfloat16}


def missing(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nand more")


def leaking(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def silent(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return by_segment(q, k, v, segments) + float("nan")


def wrong_backwards(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return by_segment(q, k.detach() + 0 * k, v, segments)


def quick(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return by_segment(q, k, v, segments)


slow = quick


def test_a_trial_takes_the_fastest_of_those_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"sample by sample": by_segment, "quick": quick, "slow": slow, "masked": by_mask}
    ways |= {"missing": missing, "leaking": leaking, "silent": silent, "wrong": wrong_backwards}
    times = iter((3.0, 2.0, 5.0))

    def told(call: Callable[[], Any], *_: Any) -> float:
        call()
        return next(times)

    monkeypatch.setattr(packs, "seconds_per_call", told)
    found = trial(ways, CPU, torch.float32, LENGTHS)
    assert found.way == "quick"
    assert found.seconds == {"sample by sample": 3.0, "quick": 2.0, "slow": 5.0}
    assert "comes into others" in found.left_out["masked"]
    assert found.left_out["missing"] == "FlashAttention only supports Ampere GPUs or newer."
    assert "nan" in found.left_out["silent"]
    assert set(found.left_out) == {"missing", "leaking", "silent", "wrong", "masked"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_ways_agree_where_they_run(dtype: torch.dtype) -> None:
    found = trial(packs.WAYS, CPU, dtype, LENGTHS)
    assert not found.left_out
    assert set(found.seconds) == set(packs.WAYS)


def test_a_first_pack_may_be_a_samplers() -> None:
    with torch.inference_mode():
        assert set(trial(packs.WAYS, CPU, torch.float32, LENGTHS).seconds) == set(packs.WAYS)


def test_a_reference_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Ampere"):
        trial({"missing": missing}, CPU, torch.float32, LENGTHS)


def test_a_cpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "seconds_per_call", lambda *_: pytest.fail("a clock decided"))
    assert pack_trial(CPU, torch.float32) == PackTrial("sample by sample")
    segments = Segments.of_self(LENGTHS)
    q, k, v = drawn(segments, grad=False)
    assert attend(q, k, v, segments).equal(by_segment(q, k, v, segments))


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_of_a_gpu_agree(dtype: torch.dtype) -> None:
    found = trial(packs.WAYS, torch.device("cuda"), dtype)
    assert not found.left_out


@GPU
def test_packed_gradients_on_a_gpu_are_those_of_one_by_one() -> None:
    torch.manual_seed(0)
    network = Spacetime(SpacetimeConfig(width=128, depth=2, heads=2, in_channels=4, patch=(1, 2, 2), text_width=24)).cuda()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    clips = [torch.randn(4, *size, device="cuda") for size in ((5, 8, 8), (1, 4, 4), (3, 4, 8))]
    levels = [torch.rand((), device="cuda") for _ in clips]
    words = Condition(torch.randn(3, 7, 24, device="cuda"), torch.ones(3, 7, dtype=torch.bool, device="cuda"))

    def gradients(outs: list[Tensor]) -> Tensor:
        network.zero_grad()
        torch.stack([out.square().mean() for out in outs]).sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    packed = gradients(network.forward_packed(clips, levels, words))
    alone = gradients([network(clip[None], levels[i][None], words[i : i + 1])[0] for i, clip in enumerate(clips)])
    assert float((packed - alone).norm() / alone.norm()) < 1e-5
