"""DiT-XL/2 and Spacetime-XL against diffusers' DiT and Wan transformers of equal shapes, and packs against padding, on an
accelerator: forwards and gradients a second, share of the matrix rate measured in the same run, peak memory; and
whether packed, compiled, narrowed and repeated computations agree. Run alone: `python -m benchmarks.accelerator`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Figure, Settings, macs
from tubelet.core.types import Condition
from tubelet.models.dit import DiT, DiTConfig
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.runtime.cpu import use_fast_attention
from tubelet.runtime.packs import pack_trial

SIDE = 8192
"""Of the square bf16 product whose rate is the yardstick."""
WIDTH, DEPTH, WORDS, TEXT = 1152, 28, 128, 4096
Call = Callable[[], Tensor]
DEVICE = "cuda"


def accelerator(settings: Settings) -> Iterator[Figure]:
    """Nothing where there is no such device."""
    if not torch.cuda.is_available():
        return
    use_fast_attention()
    name = torch.cuda.get_device_name()
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2.0 * SIDE**3 / _seconds(lambda: a @ b, settings)
    yield Figure("accelerator/matrix_rate", rate / 1e12, "TFLOP/s", f"{name}, bf16, {SIDE} cubed")
    yield from _parity()
    for who, batch, build in (
        ("spacetime-xl", 16, _spacetime),
        ("wan", 16, _wan),
        ("dit-xl", 64, _dit),
        ("diffusers-dit", 64, _their_dit),
    ):
        yield from _speed(who, batch, build, rate, settings)
        torch.cuda.empty_cache()  # the next one's memory is its own
    yield from _packing(settings)


def _seconds(call: Callable[[], object], settings: Settings) -> float:
    """Median seconds of a call, the device waited for."""
    for _ in range(3):
        call()
    times = []
    for _ in range(settings.repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _speed(
    who: str, batch: int, build: Callable[[int], tuple[nn.Module, Call]], rate: float, settings: Settings
) -> Iterator[Figure]:
    """As it is, then with every block compiled; the work is counted before, as a counter keeps compiled code from running."""
    module, call = build(batch)

    def learn() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            call().float().square().mean().backward()
        for parameter in module.parameters():
            parameter.grad = None

    def look() -> None:
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
            call()

    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        work = 2.0 * macs(call)
    torch._dynamo.reset()
    for how in ("", "/compiled"):
        if how:
            _compiled(module)
        for what, run, times in (("forward", look, 1), ("gradient", learn, 3)):
            torch.cuda.reset_peak_memory_stats()
            took = _seconds(run, settings)
            yield Figure(f"accelerator/{who}{how}/{what}", batch / took, "samples/s", f"batch {batch}, bf16 autocast")
            yield Figure(f"accelerator/{who}{how}/{what}/share", times * work / took / rate, "of the matrix rate")
            yield Figure(f"accelerator/{who}{how}/{what}/memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def _compiled(module: nn.Module) -> nn.Module:
    for block in module.transformer_blocks if hasattr(module, "transformer_blocks") else module.blocks:  # type: ignore[union-attr]
        block.compile()
    return module


def _filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
    return module


def _spacetime(batch: int) -> tuple[nn.Module, Call]:
    z = torch.randn(batch, 16, 5, 32, 32, device=DEVICE)  # 1,280 tokens
    words = Condition(torch.randn(batch, WORDS, TEXT, device=DEVICE), torch.ones(batch, WORDS, dtype=torch.bool, device=DEVICE))
    sigma = torch.full((batch,), 0.5, device=DEVICE)
    with torch.device(DEVICE):
        network = _filled(Spacetime(SpacetimeConfig(WIDTH, DEPTH, WIDTH // 64, 16, (1, 2, 2), TEXT)))
    return network, lambda: network(z, sigma, words)


def _wan(batch: int) -> tuple[nn.Module, Call]:
    import diffusers

    z = torch.randn(batch, 16, 5, 32, 32, device=DEVICE)  # 1,280 tokens
    states = torch.randn(batch, WORDS, TEXT, device=DEVICE)
    step = torch.full((batch,), 500, device=DEVICE)
    with torch.device(DEVICE):
        network = _filled(
            diffusers.WanTransformer3DModel(
                num_attention_heads=WIDTH // 64,
                attention_head_dim=64,
                text_dim=TEXT,
                ffn_dim=4608,  # two matrices of it cost what our three of 3,072 do
                num_layers=DEPTH,
            )
        )
    return network, lambda: network(z, step, states, return_dict=False)[0]


def _images(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 256 tokens, step numbers and labels."""
    label = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    return torch.randn(batch, 4, 32, 32, device=DEVICE), torch.full((batch,), 500, device=DEVICE), label


def _dit(batch: int) -> tuple[nn.Module, Call]:
    z, step, label = _images(batch)
    with torch.device(DEVICE):
        network = _filled(DiT(DiTConfig(WIDTH, DEPTH, 16)))
    return network, lambda: network(z, step, label)


def _their_dit(batch: int) -> tuple[nn.Module, Call]:
    import diffusers

    z, step, label = _images(batch)
    with torch.device(DEVICE):
        network = _filled(
            diffusers.DiTTransformer2DModel(
                num_attention_heads=16,
                attention_head_dim=WIDTH // 16,
                in_channels=4,
                out_channels=8,
                num_layers=DEPTH,
                sample_size=32,
                patch_size=2,
            )
        )
    return network, lambda: network(z, timestep=step, class_labels=label, return_dict=False)[0]


def _clips(count: int) -> tuple[list[Tensor], list[Tensor], Condition]:
    """Clips of mixed sizes that fill 45 % of a batch padded to the largest."""
    sizes = [((17, 8, 14), (17, 16, 16), (5, 16, 16), (1, 16, 16))[i % 4] for i in range(count)]
    clips = [torch.randn(8, *size, device=DEVICE) for size in sizes]
    words = Condition(torch.randn(count, 20, 256, device=DEVICE), torch.ones(count, 20, dtype=torch.bool, device=DEVICE))
    return clips, [torch.rand((), device=DEVICE) for _ in clips], words


def _small() -> Spacetime:
    torch.manual_seed(0)
    network = Spacetime(SpacetimeConfig(384, 12, 6, 8, (1, 2, 2), 256)).to(DEVICE)
    _filled(network)
    return network


def _packing(settings: Settings) -> Iterator[Figure]:
    network = _small()
    clips, levels, words = _clips(64)
    batch = torch.zeros(len(clips), 8, *(max(clip.shape[d] for clip in clips) for d in (1, 2, 3)), device=DEVICE)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1], : clip.shape[2], : clip.shape[3]] = clip

    def learn(forward: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                out = forward()
            torch.stack([one.float().square().sum() for one in out]).sum().backward()
            network.zero_grad()

        return run

    for dtype in (torch.bfloat16, torch.float32):
        found = pack_trial(torch.device(DEVICE), dtype)
        for way, took in found.seconds.items():
            yield Figure(f"accelerator/packs/{str(dtype).removeprefix('torch.')}/{way}", 1e3 * took, "ms a pack", found.way)
        for way, why in found.left_out.items():
            yield Figure(f"accelerator/packs/{str(dtype).removeprefix('torch.')}/{way}", float("nan"), "left out", why)
    packed = _seconds(learn(lambda: network.forward_packed(clips, levels, words)), settings)
    padded = _seconds(learn(lambda: [network(batch, torch.stack(levels), words)]), settings)
    fill = sum(clip.numel() for clip in clips) / batch.numel()
    yield Figure("accelerator/packed", padded / packed, "x as fast as padded", f"{fill:.0%} filled, forward and backward")


def _parity() -> Iterator[Figure]:
    """How far results that should agree are from each other, in parts of their root mean square."""

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).norm() / b.float().norm())

    network = _small().eval()
    clips, levels, words = _clips(8)
    z, sigma = torch.stack(clips[::4]), torch.stack(levels[::4])
    text = words[0 : len(z)]
    with torch.inference_mode():
        samples = zip(clips, levels, strict=True)
        alone = [network(one[None], level[None], words[i : i + 1])[0] for i, (one, level) in enumerate(samples)]
        packed = network.forward_packed(clips, levels, words)
        worst = max(apart(a, b) for a, b in zip(packed, alone, strict=True))
        yield Figure("accelerator/parity/packed", worst, "apart", "fp32, from one by one", "< 1e-5")
        plain = network(z, sigma, text)
        yield Figure("accelerator/parity/again", apart(network(z, sigma, text), plain), "apart", "the same call twice", "0")
        with torch.autocast(DEVICE, torch.bfloat16):
            narrow = network(z, sigma, text)
        yield Figure("accelerator/parity/bf16", apart(narrow, plain), "apart", "bf16 autocast, from fp32", "< 2e-2")
        compiled = _compiled(copy.deepcopy(network))
        yield Figure(
            "accelerator/parity/compiled", apart(compiled(z, sigma, text), plain), "apart", "fp32, from eager", "< 1e-5"
        )
        cpu = network.cpu()(z.cpu(), sigma.cpu(), Condition(text.states.cpu(), text.mask.cpu()))
        yield Figure("accelerator/parity/cpu", apart(cpu.to(DEVICE), plain), "apart", "fp32, from the processor's", "< 1e-4")


if __name__ == "__main__":
    for figure in accelerator(Settings(repeats=7)):
        print(f"{figure.name:42s} {figure.value:10.4g} {figure.unit}  {figure.peer}  {figure.goal}", flush=True)
