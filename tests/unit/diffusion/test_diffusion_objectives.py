from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.diffusion.objectives import (
    Prediction,
    convert,
    denoiser,
    flow_loss,
    gather,
    packed_errors,
    packed_flow_loss,
    precondition,
    spread,
)
from tubelet.diffusion.paths import PATHS, RECTIFIED_FLOW, SigmaSampling, VPLinear, zero_terminal_snr

KINDS = get_args(Prediction)
SHAPE = (3, 2, 4, 5, 6)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truth(x, n, alpha, noise):
    """Every prediction from its textbook definition, not from the table under test."""
    r = torch.sqrt(alpha**2 + noise**2)
    return {"x": x, "eps": n, "v": alpha * n - noise * x, "velocity": n - x, "skip": (noise * x - alpha * n) / r}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
def test_predictions_convert_into_each_other(name, source, target):
    path = PATHS[name]()
    x, n = torch.randn(2, *SHAPE, generator=rng(), dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    wide = spread(sigma, x)
    alpha, noise = path.alpha(wide), path.noise(wide)
    z = alpha * x + noise * n
    values = truth(x, n, alpha, noise)
    torch.testing.assert_close(convert(values[source], z, sigma, source, target, path), values[target], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("source", ["v", "velocity", "skip", "x"])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_x_is_finite_at_both_ends(source, sigma):
    z = torch.randn(SHAPE, generator=rng())
    value = torch.randn(SHAPE, generator=rng(1))
    assert convert(value, z, torch.tensor(sigma), source, "x").isfinite().all()


def test_skip_is_karras_preconditioning_of_rectified_flow():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    z, F = torch.randn(2, 11, 7, generator=rng(), dtype=torch.float64)
    s = sigma[:, None]
    square = (1 - s) ** 2 + s**2
    torch.testing.assert_close(precondition(F, z, sigma), (1 - s) / square * z + s / square.sqrt() * F)


def test_skip_sees_and_answers_unit_variance_and_zero_output_is_the_least_squares_guess():
    x, n = torch.randn(2, 400_000, generator=rng(), dtype=torch.float64)
    for value in (0.02, 0.3, 0.5, 0.8, 0.99):
        sigma = torch.tensor(value, dtype=torch.float64)
        z = (1 - sigma) * x + sigma * n
        target = convert(x, z, sigma, "x", "skip")
        assert target.var().item() == pytest.approx(1, abs=0.01)
        seen = {}

        def network(scaled, sigma, condition, seen=seen):
            seen["var"] = scaled.var().item()
            return torch.zeros_like(scaled)

        guess = denoiser(network)(z, sigma, None)
        assert seen["var"] == pytest.approx(1, abs=0.01)
        slope = (x * z).mean() / (z * z).mean()
        torch.testing.assert_close(guess, slope * z, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prediction", ["x", "v", "velocity", "skip"])
@pytest.mark.parametrize("name", PATHS)
def test_a_perfect_network_denoises_exactly_whatever_it_predicts(name, prediction):
    path = PATHS[name]()
    x, n = torch.randn(2, *SHAPE, generator=rng(), dtype=torch.float64)
    sigma = torch.rand(3, 4, generator=rng(), dtype=torch.float64) * 0.98 + 0.01
    alpha, noise = path.alpha(spread(sigma, x)), path.noise(spread(sigma, x))
    answer = truth(x, n, alpha, noise)[prediction]
    x_hat = denoiser(lambda z, s, c: answer, prediction, path)(alpha * x + noise * n, sigma, None)
    torch.testing.assert_close(x_hat, x, rtol=1e-8, atol=1e-8)


def test_eps_without_signal_is_refused_and_with_signal_is_not():
    network = lambda z, s, c: z  # noqa: E731
    with pytest.raises(UserError, match="no signal"):
        denoiser(network, "eps")
    with pytest.raises(UserError, match="no signal"):
        denoiser(network, "eps", zero_terminal_snr(VPLinear()))
    denoiser(network, "eps", VPLinear())
    with pytest.raises(UserError, match="prediction must be"):
        denoiser(network, "score")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wide", "gathered"),
    [
        ((), (), (3,)),
        ((1,), (1, 1, 1, 1, 1), (3,)),
        ((3,), (3, 1, 1, 1, 1), (3,)),
        ((3, 4), (3, 1, 4, 1, 1), (3, 4)),
        ((1, 4), (1, 1, 4, 1, 1), (3, 4)),
        ((3, 4, 5, 6), (3, 1, 4, 5, 6), (3, 4, 5, 6)),
        ((3, 1, 4, 5, 6), (3, 1, 4, 5, 6), (3, 4, 5, 6)),
        ((3, 1, 4, 1, 1), (3, 1, 4, 1, 1), (3, 4)),
        ((3, 1, 1, 1, 1), (3, 1, 1, 1, 1), (3,)),
    ],
)
def test_forms_of_sigma(given, wide, gathered):
    z, sigma = torch.zeros(SHAPE), torch.rand(given)
    assert spread(sigma, z).shape == wide
    assert gather(sigma, z).shape == gathered
    if gathered != (3,):
        full = gather(sigma, z)
        full = full[:, None, :, None, None] if full.ndim == 2 else full[:, None]
        torch.testing.assert_close(full.expand(3, 1, 4, 5, 6), spread(sigma, z).expand(3, 1, 4, 5, 6))


@pytest.mark.parametrize("shape", [(2,), (3, 5), (3, 4, 5), (3, 4, 5, 5), (3, 2, 4, 5, 6)])
def test_a_sigma_that_does_not_fit_is_refused(shape):
    with pytest.raises(UserError, match="does not fit"):
        spread(torch.zeros(shape), torch.zeros(SHAPE))


def test_the_loss_is_the_velocity_error():
    x = torch.randn(8, 2, 3, 4, 4, generator=rng(5))
    sampling = SigmaSampling(mean=1.0, uniform=0.0)  # keeps sigma above the floor
    seen = {}

    def network(z, sigma, condition):
        assert condition == "words"
        seen.update(z=z, sigma=sigma)
        return torch.full_like(z, 0.25)

    losses = flow_loss(network, x, "words", rng(), sampling=sampling, prediction="velocity")
    s = seen["sigma"][:, None, None, None, None]
    assert s.min() > 0.05
    velocity = (seen["z"] - x) / s  # n - x, from z = x + sigma * (n - x)
    torch.testing.assert_close(losses["loss"], (0.25 - velocity).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_loss_is_the_same_quantity_for_every_prediction(per_frame):
    x = torch.randn(16, 2, 3, 4, 4, generator=rng(5))
    sampling = SigmaSampling(per_frame=per_frame)

    def guess(z, sigma):
        return 0.3 * z

    values = []
    for prediction in ("x", "velocity", "v", "skip"):

        def network(z, sigma, condition, prediction=prediction):
            assert sigma.shape == ((16, 3) if per_frame else (16,))
            wide = spread(sigma, z)
            if prediction == "skip":
                z = z * ((1 - wide) ** 2 + wide**2).sqrt()
            return convert(guess(z, sigma), z, sigma, "x", prediction)

        values.append(flow_loss(network, x, None, rng(), sampling=sampling, prediction=prediction))
    for other in values[1:]:
        for key, value in values[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


def test_the_floor_bounds_the_weight_near_the_data():
    x = torch.ones(4, 1, 1, 2, 2)
    sampling = SigmaSampling(mean=-12.0, std=0.1, uniform=0.0)
    loss = flow_loss(lambda z, s, c: torch.zeros_like(z), x, None, rng(), sampling=sampling, prediction="x", floor=0.1)["loss"]
    assert loss.item() == pytest.approx(100, rel=1e-4)


def test_quarters_are_ordered_by_noise_and_average_to_the_loss():
    x = torch.randn(64, 2, 1, 4, 4, generator=rng(5))

    def network(z, sigma, condition):  # as a velocity, wrong by sigma
        return convert(x, z, sigma, "x", "velocity") + spread(sigma, z)

    losses = flow_loss(network, x, None, rng(), sampling=SigmaSampling(mean=1.0, uniform=0.0), prediction="velocity")
    quarters = torch.stack([losses[f"loss/sigma_q{q}"] for q in range(4)])
    assert set(losses) == {"loss", *(f"loss/sigma_q{q}" for q in range(4))}
    assert (quarters.diff() > 0).all()
    torch.testing.assert_close(quarters.mean(), losses["loss"])
    sigma = flow_sigmas = torch.empty(0)

    def spy(z, s, c):
        nonlocal sigma
        sigma = s
        return z

    flow_loss(spy, x, None, rng(), sampling=SigmaSampling(mean=1.0, uniform=0.0))
    flow_sigmas = sigma.sort().values
    torch.testing.assert_close(quarters[0], flow_sigmas[:16].square().mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_small_batches_have_finite_quarters(batch):
    losses = flow_loss(lambda z, s, c: z, torch.randn(batch, 1, 1, 2, 2, generator=rng()), None, rng())
    assert all(value.isfinite() and value.ndim == 0 for value in losses.values())


def test_weights_favour_their_cells_and_keep_the_scale():
    x = torch.zeros(4, 1, 2, 4, 4)
    foreground = torch.zeros(4, 1, 2, 4, 4)
    foreground[..., :2] = 1

    def network(z, sigma, condition):  # x_hat wrong by sigma on the foreground only: a velocity error of 1
        return spread(sigma, z) * foreground

    def loss(weight):
        sampling = SigmaSampling(mean=2.0, uniform=0.0)
        return flow_loss(network, x, None, rng(), sampling=sampling, weight=weight, prediction="x")["loss"].item()

    assert loss(None) == pytest.approx(0.5, rel=1e-5)
    assert loss(torch.full((4, 1, 2, 4, 4), 3.0)) == pytest.approx(0.5, rel=1e-5)
    assert loss(1 + 3 * foreground) == pytest.approx(4 / 5, rel=1e-5)
    assert loss((1 + 3 * foreground)[:1]) == pytest.approx(4 / 5, rel=1e-5)


def test_the_loss_repeats_bitwise_and_reaches_the_network():
    x = torch.randn(4, 2, 1, 4, 4, generator=rng(1))
    scale = torch.nn.Parameter(torch.zeros(()))
    results = [flow_loss(lambda z, s, c: scale * z, x, None, rng(7)) for _ in range(2)]
    assert torch.equal(results[0]["loss"], results[1]["loss"])
    results[0]["loss"].backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0
    assert not results[0]["loss/sigma_q0"].requires_grad


def test_a_network_that_answers_in_bf16_does_not_round_the_skip():
    x = torch.randn(4, 2, 1, 4, 4, generator=rng(1))
    x_hat = denoiser(lambda z, s, c: torch.zeros_like(z, dtype=torch.bfloat16))(x, torch.zeros(()), None)
    assert x_hat.dtype == torch.float32
    assert torch.equal(x_hat, x)


def test_training_finds_the_known_denoiser_of_gaussian_data():
    """A linear network under the loss must approach E[x | z], whose velocity error is known, not merely fall."""
    generator, s = rng(2), 0.5
    coefficients = torch.nn.Parameter(torch.zeros(2))

    def network(z, sigma, condition):
        wide = spread(sigma, z)
        return (coefficients[0] + coefficients[1] * wide) * z

    sampling = SigmaSampling(mean=math.log(0.6 / 0.4), std=1e-3, uniform=0.0)  # one level: sigma .6
    optimiser = torch.optim.Adam([coefficients], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        flow_loss(network, s * torch.randn(512, 1, 1, 4, 4, generator=generator), None, generator, sampling=sampling)[
            "loss"
        ].backward()
        optimiser.step()
    z = torch.ones(1, 1, 1, 4, 4)
    found = denoiser(network)(z, torch.tensor(0.6), None).mean().item()
    assert found == pytest.approx(0.4 * s**2 / (0.4**2 * s**2 + 0.6**2), abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, 3, 4, 4)},
        {"weight": torch.ones(2, 1, 3, 5, 4)},
        {"weight": torch.ones(2, 4, 4)},
        {"floor": 0.0},
        {"prediction": "score"},
    ],
)
def test_bad_input_is_refused(wrong):
    with pytest.raises(UserError, match=r"; "):
        flow_loss(lambda z, s, c: z, wrong.pop("x", torch.zeros(2, 1, 3, 4, 4)), None, rng(), **wrong)


def test_default_path_is_rectified_flow():
    z, value = torch.randn(2, 3, 7, generator=rng())
    sigma = torch.tensor(0.3)
    assert torch.equal(convert(value, z, sigma, "velocity", "x"), convert(value, z, sigma, "velocity", "x", RECTIFIED_FLOW))
    torch.testing.assert_close(convert(value, z, sigma, "velocity", "x"), z - 0.3 * value)


class Scaled(torch.nn.Module):
    """A network of any size whose output depends on z, the noise level and the condition."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.7]))

    def forward(self, z, sigma, condition):
        return z * self.weight[0] + self.weight[1] * spread(sigma, z) * condition.view(-1, 1, 1, 1, 1)

    def packed(self, z, sigma, condition):
        return [self(one[None], s[None], c[None])[0] for one, s, c in zip(z, sigma, condition, strict=True)]


def packed_inputs():
    shapes = [(2, 4, 5, 6), (2, 1, 3, 3), (2, 2, 8, 2)]
    x = [torch.randn(shape, generator=rng(i)) for i, shape in enumerate(shapes)]
    noise = [torch.randn(shape, generator=rng(10 + i)) for i, shape in enumerate(shapes)]
    sigma = [torch.tensor(0.4), torch.tensor([0.9]), torch.rand(2, 8, 2, generator=rng(7))]
    return x, noise, sigma, torch.tensor([1.0, -2.0, 0.5])


@pytest.mark.parametrize("prediction", [kind for kind in KINDS if kind != "eps"])
def test_packed_errors_and_gradients_are_those_of_one_by_one(prediction):
    x, noise, sigma, condition = packed_inputs()
    network = Scaled()
    packed = packed_errors(network.packed, x, noise, sigma, condition, prediction=prediction)
    singles = []
    for one, n, s, c in zip(x, noise, sigma, condition, strict=True):
        wide = spread(s[None], one[None])
        z = (1 - wide) * one[None] + wide * n[None]
        x_hat = denoiser(network, prediction)(z, s[None], c[None])
        singles.append(((x_hat - one[None]) / wide.clamp(min=0.05)).square().mean(1)[0][None])
    for ours, theirs in zip(packed, singles, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(sum(e.sum() for e in errors), network.weight)[0] for errors in (packed, singles)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_the_packed_loss_is_the_mean_over_all_cells():
    x, _, _, condition = packed_inputs()
    weight = [torch.rand(1, *one.shape[1:], generator=rng(i)) for i, one in enumerate(x)]
    network = Scaled()
    losses = packed_flow_loss(network.packed, x, condition, rng(3), weight=weight)
    assert set(losses) == {"loss", *(f"loss/sigma_q{q}" for q in range(4))}
    zeros = [torch.zeros_like(w) for w in weight]
    zeros[1] = weight[1]
    only = packed_flow_loss(network.packed, x, condition, rng(3), weight=zeros)
    x[0] = x[0] + 100.0  # a sample without weight does not count
    assert torch.equal(packed_flow_loss(network.packed, x, condition, rng(3), weight=zeros)["loss"], only["loss"])
    with pytest.raises(UserError, match="without samples"):
        packed_flow_loss(network.packed, [], condition[:0], rng())
    with pytest.raises(UserError, match="eps says nothing"):
        packed_flow_loss(network.packed, x, condition, rng(), prediction="eps")


@pytest.mark.parametrize("prediction", ["skip", "velocity"])
def test_where_all_is_known_there_is_nothing_to_learn(prediction):
    x, _, _, condition = packed_inputs()
    network, x = Scaled(), [one.requires_grad_() for one in x]
    known = [torch.zeros(one.shape[1:]) for one in x]
    packed = packed_flow_loss(network.packed, x[:1], condition[:1], rng(), mask=known[:1], prediction=prediction)
    whole = flow_loss(network, x[0][None], condition[:1], rng(), mask=known[0][None], prediction=prediction)
    for losses in (packed, whole):
        assert all(value == 0 for value in losses.values())
        for gradient in torch.autograd.grad(losses["loss"], (network.weight, x[0])):
            assert (gradient == 0).all()


def test_larger_clips_see_more_noise_where_the_shift_counts_tokens():
    sampling = SigmaSampling(shift=1.5, tokens=100)
    assert sampling.shift_of(100) == 1.5
    assert sampling.shift_of(400) == pytest.approx(3.0)
    assert SigmaSampling(shift=1.5).shift_of(400) == 1.5
    x = [torch.zeros(1, 1, 2, 2)] * 400
    seen = {}
    for count in (25, 400):

        def watch(z, sigma, condition, count=count):
            seen[count] = torch.stack(list(sigma)).mean()
            return z

        packed_flow_loss(watch, x, torch.zeros(400), rng(), sampling=sampling, tokens=[count] * 400)
    assert seen[25] + 0.15 < seen[400]
    with pytest.raises(UserError, match="tokens must be at least 0"):
        SigmaSampling(tokens=-1)


@pytest.mark.parametrize("per_cell", [False, True])
def test_what_is_known_is_shown_and_its_error_does_not_count(per_cell):
    x = torch.randn(SHAPE, generator=rng())
    mask = torch.ones(3, 4, 5, 6) if per_cell else torch.ones(3, 4)
    mask[:, 1] = 0
    haze = torch.tensor([0.0, 0.05, 0.9])
    seen = {}

    def network(z, sigma, condition):
        seen["z"], seen["sigma"] = z, sigma
        return torch.where(spread(mask, z) > 0, 0.0, 1e6).expand_as(z)

    losses = flow_loss(network, x, None, rng(1), mask=mask, haze=haze, prediction="x")
    assert losses["loss"] < 1e4, "a wild answer where all is known changes nothing"
    assert seen["sigma"].shape == mask.shape
    levels = seen["sigma"].reshape(3, 4, -1)
    own = levels[:, 0, 0]
    assert torch.equal(levels[:, 1, 0], torch.minimum(haze, own))
    assert torch.equal(seen["z"][0, :, 1], x[0, :, 1])
    assert not torch.equal(seen["z"][0, :, 0], x[0, :, 0])
    torch.manual_seed(0)
    plain = flow_loss(network, x, None, rng(1), prediction="x")
    assert plain["loss"] > 1e6


def test_a_pack_shows_what_is_known_at_its_haze():
    x = [torch.randn(2, 3, 4, 4, generator=rng()) for _ in range(3)]
    mask = torch.ones(3)
    mask[1] = 0
    seen: list[torch.Tensor] = []

    def network(z, sigma, condition):
        seen.extend(sigma)
        return z

    haze = [0.0, 0.05, 1.0]
    packed_flow_loss(network, x, None, rng(1), mask=[mask] * 3, haze=haze, prediction="x")
    for level, most in zip(seen, haze, strict=True):
        assert level[1] == min(most, level[0])
        assert level[0] == level[2] > 0.05
