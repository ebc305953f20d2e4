"""Clips of mixed sizes, forward and backward: one packed row against a padded batch, one by one, and buckets of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Figure, Settings, attention, compare
from tubelet.core.types import Condition
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.packing import fill_packs
from tubelet.runtime.cpu import attention_as_products
from tubelet.runtime.device import fast_bf16

CONFIG = SpacetimeConfig(width=256, depth=4, heads=4, in_channels=8, patch=(1, 2, 2), text_width=256)
WORDS = 20
BUDGET = 4096
# Latent (T, H, W) and how often it comes: at 8 x 8 pixels a cell.
MIXES: dict[str, list[tuple[tuple[int, int, int], int]]] = {
    "films": [((17, 8, 8), 6), ((17, 8, 14), 3), ((9, 14, 8), 3), ((25, 8, 8), 2)],
    "films_and_images": [((17, 8, 8), 5), ((1, 8, 8), 12), ((1, 8, 14), 6), ((9, 12, 12), 2), ((33, 8, 8), 1)],
    "images": [((1, 8, 8), 16), ((1, 14, 8), 8), ((1, 12, 12), 8), ((1, 16, 16), 4)],
}


def packing(settings: Settings) -> Iterator[Figure]:
    """Tokens of real clips per second, whichever way they are computed."""
    bf16 = fast_bf16()
    for name, mix in MIXES.items():
        sizes = [size for size, count in mix for _ in range(count)]
        tokens = [math.prod(size) // 4 for size in sizes]
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
        pack = sorted(fill_packs(tokens, order, BUDGET)[0], key=lambda i: -tokens[i])
        with attention(attention_as_products):
            seconds = compare(_contestants([sizes[i] for i in pack], list(dict(mix)), bf16), settings)
        real = sum(tokens[i] for i in pack)
        many = tokens * 500
        packs = fill_packs(many, torch.randperm(len(many), generator=torch.Generator().manual_seed(0)).tolist(), BUDGET)
        how = f"{len(pack)} clips, {real} tokens, {'bf16' if bf16 else 'fp32'}, forward and backward"
        yield Figure(f"packing/{name}/tokens", real / seconds["packed"], "tokens/s", how)
        yield Figure(
            f"packing/{name}/padded", seconds["padded"] / seconds["packed"], "x as fast", "a batch padded to the largest"
        )
        yield Figure(f"packing/{name}/one_by_one", seconds["one_by_one"] / seconds["packed"], "x as fast", "each clip alone")
        full = sum(_count(size) * math.prod(size) // 4 for size in dict(mix))
        yield Figure(
            f"packing/{name}/buckets",
            real / seconds["packed"] * seconds["buckets"] / full,
            "x as many tokens a second",
            f"a batch of each size, {BUDGET} tokens or just below",
        )
        empty = 1 - sum(many) / (BUDGET * len(packs))
        yield Figure(f"packing/{name}/padding", empty, "of the budget", f"packs of {BUDGET} tokens", "< 0.02")


def _count(size: tuple[int, int, int]) -> int:
    """How many clips of a size a bucket's batch holds."""
    return BUDGET // (math.prod(size) // 4)


def _contestants(
    sizes: list[tuple[int, int, int]], buckets: list[tuple[int, int, int]], bf16: bool
) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = Spacetime(CONFIG).train()
    clips = [torch.randn(CONFIG.in_channels, *size) for size in sizes]
    levels = [torch.rand(()) for _ in sizes]
    words = Condition(torch.randn(len(sizes), WORDS, CONFIG.text_width), torch.ones(len(sizes), WORDS, dtype=torch.bool))
    largest = [max(size[d] for size in sizes) for d in range(3)]

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def learn(out: Sequence[Tensor]) -> None:
        torch.stack([one.float().square().sum() for one in out]).sum().backward()
        model.zero_grad()

    def packed() -> None:
        with autocast():
            out = model.forward_packed(clips, levels, words)
        learn(out)

    def padded() -> None:
        batch = torch.zeros(len(clips), CONFIG.in_channels, *largest)
        for row, clip in zip(batch, clips, strict=True):
            row[:, : clip.shape[1], : clip.shape[2], : clip.shape[3]] = clip
        with autocast():
            out = model(batch, torch.stack(levels), words)
        learn([out])

    def one_by_one() -> None:
        for i, clip in enumerate(clips):
            with autocast():
                out = model(clip[None], levels[i][None], words[i : i + 1])
            learn([out])

    batches = [torch.randn(_count(size), CONFIG.in_channels, *size) for size in buckets]
    most = max(len(batch) for batch in batches)
    many = Condition(torch.randn(most, WORDS, CONFIG.text_width), torch.ones(most, WORDS, dtype=torch.bool))

    def in_buckets() -> None:
        for batch in batches:
            with autocast():
                out = model(batch, torch.rand(len(batch)), many[: len(batch)])
            learn([out])

    return {"packed": packed, "padded": padded, "one_by_one": one_by_one, "buckets": in_buckets}
