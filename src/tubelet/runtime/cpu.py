"""Fast paths for the CPU, applied to modules from outside; docs/runtime.md says what was measured and why each was chosen.

`accelerate` lends the parts of a network quicker ways to compute the same function: linears with weights packed once for
oneDNN, a SwiGLU whose activation and product ride on the linears, one pass of norm and rotation over queries and keys.
A part changes its class and nothing else: parameters, names and hooks stay, and `restore` gives the old class back.
Where a quick way does not apply (gradients, autocast, another device or processor, a compiled graph) a part computes as before.

What applies is read from the machine and the call, never from a clock: two ways of one product differ in rounding, and a
choice that a busy moment can tip would make a film differ from run to run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn import attention as attention_room
from tubelet.nn.attention import CrossAttention, KeyValues, Rope, SelfAttention
from tubelet.nn.mlp import SwiGLU
from tubelet.nn.norms import RMSNorm
from tubelet.nn.packing import Segments
from tubelet.runtime import packs

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
LONGEST_AS_PRODUCTS = 1024  # keys; beyond it the score matrix no longer fits the cache and the fused kernel wins


def attention_as_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention as two batched products for short bf16 sequences on a CPU, the fused kernel for everything else."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > LONGEST_AS_PRODUCTS:
        return attention_room.fused(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, N, L, M)
    if mask is None:
        return _softmax(scores) @ v
    out = _softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min)) @ v  # (B, N, L, d)
    some = mask.any(-1, keepdim=True)
    if not torch.compiler.is_compiling() and bool(some.all()):
        return out
    return torch.where(some, out, 0.0)


def _softmax(scores: Tensor) -> Tensor:
    # Through float32 it takes two thirds of the time, but would be remembered twice as large for a gradient.
    if torch.is_grad_enabled():
        return scores.softmax(-1)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def use_fast_attention() -> None:
    """Let every attention in the process take the faster way for its device, dtype and length; packs, too."""
    attention_room.use_backend(attention_as_products)
    attention_room.use_pack_backend(packs.attend)


def accelerate(module: nn.Module) -> nn.Module:
    """Quicken what a CPU can quicken in `module` for inference, in place; returns it.

    Results are the same to rounding, `state_dict` is the same, and weights may still change: packed copies follow them. They
    are a second copy of the linears' weights in memory. A processor without oneDNN for x86 keeps every part as it is. The
    process keeps what it frees (`keep_freed_memory`).
    """
    keep_freed_memory()
    if packs_linears():
        for part in module.modules():
            part.__class__ = _QUICKER.get(type(part), type(part))
    return module


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep up to 256 MiB of what tensors have freed, for the next ones; whether the C library takes the advice.

    glibc gives the end of its heap back to the system as soon as a few MiB of it are free, and the system hands it out again
    page by page, each filled with zeros: a film of 64 x 64 pixels asked for 80,000 pages, which took a quarter of its time.
    Nothing is changed where the environment says what is to be kept, or where memory is another library's.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Either alone would end glibc's own adapting of the other, which gives all above 128 KiB pages of its own at first.
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20))


def restore(module: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; returns `module`."""
    slower = {quick: plain for plain, quick in _QUICKER.items()}
    for part in module.modules():
        part.__class__ = slower.get(type(part), type(part))
        part.__dict__.pop(_KEPT, None)
    return module


@functools.cache
def packs_linears() -> bool:
    """Whether oneDNN's packed linear is to be had and pays: x86 only, where MKL is the other way."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


_KEPT = "_kept_by_accelerate"


class _Kept:
    """What a part has computed from its weights, and the key that it holds for. A copy of the part starts without.

    The values also hold the tensors that they were computed from, so that their memory, and with it the key, is not given to
    others.
    """

    __slots__ = ("entry",)

    def __init__(self) -> None:
        self.entry: tuple[Any, tuple[Tensor, ...]] | None = None

    def of(self, key: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The values for this key, made where what is kept is of another. One pair, so that threads may share the part."""
        entry = self.entry
        if entry is None or entry[0] != key:
            entry = self.entry = key, make()
        return entry[1]

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _kept(part: nn.Module) -> _Kept:
    found = part.__dict__.get(_KEPT)
    if found is None:
        found = part.__dict__[_KEPT] = _Kept()
    return found


def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Changes whenever the values do, by an optimiser, a load or a move, as long as someone holds the memory it names."""
    return weight.data_ptr(), weight._version, weight.dtype


def _quick(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of `x` may take the packed way: inference on a CPU, in one precision, outside any tracing."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.is_cpu
        and not weight.is_inference()  # such a tensor does not tell when it changes
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


class _PackedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if not _quick(input, weight):
            return F.linear(input, weight, self.bias)
        packed, _ = _kept(self).of(_state(weight), lambda: (_pack(weight), weight.detach()))
        return torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")


class _QuickSwiGLU(SwiGLU):
    """`silu(gate)` is applied by the gate's product and the multiplication by the other's, while their rows are in cache."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate_up.weight
        if not _quick(x, weight):
            return super().forward(x)

        def halves() -> tuple[Tensor, ...]:
            gate, up = weight.detach().chunk(2)
            return _pack(gate), _pack(up), gate

        gate, up, _ = _kept(self).of(_state(weight), halves)
        gated = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
        return self.down(torch.ops.mkldnn._linear_pointwise.binary(x, gated, up, None, "mul"))


def _turned(x: Tensor, norms: tuple[RMSNorm, ...], rope: Rope, kept: _Kept) -> Tensor:
    """RMS norm and rotation of `x (B, L, n, N, d)` for n norms at once, as `(B, n, N, L, d)`; float32 inside.

    Norm, gain and rotation are linear but for one factor a row: `rotate(gain * x / rms) = (x * a + swapped(x) * b) / rms` with
    `a` and `b` made once from gains, cosines and sines. Those are kept for as long as `rope` is the same pair of tensors.
    """
    weights = tuple(norm.weight for norm in norms if norm.weight is not None)
    key = (id(rope[0]), *map(_state, weights))
    half = rope[0].shape[-1]

    def factors() -> tuple[Tensor, ...]:
        gain = torch.stack([w.detach().float() for w in weights])[:, None]  # (n, 1, d)
        cos, sin = (part.float().transpose(-2, -3).unsqueeze(-3) for part in rope)  # (..., L, 1, 1, half)
        left, right, rest = gain[..., :half], gain[..., half : 2 * half], gain[..., 2 * half :]
        rest = rest.expand(*cos.shape[:-3], *rest.shape)  # (..., L, n, 1, rest)
        a = torch.cat([left * cos, right * cos, rest], dim=-1)  # (..., L, n, 1, d)
        b = torch.cat([-right * sin, left * sin, torch.zeros_like(rest)], dim=-1)
        return a, b, torch.full((), norms[0].eps), rope[0], *(w.detach() for w in weights)

    a, b, eps, *_ = kept.of(key, factors)
    values = x.float()
    rms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)  # (B, L, n, N, 1)
    factor = torch.addcmul(eps, rms, rms, value=1 / x.shape[-1]).rsqrt_()
    swapped = torch.cat([values[..., half : 2 * half], values[..., :half], values[..., 2 * half :]], dim=-1)
    turned = torch.addcmul(values * a, swapped, b).mul_(factor)
    # Whole in memory: the products would otherwise copy queries and keys first.
    return turned.permute(0, 2, 3, 1, 4).to(x.dtype, memory_format=torch.contiguous_format)  # (B, n, N, L, d)


class _QuickSelfAttention(SelfAttention):
    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        past: KeyValues | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        norms = _with_gains(self.q_norm, self.k_norm)
        if rope is None or past is not None or not norms or not _quick(x, self.qkv.weight):
            return super().forward(x, rope, mask, causal, past, segments)
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        q, k = _turned(qkv[:, :, :2], norms, rope, _kept(self)).unbind(1)  # 2 x (B, N, L, d)
        out = attention_room.attention(q, k, qkv[:, :, 2].transpose(1, 2), mask=mask, causal=causal, segments=segments)
        return self.out(out.transpose(1, 2).reshape(B, L, D))


class _QuickCrossAttention(CrossAttention):
    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        rope: Rope | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        norms = _with_gains(self.q_norm)
        if rope is None or not norms or not _quick(x, self.q.weight):
            return super().forward(x, context, mask, rope, segments)
        B, L, D = x.shape
        d = D // self.heads
        q = _turned(self.q(x).view(B, L, 1, self.heads, d), norms, rope, _kept(self))[:, 0]  # (B, N, L, d)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, d).permute(2, 0, 3, 1, 4)  # 2 x (B, N, M, d)
        look = None if mask is None else mask[:, None, None, :]
        out = attention_room.attention(q, self.k_norm(k), v, mask=look, segments=segments)
        return self.out(out.transpose(1, 2).reshape(B, L, D))


def _with_gains(*norms: nn.Module) -> tuple[RMSNorm, ...]:
    """The norms, if all of them have gains that tell when they change; else none."""
    found = tuple(n for n in norms if isinstance(n, RMSNorm) and n.weight is not None and not n.weight.is_inference())
    return found if len(found) == len(norms) else ()


_QUICKER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _PackedLinear,
    SwiGLU: _QuickSwiGLU,
    SelfAttention: _QuickSelfAttention,
    CrossAttention: _QuickCrossAttention,
}
