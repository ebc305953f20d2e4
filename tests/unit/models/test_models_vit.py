from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig as TheirConfig
from transformers import ViTModel

from tubelet.core.errors import UserError
from tubelet.models.vit import SIZES, ViT, ViTConfig, example, stated, tiny

TINY = tiny(SIZES["B/16"])  # 48 x 48 px in 3 x 3 patches
PUBLISHED = {"B/16": 85.80, "L/16": 303.30, "H/14": 630.76}  # millions, without a head


@pytest.fixture
def model() -> ViT:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**vars(TINY), "classes": 5}))
    for p in model.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return model


def images(batch: int = 3, rows: int = 3, columns: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16 * rows, 16 * columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_published_ones(size: str) -> None:
    config = SIZES[size]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = ViT(config)
        model(*example(config))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PUBLISHED[size]
    L, D, cells = (config.image // config.patch) ** 2, config.width, 3 * config.patch**2
    macs = L * cells * D + config.depth * ((L + 1) * 12 * D * D + 2 * (L + 1) ** 2 * D)
    assert counter.get_total_flops() == 2 * macs


def test_the_stated_input_is_the_one_counted() -> None:
    assert stated(SIZES["H/14"]) == "3 x 224 x 224 image (C, H, W), patch 14"
    assert [x.shape for x in example(TINY, 2)] == [(2, 3, 48, 48)]


def theirs(eps: float = TINY.eps) -> ViTModel:
    config = TheirConfig(
        hidden_size=TINY.width,
        num_hidden_layers=TINY.depth,
        num_attention_heads=TINY.heads,
        intermediate_size=4 * TINY.width,
        image_size=TINY.image,
        patch_size=TINY.patch,
        layer_norm_eps=eps,
    )
    torch.manual_seed(2)
    model = ViTModel(config, add_pooling_layer=False).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (or gradients) of `transformers.ViTModel` under our names and in our shapes."""
    ours = {
        "embed.cls": tensors["embeddings.cls_token"][0, 0],
        "embed.positions": tensors["embeddings.position_embeddings"][0],
        "embed.project.weight": tensors["embeddings.patch_embeddings.projection.weight"].movedim(1, -1).flatten(1),
        "embed.project.bias": tensors["embeddings.patch_embeddings.projection.bias"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = tensors[f"layernorm.{kind}"]
        for i in range(TINY.depth):
            block = f"layers.{i}."
            qkv = [tensors[f"{block}attention.{letter}_proj.{kind}"] for letter in "qkv"]
            ours[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(qkv)
            for name, other in (
                ("attention_norm", "layernorm_before"),
                ("attention.out", "attention.o_proj"),
                ("mlp_norm", "layernorm_after"),
                ("mlp.up", "mlp.fc1"),
                ("mlp.down", "mlp.fc2"),
            ):
                ours[f"blocks.{i}.{name}.{kind}"] = tensors[f"{block}{other}.{kind}"]
    return ours


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (4, 4), (2, 5)])
def test_outputs_and_gradients_equal_transformers(eps: float, rows: int, columns: int) -> None:
    reference = theirs(eps)
    model = ViT(ViTConfig(**{**vars(TINY), "eps": eps}))
    model.load_state_dict(renamed(reference.state_dict()))
    pixels = images(2, rows, columns)
    expected = reference(pixels, interpolate_pos_encoding=(rows, columns) != (3, 3)).last_hidden_state
    found = model.tokens(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).mean().backward()
    (found * weights).mean().backward()
    gradients = renamed({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        near = 1e-5 * float(gradients[name].abs().max())
        torch.testing.assert_close(p.grad, gradients[name], atol=near, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(model(pixels), found[:, 0])


def test_positions_of_another_size_leave_the_class_token_alone() -> None:
    embed = ViT(TINY).embed
    assert embed.positions_at(3, 3) is embed.positions
    table = embed.positions_at(6, 4)
    assert table.shape == (25, TINY.width)
    assert torch.equal(table[0], embed.positions[0])
    cells = embed.positions[1:].T.reshape(1, -1, 3, 3)
    expected = F.interpolate(cells, (6, 4), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(table[1:], expected)


def test_a_head_reads_the_class_token(model: ViT) -> None:
    assert model.head is not None
    assert model(images()).shape == (3, 5)
    torch.testing.assert_close(model(images()), model.head(model.tokens(images())[:, 0]))
    assert ViT(model.config)(images()).eq(0).all(), "a new head says nothing"


def test_gradient_reaches_every_parameter(model: ViT) -> None:
    model(images()).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_batch_equals_singles(model: ViT) -> None:
    pixels = images(3, 2, 4)
    singles = torch.cat([model(one[None]) for one in pixels])
    torch.testing.assert_close(model(pixels), singles, atol=1e-5, rtol=0)
    assert (singles[0] - singles[1]).abs().max() > 1e-3


def test_built_on_meta_then_filled_equals_built_in_place(model: ViT) -> None:
    with torch.device("meta"):
        late = ViT(model.config)
    late = late.to_empty(device="cpu")
    for p in late.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(3)
    late.init_weights()
    torch.manual_seed(3)
    model.init_weights()
    for (name, a), (_, b) in zip(late.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_is_close(model: ViT) -> None:
    base = model(images(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images(8)) - base).square().mean() < 2e-3 * base.square().mean()
    assert model.bfloat16()(images(2, 2, 2)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "at least 1"),
        ({"classes": -1}, "classes at least 0"),
        ({"width": 100}, "12 heads; try 768"),
        ({"image": 225}, "try 224"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViTConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1, 48, 48), r"must be \(B, 3, H, W\)"), ((3, 48, 48), "rearrange"), ((1, 3, 48, 40), "multiples of 16, got 48 x 40")],
)
def test_images_that_do_not_fit_are_named(model: ViT, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(torch.zeros(shape))
