from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import save_tensors
from tubelet.models.dit import (
    CONDITIONINGS,
    PUBLISHED_NAMES,
    SIZES,
    DiT,
    DiTConfig,
    example,
    load_published,
    stated,
    tiny,
)
from tubelet.nn.adaln_zero import AdaLNBlock, drop_labels, sincos_plane, timestep_waves

TINY = tiny(SIZES["S/2"])


def perturbed(model: DiT) -> DiT:
    """As after some training: nothing is zero any more."""
    for p in model.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(params=CONDITIONINGS)
def model(request: pytest.FixtureRequest) -> DiT:
    torch.manual_seed(0)
    return perturbed(DiT(replace(TINY, conditioning=request.param)))


def inputs(batch: int = 3, rows: int = 4, columns: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, rows, columns, generator=g)
    return x, torch.tensor([999.0, 3.5, 500.0])[:batch], torch.tensor([2, 10, 7])[:batch]


# Counts


def counted(config: DiTConfig, side: int = 32) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the built module."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = DiT(config)
        model(*example(config, 1, side))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# Parameters in millions and multiply-accumulates in 1e9, as counted from the released code; the paper's table 4 rounds them.
PUBLISHED = {
    "S/8": (33.14, 0.36),
    "S/4": (32.92, 1.41),
    "S/2": (32.87, 6.06),
    "B/8": (130.87, 1.42),
    "B/4": (130.43, 5.57),
    "B/2": (130.32, 23.01),
    "XL/8": (675.66, 7.39),
    "XL/4": (675.00, 29.04),
    "XL/2": (674.83, 118.62),
}
# The paper's table 4 alone, which counts a little more than the products.
ROUNDED = {"L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71)}


@pytest.mark.parametrize("size", SIZES)
def test_counts_agree_with_arithmetic_and_with_the_paper(size: str) -> None:
    c = SIZES[size]
    D, N, cells, L = c.width, c.depth, c.patch**2 * 4, (32 // c.patch) ** 2
    parameters, macs = counted(c)
    embedders, head = cells * D + D + (257 * D + D**2 + D) + 1001 * D, 2 * D**2 + 2 * D + 2 * cells * (D + 1)
    assert parameters == N * (18 * D**2 + 15 * D) + embedders + head
    assert macs == N * (12 * L * D**2 + 2 * L**2 * D + 6 * D**2) + 3 * L * cells * D + 256 * D + 3 * D**2
    if size in PUBLISHED:
        assert (round(parameters / 1e6, 2), round(macs / 1e9, 2)) == PUBLISHED[size]
    else:
        assert round(parameters / 1e6) == ROUNDED[size][0]
        assert macs / 1e9 == pytest.approx(ROUNDED[size][1], rel=0.005)


def test_frozen_positions_make_up_the_rest_of_the_released_count() -> None:
    for size, total in (("S/2", 32.96), ("B/2", 130.51), ("XL/2", 675.13)):
        c = SIZES[size]
        assert counted(c)[0] + sincos_plane(c.width, 16, 16).numel() == pytest.approx(total * 1e6, abs=5e3)


def test_compute_at_512_px() -> None:
    assert round(counted(SIZES["XL/2"], 64)[1] / 1e9, 2) == 524.54


@pytest.mark.parametrize(
    ("conditioning", "millions", "gmacs"),
    [("in-context", 449, 119.37), ("cross-attention", 598, 137.62), ("adaln", 600, 118.56), ("adaln-zero", 675, 118.64)],
)
def test_the_four_kinds_of_block_cost_what_table_4_says(conditioning: Any, millions: int, gmacs: float) -> None:
    parameters, macs = counted(replace(SIZES["XL/2"], conditioning=conditioning))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.6)
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_the_stated_input_is_the_one_counted() -> None:
    assert stated(SIZES["XL/2"]) == "4 x 32 x 32 latents (C, H, W), patch 2 x 2, one of 1000 classes"
    x, t, label = example(SIZES["XL/2"], 3)
    assert (x.shape, t.shape, label.shape) == ((3, 4, 32, 32), (3,), (3,))


# Parity with an independent implementation


def reference() -> Any:
    """diffusers' DiT with random weights and, as the released one, a single embedder for all blocks."""
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=12,
        num_embeds_ada_norm=10,
    ).eval()
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    return theirs


def published_layout(theirs: Any) -> dict[str, Tensor]:
    """Those weights under the names and in the shapes that facebookresearch/DiT publishes."""
    state = theirs.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    out = {"pos_embed": theirs.pos_embed.pos_embed}
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": first + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": first + "timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for n in range(len(theirs.transformer_blocks)):
        a, b = f"blocks.{n}.", f"transformer_blocks.{n}."
        pairs |= {a + "adaLN_modulation.1": b + "norm1.linear", a + "attn.proj": b + "attn1.to_out.0"}
        pairs |= {a + "mlp.fc1": b + "ff.net.0.proj", a + "mlp.fc2": b + "ff.net.2"}
        for kind in ("weight", "bias"):
            out[f"{a}attn.qkv.{kind}"] = torch.cat([state[f"{b}attn1.to_{one}.{kind}"] for one in "qkv"])
    for ours, name in pairs.items():
        out |= {f"{ours}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    out["y_embedder.embedding_table.weight"] = state[first + "class_embedder.embedding_table.weight"]
    return out


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reference()


@pytest.fixture(scope="module")
def published(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "published.safetensors"
    save_tensors(path, published_layout(theirs))
    return path


@pytest.fixture(scope="module")
def ours(published: Path) -> DiT:
    model = DiT(TINY)
    load_published(published, model)
    return model


@torch.no_grad()
def test_equals_diffusers_once_its_two_deviations_are_undone(theirs: Any, ours: DiT) -> None:
    x, t, label = inputs(3, 12, 12)
    mine = ours(x, t, label)
    assert mine.std() > 0.1

    def gap(model: Any) -> float:
        return float((model(x, timestep=t, class_labels=label).sample - mine).abs().max())

    assert gap(theirs) > 1e-2
    waves = copy.deepcopy(theirs)
    for block in waves.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert gap(waves) < 1e-2, "the exponent k / 127 is what shows"
    for block in waves.transformer_blocks:
        assert block.norm3.eps == 1e-5
        block.norm3.eps = 1e-6
    assert gap(waves) < 1e-5


def test_how_far_diffusers_deviates(theirs: Any, ours: DiT) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([999.0])
    shifted = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    gap = (shifted - timestep_waves(t)).abs()
    assert float(gap.max()) == pytest.approx(1.94, abs=0.01)
    assert float(gap.mean()) == pytest.approx(0.45, abs=0.01)
    plain = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_waves(t), plain, atol=1e-6, rtol=0)

    quiet = torch.randn(1, 4, 32) * 3e-3  # where the variance is near eps, eps is no detail
    assert (theirs.transformer_blocks[0].norm3(quiet) - ours.blocks[0].mlp_norm(quiet)).abs().max() > 0.1
    own = sum(p.numel() for p in theirs.transformer_blocks[1].norm1.emb.parameters())
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) + own


def test_positions_are_the_published_table(theirs: Any) -> None:
    torch.testing.assert_close(sincos_plane(32, 6, 6)[None], theirs.pos_embed.pos_embed, atol=1e-6, rtol=0)
    table = sincos_plane(8, 2, 3)  # the first half says the column, the second the row: sines, then cosines
    omega = torch.tensor([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            places = [f(n * omega) for n in (column, row) for f in (torch.sin, torch.cos)]
            torch.testing.assert_close(table[row * 3 + column], torch.cat(places))


# The file of published weights


def test_a_file_that_does_not_fit_is_refused(theirs: Any, published: Path, tmp_path: Path) -> None:
    model = DiT(TINY)
    before = copy.deepcopy(model.state_dict())
    layout = published_layout(theirs)

    def refused(message: str, path: Path = tmp_path / "changed.safetensors", target: DiT = model, **changed: Tensor) -> None:
        if path.name == "changed.safetensors":
            save_tensors(path, {name: value for name, value in (layout | changed).items() if value.numel()})
        with pytest.raises(UserError, match=message):
            load_published(path, target)

    refused("does not exist; check", path=tmp_path / "none.safetensors")
    refused(r"missing \['blocks.1.attn.proj.bias'\]", **{"blocks.1.attn.proj.bias": torch.empty(0)})
    refused(r"missing \['pos_embed'\]", pos_embed=torch.empty(0))
    refused(r"unknown \['blocks.2.norm.weight'\]", **{"blocks.2.norm.weight": torch.ones(32)})
    refused(r"wrong shape \['x_embedder.proj.weight'\]", **{"x_embedder.proj.weight": torch.ones(32, 16, 1, 1)})
    refused(r"not finite \(\['final_layer.linear.bias'\]\)", **{"final_layer.linear.bias": torch.full((32,), torch.nan)})
    refused("other positions", pos_embed=layout["pos_embed"].roll(16, -1))
    refused("other positions", pos_embed=layout["pos_embed"][:, 1:])
    refused("wrong shape .*take the size and patch", path=published, target=DiT(replace(TINY, patch=4)))
    refused("build it with adaln-zero", path=published, target=DiT(replace(TINY, conditioning="adaln")))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_name_of_the_published_layout_is_known() -> None:
    """The names themselves, not what our own writer makes of them."""
    with torch.device("meta"):
        model = DiT(replace(TINY, depth=1))
    found = set()
    for name in model.state_dict():
        for old, new in PUBLISHED_NAMES:
            name = name.replace(old, new)
        found.add(name)
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    modules += [f"blocks.0.{m}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    modules += ["final_layer.adaLN_modulation.1"]
    assert found == {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")} | {"y_embedder.embedding_table.weight"}


# The start


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_output_is_exactly_zero_at_the_start(conditioning: Any) -> None:
    torch.manual_seed(0)
    assert DiT(replace(TINY, conditioning=conditioning))(*inputs()).eq(0).all()


def test_only_adaln_zero_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 6, 32), torch.randn(2, 1, 32)
    for conditioning in ("adaln", "adaln-zero"):
        block = DiT(replace(TINY, conditioning=conditioning)).blocks[0]
        assert torch.equal(block(x, c), x) == (conditioning == "adaln-zero")


def test_weights_start_as_released() -> None:
    torch.manual_seed(0)
    model = DiT(replace(TINY, width=128, depth=1, classes=999))
    block = model.blocks[0]
    assert isinstance(block, AdaLNBlock)
    for weight, bound in ((block.attention.qkv.weight, (6 / 512) ** 0.5), (model.patch_in.weight, (6 / 144) ** 0.5)):
        assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    for weight in (model.timestep.up.weight, model.timestep.down.weight, model.labels.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_built_on_meta_then_filled_equals_built_in_place(conditioning: Any) -> None:
    config = replace(TINY, conditioning=conditioning)
    with torch.device("meta"):
        late = DiT(config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    now = DiT(config)
    torch.manual_seed(3)
    now.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# What every kind promises


def test_shape_and_dtype_of_the_output(model: DiT) -> None:
    for rows, columns in ((2, 2), (4, 6), (8, 2)):
        x, t, label = inputs(3, rows, columns)
        out = model(x, t, label)
        assert out.shape == (3, 8, rows, columns)
        assert out.std() > 0.01
    small = DiT(replace(model.config, learn_sigma=False))
    assert small(*inputs()).shape == (3, 4, 4, 6)


def test_gradient_reaches_every_parameter(model: DiT) -> None:
    x, t, label = inputs()
    x.requires_grad_()
    model(x, t, label).square().mean().backward()
    for name, p in [*model.named_parameters(), ("x", x)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_batch_equals_singles(model: DiT) -> None:
    batch = inputs()
    singles = [model(*(one[i : i + 1] for one in batch)) for i in range(3)]
    torch.testing.assert_close(model(*batch), torch.cat(singles), atol=1e-5, rtol=0)


def test_every_input_matters(model: DiT) -> None:
    x, t, label = inputs()
    base = model(x, t, label)
    assert (model(x, t.flip(0), label) - base)[0].abs().max() > 1e-4
    assert (model(x, t, label.flip(0)) - base)[0].abs().max() > 1e-4
    moved = x.clone()
    moved[:, :, -1, -1] += 3
    assert (model(moved, t, label) - base)[:, :, 0, 0].abs().max() > 1e-4
    swapped = model(x.flip(-1), t, label).flip(-1)
    assert (swapped - base).abs().max() > 1e-3, "a token knows where it is"


@torch.no_grad()
def test_half_precision_is_close(model: DiT) -> None:
    base = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs())
    for out in (autocast, copy.deepcopy(model).bfloat16()(*inputs())):
        assert out.dtype == base.dtype
        assert (out - base).square().mean() < 2e-3 * base.square().mean()


def test_labels_are_dropped_at_their_rate_and_by_their_generator() -> None:
    label = torch.arange(10).repeat(2000)
    dropped = drop_labels(label, 10, torch.Generator().manual_seed(0))
    null = dropped == 10
    assert float(null.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[~null], label[~null])
    assert torch.equal(dropped, drop_labels(label, 10, torch.Generator().manual_seed(0)))
    assert drop_labels(label, 10, torch.Generator(), 0.0).max() == 9
    torch.manual_seed(0)
    model = perturbed(DiT(TINY)).train()
    assert torch.equal(model(*inputs()), model(*inputs())), "a network draws nothing itself"


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 33}, "try 128"),
        ({"depth": 0}, "at least 1"),
        ({"classes": 0}, "at least 1"),
        ({"conditioning": "film"}, "in-context, cross-attention, adaln, adaln-zero"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(DiTConfig, to_dict(TINY) | {"heads": 2} | settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    model = DiT(TINY)
    x, t, label = inputs()
    for bad, message in (
        ((x[:, :3], t, label), r"must be \(B, 4, H, W\), got \(3, 3, 4, 6\)"),
        ((x[0], t, label), r"must be \(B, 4, H, W\)"),
        ((x[..., :5], t, label), "latent width must be a multiple of 2, got 5"),
        ((x, t[0], label), "3 step numbers and 3 labels"),
        ((x, t, label[:2]), "one of each per latent"),
        ((x, t, label + TINY.classes + 1), f"labels are from 0 to {TINY.classes}, got"),
        ((x, t, label - TINY.classes - 1), "labels are from 0"),
    ):
        with pytest.raises(UserError, match=message):
            model(*bad)
