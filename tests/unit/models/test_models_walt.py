from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.walt import SIZES, WALT, WALTBlock, WALTConfig, example, stated, tiny
from tubelet.nn.window_attention import WindowAttention, WindowCrossAttention, relative_index

KINDS = ("L", "L-K600", "T2V", "T2V-4x")
GRID, WINDOW, FRAME = (3, 4, 4), (3, 2, 2), (1, 4, 4)


def filled(module: Any) -> Any:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.2)
    return module


def built(kind: str) -> WALT:
    torch.manual_seed(0)
    return filled(WALT(tiny(SIZES[kind])))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> WALT:
    return built(request.param)


def inputs(config: WALTConfig, batch: int = 3) -> list[Any]:
    torch.manual_seed(1)
    return list(example(config, batch))


# Counts


def counted(config: WALTConfig) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the built module."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = WALT(config)
        model(*example(config))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(("size", "millions"), [("L", 313), ("XL", 460)])
def test_counts_are_those_of_the_stated_shape(size: str, millions: int) -> None:
    c = SIZES[size]
    D, N, L, cells = c.width, c.depth, 5 * 16 * 16, 8
    parameters, macs = counted(c)
    core = N * 12 * D**2 + 6 * D**2 + (N - 1) * 14 * D  # attention and MLP, the shared map, corrections of rank 2
    small = N * (9 * D + 2 * D // 16) + 6 * D  # biases of four linears, gains of queries and keys
    offsets = N // 2 * 16 * (31 * 31 + 9 * 15 * 15)
    ends = 2 * cells * D + D + 261 * D + (257 * D + D**2 + D) + 102 * D + (2 * D**2 + 2 * D) + cells * (D + 1)
    assert parameters == core + small + offsets + ends
    assert round(parameters / 1e6) == millions
    scores = N // 2 * 2 * L * (256 + 320) * D  # whole frames of 256 tokens, then windows of 320
    maps = (257 * D + D**2 - D) + 6 * D**2 + 2 * D**2 + (N - 1) * 14 * D
    assert macs == N * 12 * L * D**2 + scores + maps + 3 * L * cells * D


def test_the_stages_are_as_large_as_printed() -> None:
    counts = {size: counted(SIZES[size])[0] for size in ("T2V", "T2V-2x", "T2V-4x")}
    assert [round(counts["T2V"] / 1e9), round(counts["T2V-2x"] / 1e9, 1), round(counts["T2V-4x"] / 1e6)] == [3, 1.3, 419]
    D, N = 1920, 52
    rest = counts["T2V"] - N * 16 * D**2 - 6 * D**2 - (N - 1) * 14 * D
    assert 0 < rest < 0.01 * counts["T2V"], "four more widths squared per layer for the prompt"


def test_low_rank_costs_what_section_3_3_says() -> None:
    """ViT-g: 475 M of separate maps become 12 M."""
    D, N = 1408, 40
    with torch.device("meta"):
        model = WALT(WALTConfig(D, N))
    corrections = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert round((model.adaln.out.weight.numel() + corrections) / 1e6, 2) == 12.66
    assert round(N * 6 * D**2 / 1e6, 1) == 475.8
    blocks = [b for b in model.blocks if isinstance(b, WALTBlock)]
    assert [b.lora_up is None for b in blocks[:3]] == [True, False, False]
    assert [b.attention.window for b in blocks[:4]] == [(1, 16, 16), (5, 8, 8)] * 2


def test_the_stated_input_is_the_one_counted() -> None:
    c = SIZES["T2V-4x"]
    assert stated(c) == "8 x 5 x 64 x 112 latents (C, T, H, W), patch 2 x 2, 64 text tokens, a film of half the size"
    z, _, label, text, estimate, clean, known, low, low_t = example(c, 2)
    assert isinstance(z, Tensor)
    assert isinstance(text, Condition)
    assert isinstance(low, Tensor)
    assert z.shape == estimate.shape == (2, 8, 5, 64, 112)  # type: ignore[union-attr]
    assert low.shape == (2, 8, 5, 32, 56)
    assert (text.states.shape, label, clean, known, low_t.shape) == ((2, 64, 2048), None, None, None, (2,))  # type: ignore[union-attr]


# Windows, against dense attention under a mask


def dense(module: WindowAttention, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """`(L, D)`: every pair of tokens, those of other windows shut out, the bias looked up offset by offset."""
    t, h, w = module.window
    places = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
    D, d = x.shape[-1], x.shape[-1] // module.heads
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).split(D, -1)
    heads = []
    for n in range(module.heads):
        at = slice(n * d, (n + 1) * d)
        qn = F.rms_norm(q[:, at], (d,), module.q_norm.weight, 1e-6)
        kn = F.rms_norm(k[:, at], (d,), module.k_norm.weight, 1e-6)
        scores = qn @ kn.T / d**0.5
        for a, (i, j, l) in enumerate(places):
            for b, (ii, jj, ll) in enumerate(places):
                if (i // t, j // h, l // w) != (ii // t, jj // h, ll // w):
                    scores[a, b] = -torch.inf
                else:
                    row = ((i - ii + t - 1) * (2 * h - 1) + j - jj + h - 1) * (2 * w - 1) + l - ll + w - 1
                    scores[a, b] += module.offset_bias[n, row]
        heads.append(scores.softmax(-1) @ v[:, at])
    return F.linear(torch.cat(heads, -1), module.out.weight, module.out.bias)


@torch.no_grad()
@pytest.mark.parametrize("window", [FRAME, WINDOW, (1, 2, 4)])
def test_windows_are_dense_attention_under_a_mask(window: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    module = filled(WindowAttention(16, 2, window))
    x = torch.randn(1, 48, 16)
    torch.testing.assert_close(module(x, GRID, relative_index(window))[0], dense(module, x[0], GRID), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_passes_through_windows_that_span_time() -> None:
    torch.manual_seed(0)
    across, within = filled(WindowAttention(16, 2, WINDOW)), filled(WindowAttention(16, 2, FRAME))
    x = torch.randn(2, 16, 16)
    values = F.linear(x, across.qkv.weight, across.qkv.bias)[..., 32:]
    expected = F.linear(values, across.out.weight, across.out.bias)
    torch.testing.assert_close(across(x, (1, 4, 4), relative_index(WINDOW)), expected)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (within(changed, (1, 4, 4), relative_index(FRAME)) - within(x, (1, 4, 4), relative_index(FRAME))).abs().amax(-1)
    assert (moved > 1e-5).all(), "in windows of one frame an image is attended to as any frame is"


@torch.no_grad()
def test_a_token_looks_at_its_window_and_the_prompt_in_one_softmax() -> None:
    torch.manual_seed(0)
    module = WindowCrossAttention(16, 2, FRAME)
    x, text = torch.randn(2, 48, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    out = module(x, GRID, text, mask)
    for b, frame in ((0, 0), (0, 2), (1, 1)):
        own = x[b, 16 * frame : 16 * frame + 16]
        seen = torch.cat([own, text[b, mask[b]]])
        q = F.linear(own, module.q.weight, module.q.bias)
        k, v = F.linear(seen, module.kv.weight, module.kv.bias).split(16, -1)
        heads = []
        for at in (slice(0, 8), slice(8, 16)):
            scores = F.rms_norm(q[:, at], (8,), eps=1e-6) @ F.rms_norm(k[:, at], (8,), eps=1e-6).T / 8**0.5
            heads.append(scores.softmax(-1) @ v[:, at])
        expected = F.linear(torch.cat(heads, -1), module.out.weight, module.out.bias)
        torch.testing.assert_close(out[b, 16 * frame : 16 * frame + 16], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_block_is_modulated_by_the_shared_map_and_its_own_correction() -> None:
    config = tiny(SIZES["L"])
    block = filled(WALTBlock(config, WINDOW, 2))
    D = 32
    x, shared, c = torch.randn(2, 48, D), torch.randn(2, 1, 6 * D), torch.randn(2, 1, D)
    parts = shared + c @ block.lora_down.T @ block.lora_up.T
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts.split(D, -1)
    index = relative_index(WINDOW)
    h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale_a) + shift_a
    y = x + gate_a * block.attention(h, GRID, index)
    h = F.layer_norm(y, (D,), eps=1e-6) * (1 + scale_m) + shift_m
    y = y + gate_m * block.mlp.down(F.gelu(block.mlp.up(h), approximate="tanh"))
    torch.testing.assert_close(block(x, shared, c, GRID, index, None, None), y, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frames_meet_only_in_every_second_layer() -> None:
    def reached(depth: int) -> list[bool]:
        model = filled(WALT(replace(tiny(SIZES["L"]), depth=depth)))
        z, t, *_ = inputs(model.config, 1)
        other = z.clone()
        other[:, :, 0, 0, 0] += 5
        return ((model(other, t) - model(z, t)).abs().amax((0, 1, 3, 4)) > 1e-6).tolist()

    assert reached(1) == [True, False, False]
    assert reached(2) == [True, True, True]


@torch.no_grad()
def test_an_image_is_a_film_of_one_frame_at_the_first_place() -> None:
    """Its places are those of frame 0, and it needs no window in time: with the layers that span time shut, frame 0 is it."""
    model = built("L")
    for block in model.blocks:
        if isinstance(block, WALTBlock) and block.attention.window == WINDOW:
            block.attention.out.weight.zero_()
    z, t, label, *_ = inputs(model.config)
    film, image = model(z, t, label), model(z[:, :, :1], t, label)
    assert image.shape == (3, 4, 1, 4, 4)
    torch.testing.assert_close(image, film[:, :, :1], atol=1e-5, rtol=1e-5)


# What is known


@torch.no_grad()
def test_the_estimate_is_zero_at_first_and_matters() -> None:
    model = built("L")
    z, t, label, text, estimate, *_ = inputs(model.config)
    base = model(z, t, label, text)
    assert torch.equal(base, model(z, t, label, text, torch.zeros_like(z)))
    assert (model(z, t, label, text, estimate) - base).abs().max() > 1e-3


@torch.no_grad()
def test_known_frames_and_their_mask_stand_beside_the_noise() -> None:
    model = built("L-K600")
    z, t, _, _, estimate, clean, known, *_ = inputs(model.config)
    base = model(z, t, None, None, estimate, clean, known)
    assert known.sum(1).tolist() == [2, 2, 2]
    poisoned = clean.masked_fill(~known[:, None, :, None, None], torch.nan)
    assert torch.equal(model(z, t, None, None, estimate, poisoned, known.float()), base), "1 is known, nothing else is seen"
    nothing = model(z, t, None, None, estimate)
    assert torch.equal(model(z, t, None, None, estimate, clean, torch.zeros(3, 3)), nothing)
    assert (base - nothing).abs().max() > 1e-3
    black = torch.zeros_like(clean)
    assert (model(z, t, None, None, estimate, black, known) - nothing).abs().max() > 1e-4, "a known black frame is known"
    channels = model._channels(z, estimate, clean, known, None)
    wide = known[:, None, :, None, None].float().expand(-1, -1, -1, 4, 4)
    assert torch.equal(channels, torch.cat([z, estimate, clean * wide, wide], dim=1))


@torch.no_grad()
def test_a_smaller_film_is_enlarged_frame_by_frame() -> None:
    model = built("T2V-4x")
    rest = inputs(model.config)
    base, low, low_t = model(*rest), rest[7], rest[8]
    channels = model._channels(rest[0], rest[4], None, None, low)
    assert channels.shape == (3, 12, 3, 8, 8)
    brighter = low.clone()
    brighter[:, :, 1] += 1
    change = (model._channels(rest[0], rest[4], None, None, brighter) - channels).abs().amax((0, 1, 3, 4))
    assert (change > 0).tolist() == [False, True, False]
    assert model.enlarge is not None
    large = F.conv2d(low[:, :, 1], model.enlarge.weight, model.enlarge.bias, padding=1)  # (B, 4C, h, w)
    torch.testing.assert_close(channels[:, 8:, 1, 5, 2], large.unflatten(1, (2, 2, 4))[:, 1, 0, :, 2, 1])
    assert (model(*rest[:7], low.flip(3), low_t) - base).abs().max() > 1e-3
    assert (model(*rest[:7], low, low_t.flip(0)) - base)[0].abs().max() > 1e-5


@torch.no_grad()
def test_a_prompt_matters_by_its_real_tokens() -> None:
    model = built("T2V")
    z, t, label, text, *rest = inputs(model.config)
    mask = text.mask.clone()
    mask[:, 40:] = False
    base = model(z, t, label, Condition(text.states, mask), *rest)
    padded = text.states.clone()
    padded[:, 40:] = 1e3
    torch.testing.assert_close(model(z, t, label, Condition(padded, mask), *rest), base, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(z, t, label, Condition(text.states[:, :40], mask[:, :40]), *rest), base, atol=1e-5, rtol=0)
    assert (model(z, t, label, Condition(text.states.flip(0), mask), *rest) - base)[0].abs().max() > 1e-4


@torch.no_grad()
def test_step_and_label_matter() -> None:
    model = built("L")
    z, t, label, *_ = inputs(model.config)
    base = model(z, t, label)
    assert (model(z, t.flip(0), label) - base)[0].abs().max() > 1e-4
    other = (label + 1) % 10
    assert (model(z, t, other) - base).abs().amax((1, 2, 3, 4)).min() > 1e-4
    assert torch.equal(model(z, t), model(z, t, torch.full((3,), 10)))
    for axis in (2, 3, 4):
        assert (model(z.flip(axis), t, label).flip(axis) - base).abs().max() > 1e-3, "a token knows where it is"


# The start


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_exactly_zero_at_the_start_and_blocks_are_the_identity(kind: str) -> None:
    torch.manual_seed(0)
    model = WALT(tiny(SIZES[kind]))
    given = inputs(model.config)
    assert model(*given).eq(0).all()
    x, c = torch.randn(3, 48, 32), torch.randn(3, 1, 32)
    text = torch.randn(3, 7, 32) if model.text_in is not None else None
    mask = torch.ones(3, 7, dtype=torch.bool) if text is not None else None
    for i, block in enumerate(model.blocks):
        assert torch.equal(block(x, model.adaln(c), c, GRID, relative_index(WINDOW if i % 2 else FRAME), text, mask), x)


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_then_filled_equals_built_in_place(kind: str) -> None:
    config = tiny(SIZES[kind])
    with torch.device("meta"):
        late = WALT(config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    now = WALT(config)
    torch.manual_seed(3)
    now.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# What every kind promises


def test_gradient_reaches_every_parameter(model: WALT) -> None:
    given = inputs(model.config)
    out = model(*given)
    assert out.shape == given[0].shape
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_batch_equals_singles(model: WALT) -> None:
    batch = inputs(model.config)
    singles = [model(*(None if one is None else one[i : i + 1] for one in batch)) for i in range(3)]
    torch.testing.assert_close(model(*batch), torch.cat(singles), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_is_close(model: WALT) -> None:
    base = model(*inputs(model.config))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs(model.config))
    for out in (autocast, copy.deepcopy(model).bfloat16()(*inputs(model.config))):
        assert out.dtype == base.dtype
        assert (out - base).square().mean() < 5e-3 * base.square().mean()


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 33}, "try 128"),
        ({"depth": 0}, "at least 1"),
        ({"window": (3, 3, 2)}, "do not tile a grid"),
        ({"frame": (4, 3)}, "choose divisors"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(WALTConfig, to_dict(tiny(SIZES["L"])) | settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    models = {kind: built(kind) for kind in KINDS}
    given = {kind: inputs(models[kind].config) for kind in KINDS}

    def bad(kind: str, **changes: Any) -> tuple[WALT, list[Any]]:
        names = ("z", "t", "label", "text", "estimate", "clean", "known", "low", "low_t")
        return models[kind], [changes.get(name, value) for name, value in zip(names, given[kind], strict=True)]

    z, t, label, *_ = given["L"]
    text = given["T2V"][3]
    for (model, arguments), message in (
        (bad("L", z=z[:, :3]), r"must be \(B, 4, T, H, W\)"),
        (bad("L", z=z[:, :, :2], estimate=None), "crop the clip"),
        (bad("L", z=z[..., :2], estimate=None), "crop the clip"),
        (bad("L", z=z.repeat(1, 1, 2, 1, 1), estimate=None), r"up to \(3, 4, 4\)"),
        (bad("L", t=t[:2]), "one of each per clip"),
        (bad("L", label=label[:2]), "one of each per clip"),
        (bad("L", label=-label - 1), "labels are from 0"),
        (bad("L-K600", label=label), "labels go to a WALT with classes"),
        (bad("L", estimate=z[:2]), "an estimate has the shape of z"),
        (bad("L", clean=z, known=torch.ones(3, 3)), "predict=True"),
        (bad("L-K600", known=None), "pass both or neither"),
        (bad("L-K600", known=torch.ones(3, 2)), r"known is \(3, 3\)"),
        (bad("L", text=text), "a prompt is given to a WALT with text_width"),
        (bad("T2V", text=None), "always, and to no other"),
        (bad("T2V", text=Condition(text.states[..., 1:], text.mask)), "one prompt per clip"),
        (bad("T2V-4x", low=None), "upscale=True, always"),
        (bad("T2V-4x", low_t=None), "low_t to one with upscale=True"),
        (bad("T2V-4x", low=given["T2V-4x"][0]), "halve rows and columns"),
    ):
        with pytest.raises(UserError, match=message):
            model(*arguments)


# Full attention


def test_without_alternation_windows_as_large_as_the_grid_are_full_attention() -> None:
    """Every layer sees everything: a change of one cell reaches all of them in the first one."""
    config = replace(tiny(SIZES["L"]), window=GRID, alternate=False, depth=1)
    model = filled(WALT(config))
    assert [b.attention.window for b in model.blocks if isinstance(b, WALTBlock)] == [GRID]
    z, t, label, *_ = inputs(config, 1)
    other = z.clone()
    other[:, :, 0, 0, 0] += 1
    with torch.no_grad():
        moved = (model(z, t, label) - model(other, t, label)).abs().amax((0, 1))  # (T, H, W)
    assert (moved > 0).all()
    alternating = filled(WALT(replace(config, alternate=True)))
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in alternating.parameters())
    with torch.no_grad():
        moved = (alternating(z, t, label) - alternating(other, t, label)).abs().amax((0, 1))
    assert (moved[0] > 0).all()
    assert not moved[1:].any()
