"""The v loss on chains: zero for the truth, known for ignorance, and the estimate that self-conditioning passes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.chain import estimate_of, v_loss
from tubelet.diffusion.paths import VariancePreserving, VPLinear, zero_terminal_snr

LINEAR, ZERO = VPLinear(), zero_terminal_snr(VPLinear())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 6) -> Tensor:
    return torch.randn(n, 4, 3, 2, 2, generator=rng(9))


def levels(path: VariancePreserving, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    sigma = path.sigma_of_step(t)
    return tuple(value.float().view(-1, 1, 1, 1, 1) for value in (path.alpha(sigma), path.noise(sigma)))  # type: ignore[return-value]


@pytest.mark.parametrize("path", [LINEAR, ZERO], ids=["linear", "zero terminal SNR"])
def test_who_knows_the_truth_has_no_loss(path: VariancePreserving) -> None:
    x, seen = data(200), []

    def oracle(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        seen.append(t)
        alpha, noise = levels(path, t, x)
        return alpha * (z - alpha * x) / noise - noise * x

    assert float(v_loss(oracle, x, rng(), path)["loss"]) < 1e-4
    steps = torch.cat(seen)
    assert int(steps.min()) >= 0
    assert int(steps.max()) <= 999
    assert 400 < float(steps.float().mean()) < 600


def test_who_says_nothing_has_the_variance_of_v() -> None:
    """v of unit data and unit noise has variance alpha^2 + noise^2 = 1, at every step."""
    loss = v_loss(lambda z, t, estimate: torch.zeros_like(z), data(400), rng(), ZERO)["loss"]
    assert float(loss) == pytest.approx(1, abs=0.03)


def test_an_answer_is_read_as_the_x_it_stands_for() -> None:
    x, n, t = data(), torch.randn(data().shape, generator=rng(1)), torch.tensor([0, 10, 300, 800, 998, 999])
    for path in (LINEAR, ZERO):
        alpha, noise = levels(path, t, x)
        z, v = alpha * x + noise * n, alpha * n - noise * x
        torch.testing.assert_close(estimate_of(v, z, path.sigma_of_step(t), path), x, atol=1e-4, rtol=1e-4)


def test_self_conditioning_asks_twice_and_passes_the_first_answer_on_without_its_gradient() -> None:
    x, scale = data(), torch.tensor(0.3, requires_grad=True)
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def network(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        calls.append((z, t, estimate))
        return scale * z + (0 if estimate is None else 0.5 * estimate)

    loss = v_loss(network, x, rng(), ZERO, self_conditioning=1.0)["loss"]
    (z, t, none), (again, same, estimate) = calls
    assert none is None
    assert torch.equal(z, again)
    assert torch.equal(t, same)
    assert estimate is not None
    assert not estimate.requires_grad
    torch.testing.assert_close(estimate, estimate_of(0.3 * z, z, ZERO.sigma_of_step(t), ZERO), atol=1e-5, rtol=1e-5)
    alpha, noise = levels(ZERO, t, x)
    n = (z - alpha * x) / noise
    v = 0.3 * z + 0.5 * estimate
    torch.testing.assert_close(loss, (v - (alpha * n - noise * x)).square().mean(), atol=1e-3, rtol=1e-3)
    loss.backward()
    assert scale.grad is not None
    expected = 2 * ((v - (alpha * n - noise * x)) * z).mean()
    torch.testing.assert_close(scale.grad, expected, atol=1e-3, rtol=1e-3)


def test_an_estimate_is_given_as_often_as_asked_and_the_rest_of_the_draw_stays() -> None:
    given: list[bool] = []

    def network(z: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        given.append(estimate is not None)
        return torch.zeros_like(z)

    for seed in range(200):
        v_loss(network, data(1), rng(seed), ZERO, self_conditioning=0.75)
    assert 0.65 < sum(given) / 200 < 0.85
    assert len(given) == 200 + sum(given)
    losses = [v_loss(network, data(), rng(3), ZERO, self_conditioning=share)["loss"] for share in (0.0, 1.0)]
    assert torch.equal(*losses), "steps and noise do not depend on it"
    with pytest.raises(UserError, match="is a share"):
        v_loss(network, data(), rng(), ZERO, self_conditioning=1.5)
