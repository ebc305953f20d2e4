"""The denoiser's forward against diffusers' transformers of equal width, depth, heads and tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.timing import Figure, Settings, attention, compare, macs
from tubelet.core.types import Condition
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.attention import fused
from tubelet.runtime.cpu import accelerate, attention_as_products

WIDTH, DEPTH, HEADS, CHANNELS, TEXT = 384, 8, 6, 8, 20
BATCH = 2


def denoiser(settings: Settings) -> Iterator[Figure]:
    """Both peers, both precisions, with parameters and multiply-accumulates of each."""
    for peer, grid in (("DiTTransformer2DModel", (1, 32, 32)), ("LatteTransformer3DModel", (5, 16, 16))):
        for dtype in (torch.float32, torch.bfloat16):
            yield from _against(peer, grid, dtype, settings)


def _against(peer: str, grid: tuple[int, int, int], dtype: torch.dtype, settings: Settings) -> Iterator[Figure]:
    torch.manual_seed(0)
    z, text = torch.randn(BATCH, CHANNELS, *grid), torch.randn(BATCH, TEXT, WIDTH)  # (B, C, T, H, W), (B, M, D)
    theirs, call_theirs = _peer(peer, z.to(dtype), text.to(dtype), dtype)
    config = SpacetimeConfig(WIDTH, DEPTH, HEADS, CHANNELS, (1, 2, 2), WIDTH)
    plain = _filled(Spacetime(config)).to(dtype).eval()
    quick = accelerate(copy.deepcopy(plain))
    condition = Condition(text.to(dtype), torch.ones(BATCH, TEXT, dtype=torch.bool))
    sigma = torch.full((BATCH,), 0.5)

    def ours(module: nn.Module, backend: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def call() -> torch.Tensor:
            with attention(backend):
                return module(z.to(dtype), sigma, condition)

        return call

    precision = "fp32" if dtype == torch.float32 else "bf16"
    name = f"denoiser/{peer.removesuffix('Transformer2DModel').removesuffix('Transformer3DModel').lower()}/{precision}"
    with torch.inference_mode():
        contestants = {
            "peer": call_theirs(theirs),
            "plain": ours(plain, fused),
            "quick": ours(quick, attention_as_products),
            "linears": call_theirs(accelerate(copy.deepcopy(theirs))),
        }
        work = {"peer": macs(contestants["peer"]), "plain": macs(contestants["plain"])}
        wanted, got = contestants["plain"](), contestants["quick"]()
        assert isinstance(wanted, torch.Tensor)
        assert isinstance(got, torch.Tensor)
        seconds = compare(contestants, settings)
    tokens = grid[0] * grid[1] * grid[2] // 4
    against = f"diffusers {peer}, {WIDTH} x {DEPTH}, {HEADS} heads, {tokens} tokens, batch {BATCH}, {precision}"
    goal = ">= 2.5" if dtype == torch.float32 else ""
    per_mac = seconds["peer"] / seconds["quick"] * work["plain"] / work["peer"]
    yield Figure(name, seconds["peer"] / seconds["quick"], "x faster", against, goal)
    yield Figure(f"{name}/per_mac", per_mac, "x faster per multiply-accumulate", against)
    yield Figure(f"{name}/not_accelerated", seconds["peer"] / seconds["plain"], "x faster", against)
    yield Figure(f"{name}/peer_with_our_linears", seconds["peer"] / seconds["linears"], "x faster", f"the same {peer} as it is")
    error = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    yield Figure(f"{name}/error", error, "of the largest value", "ours, not accelerated", "<= 1e-5" if goal else "")
    yield Figure(f"{name}/seconds", seconds["quick"], "s", f"{seconds['peer']:.4f} s of {peer}")
    for whose, module, count in (("ours", plain, work["plain"]), ("peer", theirs, work["peer"])):
        yield Figure(f"{name}/parameters/{whose}", sum(p.numel() for p in module.parameters()) / 1e6, "million")
        yield Figure(f"{name}/macs/{whose}", count / 1e9, "billion")


def _filled(module: nn.Module) -> nn.Module:
    """Zero weights would let a lucky kernel do less than a trained network needs."""
    for parameter in module.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return module


def _peer(
    name: str, z: torch.Tensor, text: torch.Tensor, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[nn.Module], Callable[[], object]]]:
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    step = torch.full((BATCH,), 500)
    if name.startswith("DiT"):
        module = diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            in_channels=CHANNELS,
            num_layers=DEPTH,
            sample_size=z.shape[-1],
            patch_size=2,
        )
        module = _filled(module).to(dtype).eval()
        labels, image = torch.zeros(BATCH, dtype=torch.long), z[:, :, 0]
        return module, lambda m: lambda: m(image, timestep=step, class_labels=labels, return_dict=False)[0]
    module = diffusers.LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH // 2,  # each is a block in space and one in time
        cross_attention_dim=WIDTH,
        sample_size=z.shape[-1],
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=WIDTH,
        video_length=z.shape[2],
    )
    module = _filled(module).to(dtype).eval()
    return module, lambda m: lambda: m(z, timestep=step, encoder_hidden_states=text, return_dict=False)[0]
