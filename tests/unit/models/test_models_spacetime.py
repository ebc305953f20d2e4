from __future__ import annotations

import pytest
import torch

from tubelet.catalogue import MODELS, count, find
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.spacetime import COUNTED, PLACE_FEATURES, SIZES, Spacetime, SpacetimeConfig, place_features


@pytest.mark.parametrize("size", SIZES)
def test_counts_agree_with_arithmetic(size: str) -> None:
    c = SIZES[size]
    (T, H, W), M = COUNTED[c.patch]
    D, L = c.width, (1 + (T - 1) // c.patch[0]) * (H // c.patch[1]) * (W // c.patch[2])
    hidden, cells = round(D * 8 / 3 / 64) * 64, c.patch[0] * c.patch[1] * c.patch[2] * c.in_channels
    block = L * (4 * D * D + 2 * D * D + 3 * D * hidden) + M * 2 * D * D + 2 * L * L * D + 2 * L * M * D
    counted = count(f"Spacetime-{size}")
    assert counted["macs"] == c.depth * block + 3 * L * cells * D + L * 160 * D + M * c.text_width * D + 256 * D + 9 * D * D
    weights = c.depth * (8 * D * D + 3 * D * hidden + 7 * D + 4 * 64) + 3 * cells * D + 2 * cells + D + 160 * D
    weights += c.text_width * (D + 1) + D + 256 * D + D + D * D + D + 8 * D * D + 8 * D
    assert counted["parameters"] == weights


def test_sizes_are_the_published_table() -> None:
    table = {name: (c.width, c.depth, c.width // c.heads) for name, c in SIZES.items()}
    assert table == {"XS": (256, 8, 64), "S": (384, 12, 64), "B": (768, 12, 64), "L": (1024, 24, 64), "XL": (1152, 28, 64)}


def test_names_are_found_in_any_case_and_unknown_ones_listed() -> None:
    assert find("spacetime-xl") is MODELS["Spacetime-XL"]
    with pytest.raises(UserError, match="no model 'spacetime-xxl'; choose one of Spacetime-XS"):
        find("spacetime-xxl")


def test_the_stated_input_is_the_one_counted() -> None:
    entry = MODELS["Spacetime-XS"]
    assert entry.stated(entry.config) == "8 x 17 x 8 x 8 latents (C, T, H, W), patch 2 x 2 x 2, 48 text tokens of width 256"
    z, sigma, condition = entry.example(entry.config, 3)
    assert (z.shape, sigma.shape, condition.states.shape) == ((3, 8, 17, 8, 8), (3,), (3, 48, 256))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "try 256"),
        ({"depth": 0}, "at least 1"),
        ({"patch": (0, 2, 2)}, "at least 1"),
        ({"text": "both"}, "cross, joint"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(SpacetimeConfig, to_dict(SpacetimeConfig()) | settings)


def test_angles_made_while_sampling_serve_training() -> None:
    config = MODELS["Spacetime-XS"].tiny(MODELS["Spacetime-XS"].config)
    model = Spacetime(config)
    inputs = (torch.randn(1, 8, 3, 4, 4), torch.rand(1), Condition(torch.randn(1, 2, 24), torch.ones(1, 2, dtype=torch.bool)))
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).sum().backward()


def test_a_place_on_the_floor_is_the_same_fraction_at_every_size() -> None:
    small = place_features(torch.tensor([[0.0, 6.5, 3.5]]), (8, 8))  # (1, 160)
    large = place_features(torch.tensor([[0.0, 13.5, 7.5]]), (16, 16))
    assert small.shape == (1, PLACE_FEATURES)
    torch.testing.assert_close(small[:, 96:], large[:, 96:])
    assert not torch.allclose(small[:, :96], large[:, :96]), "cells count from the corner"


def test_places_are_all_different() -> None:
    grid = torch.cartesian_prod(torch.arange(17.0), torch.arange(8.0), torch.arange(8.0))
    features = place_features(grid, (8, 8))
    gaps = torch.cdist(features, features) + 9 * torch.eye(len(grid))
    assert float(gaps.min()) > 0.05
