from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import Cosine
from tubelet.diffusion.solvers import ddim
from tubelet.models.unclip import (
    SCALE,
    SIZES,
    AutoregressiveConfig,
    AutoregressivePrior,
    DiffusionPrior,
    PriorConfig,
    build,
    dot_level,
    drop_text,
    example,
    fit_dots,
    high_dots,
    invert,
    keep_better,
    prior_loss,
    stated,
    text_difference,
    tiny,
)
from tubelet.nn.degradation import aligned_crops, blur, bsr, gaussian_blur, gaussian_kernel
from tubelet.nn.principal import fit_buckets, fit_pca
from tubelet.nn.sphere import slerp

PRIOR = PriorConfig(width=32, depth=2, heads=2, embed=12, text_width=12, context=6)
AR = AutoregressiveConfig(32, 2, 2, 16, 1, 2, embed=12, vocab=50, context=6, components=5, buckets=8, dots=4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


# Counts


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    with torch.device("meta"):
        return {name: sum(p.numel() for p in build(config).parameters()) for name, config in SIZES.items()}


def block(width: int) -> int:
    return 12 * width**2 + 13 * width


def test_counts_agree_with_arithmetic_and_with_the_paper(counted: dict[str, int]) -> None:
    D, E = 2048, 1024
    around = 3 * (E + 1) * D + 2 * (D + 1) * D + D + (77 + 4) * D + 2 * D + (D + 1) * E
    assert counted["Prior"] == 24 * block(D) + around
    assert round(24 * block(D) / 1e9, 2) == 1.21
    assert counted["Prior"] / 1e9 == pytest.approx(1.21, rel=0.02)
    W, D = 2048, 1664
    text = 24 * block(W) + 49_408 * W + 77 * W + 2 * W
    around = (W + 1) * D + (E + 1) * D + 2 * 1024 * D + (77 + 1 + 319) * D + 2 * D + (D + 1) * 1024
    assert counted["AR-Prior"] == text + 24 * block(D) + around


def test_multiply_accumulates_agree_with_arithmetic() -> None:
    def macs(config: PriorConfig | AutoregressiveConfig) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            build(config)(*example(config, 1))
        return counter.get_total_flops() // 2

    def blocks(length: int, width: int) -> int:
        return 24 * (12 * length * width**2 + 2 * length**2 * width)

    prior, D, E = PriorConfig(), 2048, 1024
    assert macs(prior) == blocks(77 + 4, D) + 77 * E * D + 2 * E * D + 2 * D**2 + D * E
    W, D, L = 2048, 1664, 77 + 2 + 318
    assert macs(AutoregressiveConfig()) == blocks(77, W) + 77 * W * D + E * D + blocks(L, D) + L * D * 1024


def test_sizes_are_the_published_ones() -> None:
    prior, ar = SIZES["Prior"], SIZES["AR-Prior"]
    assert isinstance(prior, PriorConfig)
    assert isinstance(ar, AutoregressiveConfig)
    assert (prior.width, prior.depth, prior.embed) == (2048, 24, 1024)
    assert (ar.text_width, ar.text_depth, ar.width, ar.depth) == (2048, 24, 1664, 24)
    assert (ar.components, ar.buckets) == (319, 1024)
    assert SCALE == 17.2
    assert stated(prior) == "77 text states of 1024, text and image embeddings of 1024"


@pytest.mark.parametrize("name", SIZES)
def test_examples_have_the_stated_shapes(name: str) -> None:
    config = tiny(SIZES[name])
    with torch.no_grad():
        out = build(config)(*example(config, 2))
    assert out.shape == {"Prior": (2, 12), "AR-Prior": (2, 5, 8)}[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PriorConfig(depth=0),
        lambda: PriorConfig(heads=3),
        lambda: AutoregressiveConfig(components=1025),
        lambda: AutoregressiveConfig(dots=1),
    ],
)
def test_sizes_that_do_not_fit_are_told(make: Any) -> None:
    with pytest.raises(UserError, match=";"):
        make()


# The diffusion prior


def prior_inputs(c: PriorConfig = PRIOR) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    states = torch.randn(3, c.context, c.text_width, generator=rng(3))
    mask = torch.arange(c.context) < torch.tensor([[6], [4], [2]])
    return SCALE * unit(3, c.embed, seed=1), torch.tensor([0.0, 417.0, 999.0]), unit(3, c.embed, seed=2), states, mask


def copied(theirs: PriorTransformer) -> dict[str, Tensor]:
    """Weights of a `diffusers.PriorTransformer` under our names."""
    found, out = theirs.state_dict(), {}
    names = {
        "encoder_hidden_states_proj": "states_in",
        "embedding_proj": "text_in",
        "time_embedding.linear_1": "time_up",
        "time_embedding.linear_2": "time_down",
        "proj_in": "image_in",
        "norm_out": "norm",
        "proj_to_clip_embeddings": "out",
    }
    parts = {"norm1": "attention_norm", "attn1.to_out.0": "attention.out", "norm3": "mlp_norm"}
    parts |= {"ff.net.0.proj": "mlp.up", "ff.net.2": "mlp.down"}
    for kind in ("weight", "bias"):
        for old, new in names.items():
            out[f"{new}.{kind}"] = found[f"{old}.{kind}"]
        for i in range(len(theirs.transformer_blocks)):
            there, here = f"transformer_blocks.{i}.", f"blocks.{i}."
            for old, new in parts.items():
                out[f"{here}{new}.{kind}"] = found[f"{there}{old}.{kind}"]
            out[f"{here}attention.qkv.{kind}"] = torch.cat([found[f"{there}attn1.to_{n}.{kind}"] for n in "qkv"])
    return out | {"positions": found["positional_embedding"][0], "query": found["prd_embedding"][0, 0]}


def test_the_prior_is_that_of_diffusers_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    theirs = PriorTransformer(2, 16, 2, embedding_dim=12, num_embeddings=6)
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    ours = DiffusionPrior(PRIOR)
    ours.load_state_dict(copied(theirs))
    z, t, text, states, mask = prior_inputs()
    given = [x.clone().requires_grad_() for x in (z, text, states)]
    expected = [x.clone().requires_grad_() for x in (z, text, states)]
    out = ours(given[0], t, given[1], given[2], mask)
    reference = theirs(expected[0], t, expected[1], expected[2], mask).predicted_image_embedding
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    weight = torch.randn(out.shape, generator=rng(4))
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    for name, expected_gradient in copied(theirs).items():
        torch.testing.assert_close(gradients[name], expected_gradient, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_short_text_needs_no_padding_and_a_dropped_one_is_not_read() -> None:
    torch.manual_seed(0)
    model = DiffusionPrior(PRIOR)
    z, t, text, states, mask = prior_inputs()
    padded = model(z, t, text, states, mask)
    short = model(z[2:], t[2:], text[2:], states[2:, :2], mask[2:, :2])
    torch.testing.assert_close(short, padded[2:], atol=1e-6, rtol=1e-5)
    text, mask = drop_text(text, mask, rng(), rate=1.0)
    dropped = model(z, t, text, states, mask)
    torch.testing.assert_close(model(z, t, text, states.flip(0), mask), dropped)
    assert not torch.allclose(dropped, padded, atol=1e-3)


@torch.no_grad()
def test_every_input_changes_the_prior() -> None:
    torch.manual_seed(0)
    model = DiffusionPrior(PRIOR)
    inputs = prior_inputs()
    before = model(*inputs)
    for place in range(4):
        other = [x.flip(0) if i == place else x for i, x in enumerate(inputs)]
        assert not torch.allclose(model(*other)[0], before[0], atol=1e-4), place


def test_the_prior_tells_wrong_inputs() -> None:
    model = DiffusionPrior(PRIOR)
    z, t, text, states, mask = prior_inputs()
    with pytest.raises(UserError, match="cut it"):
        model(z, t, text, states.repeat(1, 2, 1), mask.repeat(1, 2))
    with pytest.raises(UserError, match="one of each"):
        model(z, t[:1], text, states, mask)
    with pytest.raises(UserError, match="states of width"):
        model(z, t, text, states[..., 1:], mask)


def test_the_loss_is_of_scaled_embeddings() -> None:
    image = unit(3, 12)
    assert prior_loss(SCALE * image, image) == 0
    torch.testing.assert_close(prior_loss(torch.zeros(3, 12), image), torch.tensor(SCALE**2 / 12))


def test_the_better_draw_is_kept() -> None:
    text, draws = unit(40, 12, seed=1), unit(40, 2, 12, seed=2)
    kept = keep_better(draws, text)
    dots = (draws * text[:, None]).sum(-1)
    torch.testing.assert_close((kept * text).sum(-1), dots.max(1).values)
    assert all(any(torch.equal(kept[i], draws[i, s]) for s in range(2)) for i in range(40))
    assert 0 < (dots[:, 0] > dots[:, 1]).sum() < 40


def test_text_is_dropped_as_one_in_a_tenth_of_cases() -> None:
    text, mask = unit(20_000, 4), torch.ones(20_000, 3, dtype=torch.bool)
    dropped, left = drop_text(text, mask, rng(5))
    gone = dropped.eq(0).all(1)
    assert torch.equal(gone, ~left.any(1))
    assert torch.equal(dropped[~gone], text[~gone])
    assert left[~gone].all()
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.01)
    with pytest.raises(UserError):
        drop_text(text, mask, rng(), rate=1.1)


# The autoregressive prior


def correlated(count: int = 400) -> Tensor:
    """Vectors of 12 dimensions that lie near a plane of 5, not around the origin."""
    g = rng(6)
    scales = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    plane = torch.randn(count, 5, generator=g) * scales @ torch.randn(5, 12, generator=g)
    return plane + 0.01 * torch.randn(count, 12, generator=g) + 3.0


def test_pca_loses_the_variance_that_it_leaves_out_and_nothing_else() -> None:
    x = correlated().double()
    every = fit_pca(x, 12)
    torch.testing.assert_close(every.restore(every.project(x)), x)
    spread = every.project(x).var(0, correction=0)
    assert (spread.diff() <= 0).all()
    for K in (2, 5):
        pca = fit_pca(x, K)
        torch.testing.assert_close(pca.axes @ pca.axes.T, torch.eye(K, dtype=x.dtype))
        lost = (pca.restore(pca.project(x)) - x).square().sum(1).mean()
        torch.testing.assert_close(lost, spread[K:].sum())
    torch.testing.assert_close(fit_pca(x.flip(0), 5).axes, fit_pca(x, 5).axes)
    with pytest.raises(UserError, match="pass more"):
        fit_pca(x[:5], 5)


def test_codes_are_exact_both_ways() -> None:
    x = correlated()
    pca = fit_pca(x, 5)
    coefficients = pca.project(x)
    buckets = fit_buckets(coefficients, 1024)
    codes = buckets.quantise(coefficients)
    assert (codes.min(), codes.max()) == (0, 1023)
    every = torch.arange(1024)[:, None].expand(-1, 5)
    assert torch.equal(buckets.quantise(buckets.dequantise(every)), every)
    error = (buckets.dequantise(codes) - coefficients).abs()
    assert (error <= buckets.width * 0.501).all()
    assert error.max() > 0
    outside = torch.stack([buckets.low - 1.0, buckets.low + 1025 * buckets.width])
    assert buckets.quantise(outside).tolist() == [[0] * 5, [1023] * 5]
    with pytest.raises(UserError, match="never changes"):
        fit_buckets(torch.ones(4, 2))


def test_levels_are_equally_frequent_and_the_top_half_is_drawn() -> None:
    image, text = unit(4000, 12, seed=1), unit(4000, 12, seed=2)
    edges = fit_dots(image, text, 8)
    torch.testing.assert_close(edges, torch.quantile((image * text).sum(-1), torch.arange(1, 8) / 8))
    levels = dot_level(image, text, edges)
    assert torch.equal(levels.bincount(minlength=8), torch.full((8,), 500))
    dots = (image * text).sum(-1)
    assert dots[levels >= 4].min() >= dots[levels < 4].max()
    drawn = high_dots(4000, 8, rng(1))
    assert drawn.unique().tolist() == [4, 5, 6, 7]
    assert drawn.bincount()[4:].float().std() < 80


@pytest.fixture
def ar() -> AutoregressivePrior:
    torch.manual_seed(0)
    model = AutoregressivePrior(AR)
    nn.init.normal_(model.codes.weight)  # so that codes matter
    return model


def ar_inputs() -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    return torch.randint(50, (3, 6), generator=rng(2)), mask, unit(3, 12, seed=3)


@torch.no_grad()
def test_a_code_sees_the_codes_before_it_alone(ar: AutoregressivePrior) -> None:
    ids, mask, text = ar_inputs()
    codes, dot = torch.randint(8, (3, 5), generator=rng(1)), torch.tensor([0, 1, 3])
    before = ar(ids, mask, text, dot, codes)
    for k in range(5):
        other = codes.clone()
        other[:, k] = (other[:, k] + 1) % 8
        after = ar(ids, mask, text, dot, other)
        torch.testing.assert_close(after[:, : k + 1], before[:, : k + 1], atol=1e-6, rtol=1e-5)
        assert k == 4 or not torch.allclose(after[:, k + 1], before[:, k + 1], atol=1e-4)
    assert not torch.allclose(ar(ids, mask, text, (dot + 1) % 4, codes)[:, 0], before[:, 0], atol=1e-4)
    assert not torch.allclose(ar(ids, mask, text.flip(0), dot, codes)[0], before[0], atol=1e-4)
    garbage = torch.where(mask, ids, 49 - ids)
    torch.testing.assert_close(ar(garbage, mask, text, dot, codes), before, atol=1e-6, rtol=1e-5)
    short = ar(ids[2:, :2], mask[2:, :2], text[2:], dot[2:], codes[2:])
    torch.testing.assert_close(short, before[2:], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="quantise"):
        ar(ids, mask, text, dot, codes[:, :4])
    for bad, message in (
        ((ids + 50, mask, text, dot, codes), "ids are from 0 to 49"),
        ((ids, mask[:, 1:], text, dot, codes), "one of each per caption"),
        ((ids, mask, text[:, 1:], dot, codes), "one of each per caption"),
        ((ids, mask, text, dot + 4, codes), "levels are from 0 to 3"),
        ((ids, mask, text, dot, codes - 8), "codes are from 0 to 7"),
    ):
        with pytest.raises(UserError, match=message):
            ar(*bad)


# The upsamplers


def test_the_first_blur_is_three_pixels_wide_and_keeps_the_mean() -> None:
    dot = torch.zeros(1, 2, 9, 9)
    dot[:, :, 4, 4] = 1.0
    out = gaussian_blur(dot)
    assert out[0, 0].count_nonzero() == 9
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(1, 2))
    assert (out[0, 0, 4, 5] / out[0, 0, 4, 4]).item() == pytest.approx(2.718281828 ** (-1 / (2 * 0.36)), rel=1e-5)
    torch.testing.assert_close(gaussian_blur(torch.full((1, 3, 8, 8), 0.5)), torch.full((1, 3, 8, 8), 0.5))
    turned = gaussian_kernel(7, (0.5, 2.0), torch.pi / 2)
    torch.testing.assert_close(turned, gaussian_kernel(7, (2.0, 0.5)))
    assert turned[3, 6] > turned[6, 3]  # the long axis was y and lies along x now
    with pytest.raises(UserError, match="odd"):
        gaussian_kernel(4, (1.0, 1.0))
    with pytest.raises(UserError, match="smaller kernel"):
        blur(dot[..., :3], gaussian_kernel(7, (1.0, 1.0)))


def test_random_corruption_is_the_generator_s_alone() -> None:
    images = torch.rand(4, 3, 16, 24, generator=rng(1)) * 2 - 1
    out = bsr(images, rng(3))
    assert out.shape == images.shape
    assert out.abs().max() <= 1
    assert torch.equal(out, bsr(images, rng(3)))
    assert not torch.equal(out, bsr(images, rng(4)))
    same = bsr(images[:1].expand(6, -1, -1, -1), rng(3))
    changes = (same - images[:1]).square().mean((1, 2, 3))
    assert len(changes.unique()) == 6
    assert (changes > 1e-4).all()
    smooth = torch.zeros(8, 3, 32, 32)
    assert 1e-5 < bsr(smooth, rng(5)).square().mean() < (2 * 25 / 255) ** 2
    with pytest.raises(UserError, match="8 pixels"):
        bsr(images[..., :7], rng())


def test_crops_are_a_fourth_and_show_one_place() -> None:
    low = torch.arange(8 * 16.0).view(1, 1, 8, 16).expand(20, -1, -1, -1)
    high = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small, large = aligned_crops(low, high, rng())
    assert small.shape == (20, 1, 2, 4)
    assert large.shape == (20, 1, 8, 16)
    assert torch.equal(large, small.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert len(small[:, 0, 0, 0].unique()) > 10
    with pytest.raises(UserError, match="multiple"):
        aligned_crops(low, high[..., :-1], rng())
    with pytest.raises(UserError, match="divide"):
        aligned_crops(low, high, rng(), share=3)


# Manipulations


def test_slerp_ends_exactly_and_stays_on_the_sphere() -> None:
    a, b = unit(5, 12, seed=1), unit(5, 12, seed=2)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    whole = torch.arccos((a * b).sum(-1))
    for share in (0.1, 0.25, 0.5, 0.9):
        c = slerp(a, b, share)
        torch.testing.assert_close(c.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(torch.arccos((a * c).sum(-1)), share * whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(c, slerp(b, a, 1 - share))
    torch.testing.assert_close(slerp(a, b, torch.linspace(0, 1, 5)[:, None])[2], slerp(a, b, 0.5)[2])
    near = F.normalize(a + 1e-5 * b, dim=-1)
    for share in (0.0, 0.5, 1.0):
        torch.testing.assert_close(slerp(a, near, share).norm(dim=-1), torch.ones(5))
    assert torch.equal(slerp(a, a, 0.5), a)
    assert torch.equal(slerp(3 * a, 2 * b, 1.0), 2 * b)
    with pytest.raises(UserError, match="opposite"):
        slerp(a, -a, 0.5)


def test_a_text_difference_is_a_unit_direction_that_moves_the_image() -> None:
    image, text, base = (unit(5, 12, seed=s) for s in (1, 2, 3))
    direction = text_difference(text, base)
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(direction * (text - base).norm(dim=-1, keepdim=True), text - base)
    towards = [(slerp(image, direction, share) * direction).sum(-1) for share in (0.0, 0.25, 0.5, 1.0)]
    assert all((b > a).all() for a, b in pairwise(towards))
    with pytest.raises(UserError, match="equal captions"):
        text_difference(text, text)


def there_and_back(steps: int, variance: float | None) -> float:
    """The error of inversion and then DDIM, in float64, for one clean point or for a normal law of that variance."""
    path = Cosine()
    sigmas = torch.linspace(0.02, 0.9, steps + 1, dtype=torch.float64)
    alpha, noise = path.alpha(sigmas), path.noise(sigmas)
    point = torch.randn(3, 4, generator=rng(1), dtype=torch.float64)

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        if variance is None:
            return point
        a, n = path.alpha(sigma.double()), path.noise(sigma.double())
        return a * variance / (a**2 * variance + n**2) * z

    z = torch.randn(3, 4, generator=rng(2), dtype=torch.float64)
    latent = invert(denoise, z, sigmas.tolist(), alpha.tolist(), noise.tolist())
    assert not torch.allclose(latent, z, atol=0.05)
    return (ddim(denoise, latent, sigmas.flip(0), path=path) - z).abs().max().item()


def test_ddim_undoes_inversion() -> None:
    assert there_and_back(7, None) < 1e-9
    coarse, fine = there_and_back(100, 0.5), there_and_back(200, 0.5)
    assert fine < 0.65 * coarse
    with pytest.raises(UserError, match="a little noise"):
        invert(lambda z, level: z, torch.zeros(1, 2), [0.0, 0.5], [1.0, 0.8], [0.0, 0.6])
    with pytest.raises(UserError, match="coefficients"):
        invert(lambda z, level: z, torch.zeros(1, 2), [0.1, 0.5], [1.0], [0.1, 0.6])
