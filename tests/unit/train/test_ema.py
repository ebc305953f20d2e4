from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tubelet.core.errors import UserError
from tubelet.train.ema import PowerAverage, gamma_of, sigma_rel_of


def test_the_published_exponents() -> None:
    # Karras et al. 2023, section 3.1: sigma_rel .10 and .05 give gamma 6.94 and 16.97.
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    for sigma in (0.01, 0.05, 0.1, 0.15, 0.25, 0.28):
        assert sigma_rel_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.3, math.nan])
def test_impossible_widths_are_refused(sigma: float) -> None:
    with pytest.raises(UserError, match="sigma_rel"):
        gamma_of(sigma)


def test_the_average_is_the_closed_form_weighted_sum() -> None:
    """Unrolled, update k of n weighs (1 - beta_k) * prod of the later betas; the profile tends to tau^gamma, sigma_rel wide."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False).double()
    average, steps = PowerAverage(model, 0.10), 400
    values = torch.randn(steps, dtype=torch.float64)
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model)
    gamma, ks = gamma_of(0.10), torch.arange(1, steps + 1, dtype=torch.float64)
    # prod_{j=k+1..n} (1 - 1/j)^(gamma+1) telescopes to (k/n)^(gamma+1).
    weights = ((ks / steps) ** (gamma + 1)) * (1 - (1 - 1 / ks) ** (gamma + 1))
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert average.model.weight.item() == pytest.approx((weights * values).sum().item(), abs=1e-12)  # type: ignore[union-attr]
    times = ks / steps
    mean = (weights * times).sum()
    assert ((weights * (times - mean) ** 2).sum().sqrt()).item() == pytest.approx(0.10, abs=0.002)


def test_the_first_update_takes_the_weights_and_buffers_are_copied() -> None:
    model = nn.BatchNorm1d(3)
    average = PowerAverage(model, 0.10)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(2.0)  # type: ignore[union-attr]
    average.update(model)
    assert torch.equal(average.model.weight, model.weight)  # type: ignore[arg-type]
    assert torch.equal(average.model.running_mean, model.running_mean)  # type: ignore[arg-type]
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert model.training
