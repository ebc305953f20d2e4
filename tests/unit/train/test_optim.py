from __future__ import annotations

import pytest
import torch
from torch import nn

from tubelet.codecs import build_codec
from tubelet.core.errors import UserError
from tubelet.train.optim import AdamW, Muon, Optimizer, OptimizerConfig, Split, orthogonalise, split


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 12)
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 12)) for _ in range(2)])
        self.shift = nn.Parameter(torch.zeros(6, 12))
        self.last = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.shift.sum(0)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (64, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_matrices_are_nearly_orthogonal(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Made from known singular vectors and values, so that the nearest semi-orthogonal matrix U V^T is known.
    short = min(shape)
    u = torch.linalg.qr(torch.randn(5, shape[0], short, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(5, shape[1], short, generator=generator))[0]
    spread = torch.logspace(-1, 1, short)
    out = orthogonalise((u * spread) @ v.mT * 1e-3, 5, dtype)
    assert out.shape == (5, *shape)
    assert out.dtype == torch.float32
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # Same singular vectors: U^T out V is diagonal.
    core = u.mT @ out @ v
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_orthogonalising_ignores_the_scale_and_handles_zero() -> None:
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalise(x), orthogonalise(1000 * x), atol=1e-4)
    assert torch.equal(orthogonalise(torch.zeros(1, 8, 12)), torch.zeros(1, 8, 12))


def test_a_muon_update_has_the_size_of_adamws() -> None:
    """Match-RMS: an update's root mean square is about 0.2 of the rate whatever the shape (Liu et al. 2025, section 2.2)."""
    for shape in [(64, 64), (256, 32), (32, 256), (48, 24, 3, 3)]:
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon({"p": p}, 0.1).step()
        assert p.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25), shape


def test_stacked_equals_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {f"p{n}": torch.randn(6, 4, generator=generator) for n in range(3)} | {
        "k": torch.randn(5, 2, 3, 3, generator=generator)
    }
    together = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    apart = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    whole, singles = Muon(together, 0.01, weight_decay=0.1), [Muon({n: p}, 0.01, weight_decay=0.1) for n, p in apart.items()]
    for _ in range(3):
        for name in start:
            gradient = torch.randn(start[name].shape, generator=generator)
            together[name].grad, apart[name].grad = gradient.clone(), gradient.clone()
        whole.step(0.5)
        for single in singles:
            single.step(0.5)
    for name in start:
        assert torch.allclose(together[name], apart[name], atol=1e-6)


def test_nesterov_momentum_is_the_written_one() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    muon, buffer = Muon({"p": p}, 1.0, momentum=0.9), torch.zeros(4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        before, gradient = p.detach().clone(), torch.randn(4, 4, generator=generator)
        p.grad = gradient.clone()
        muon.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        expected = orthogonalise((0.1 * gradient + 0.9 * buffer)[None])[0] * 0.2 * 2.0
        assert torch.allclose(before - p.detach(), expected, atol=1e-5)
        assert torch.equal(p.grad, gradient), "the gradient belongs to the caller"


def test_adamw_is_torchs_with_decay_on_matrices_only() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    own = AdamW({"m": matrix, "v": vector}, 0.1, weight_decay=0.5)
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    own.step(0.5)
    assert torch.allclose(matrix, torch.full((3, 3), 1 - 0.05 * 0.5))
    assert torch.equal(vector, torch.ones(3))


def test_the_split_sends_inner_matrices_to_muon() -> None:
    parts = split(Blocks())
    assert set(parts.muon) == {f"blocks.{b}.{layer}.weight" for b in range(2) for layer in (0, 2)}
    assert {"words.weight", "first.weight", "last.weight", "shift", "blocks.0.1.weight", "blocks.0.0.bias"} <= set(parts.adamw)
    encoder = [nn.Conv2d(192, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 1)]
    decoder = [nn.Conv2d(8, 64, 1), nn.ConvTranspose2d(64, 64, 2), nn.Conv2d(64, 192, 3)]
    convolutions = nn.Sequential(*encoder, *decoder)
    assert set(split(convolutions).muon) == {"1.weight", "4.weight"}
    frozen = Blocks()
    frozen.blocks.requires_grad_(False)
    assert not split(frozen).muon


def test_tied_weights_are_named_once() -> None:
    model = Blocks()
    model.last.weight = nn.Parameter(torch.zeros(6, 12))
    model.blocks[1][0].weight = model.blocks[0][0].weight  # type: ignore[index]
    parts = split(model)
    assert len(parts.muon) == 3
    Optimizer(model, OptimizerConfig())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_goes_round_exactly(kind: str) -> None:
    def gradients(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)

    torch.manual_seed(0)
    model, other = Blocks(), Blocks()
    config = OptimizerConfig(kind=kind, weight_decay=0.01)
    first, second = Optimizer(model, config), Optimizer(other, config)
    for seed in range(3):
        gradients(model, seed)
        first.step()
    other.load_state_dict(model.state_dict())
    stored = {name: value.clone() for name, value in first.state().items()}
    second.restore(stored)
    for seed in range(3, 6):
        for m, o in ((model, first), (other, second)):
            gradients(m, seed)
            o.step(0.7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())
    with pytest.raises(UserError, match="checkpoint's optimiser has no"):
        second.restore({name: value for name, value in stored.items() if not name.endswith((".momentum", ".exp_avg"))})


@pytest.mark.parametrize("name", ["causal_conv", "transformer"])
def test_a_codec_resumes_exactly(name: str) -> None:
    """Codecs' weights lie channels last in memory, where the fused step reads moments as they lie."""
    torch.manual_seed(0)
    model, other = build_codec(name), build_codec(name)
    assert any(not p.is_contiguous() for p in model.parameters())
    first, second = (Optimizer(one, OptimizerConfig(learning_rate=0.01, learning_rate_adamw=0.01)) for one in (model, other))

    def gradients(module: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))

    for seed in range(3):
        gradients(model, seed)
        first.step()
    other.load_state_dict(model.state_dict())
    second.restore({key: value.clone(memory_format=torch.contiguous_format) for key, value in first.state().items()})
    for seed in range(3, 6):
        for module, optimizer in ((model, first), (other, second)):
            gradients(module, seed)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_learns_faster_than_it_would_standing_still() -> None:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = Optimizer(model, OptimizerConfig(learning_rate=0.01, learning_rate_adamw=0.01))
    x = torch.randn(64, 6)
    y = x.flip(1) * 2
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sgd"}, "muon or adamw"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate_adamw": 2.0}, "learning_rate_adamw"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"newton_schulz_steps": 0}, "newton_schulz"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)


def test_a_split_must_be_a_partition() -> None:
    model = Blocks()
    with pytest.raises(AssertionError, match="every trainable"):
        Optimizer(model, OptimizerConfig(), choose=lambda m: Split({}, {}))
