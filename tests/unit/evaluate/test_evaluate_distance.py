"""Distances between sets of features: known for Gaussians, fair to equal ones, and larger for every damage that we know."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.evaluate.distance import PICTURE_FEATURES, _look, distances, features
from tubelet.worlds import WORLDS
from tubelet.worlds.base import foreground
from tubelet.worlds.constants import TEST_SEEDS, WALL

N = 192
KINDS = ("slide", "fall", "bounce", "parabola")


def pictures(first: int, count: int = N, frames: int = 1, **wish: str) -> np.ndarray:
    """uint8 `(n, T, H, W, 3)` of single objects, of test seeds from `first` on."""
    return np.stack(
        [
            WORLDS["phys2d"]
            .sample(TEST_SEEDS[first + n], 64, 64, frames, 4.0, kind=KINDS[n % 4], wish={"objects": [wish]} if wish else None)
            .video
            for n in range(count)
        ]
    )


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return pictures(0)


@pytest.fixture(scope="module")
def other() -> np.ndarray:
    return pictures(N)


# Distances on features given


def test_gaussians_are_as_far_apart_as_the_formula_says() -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of samples from known Gaussians; with common axes the trace is plain."""
    rng = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64)).Q
    one, two = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([2.0, 2.0, 1.5, 0.2])  # deviations along the axes
    apart = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)

    def sample(deviations: Tensor, mean: Tensor) -> Tensor:
        return (torch.randn(1000, 4, generator=rng, dtype=torch.float64) * deviations) @ axes.T + mean

    exact = float(apart.square().sum() + (one - two).square().sum())
    found = [distances(sample(one, torch.zeros(4)), sample(two, apart))["frechet"] for _ in range(8)]
    assert np.mean(found) == pytest.approx(exact, rel=0.03)
    assert distances(sample(one, apart), sample(one, apart))["frechet"] < 0.01 * exact


def test_the_kernel_distance_is_fair_to_equal_distributions() -> None:
    """Its mean over draws is 0 within the error of that mean; the Frechet distance of small sets is not."""
    rng = torch.Generator().manual_seed(0)
    draws = [distances(torch.randn(24, 6, generator=rng), torch.randn(24, 6, generator=rng)) for _ in range(300)]
    kid = np.array([draw["kid"] for draw in draws])
    assert abs(kid.mean()) < 3 * kid.std() / len(kid) ** 0.5
    assert kid.min() < 0 < kid.max()
    assert np.mean([draw["frechet"] for draw in draws]) > 0.5
    moved = distances(torch.randn(24, 6, generator=rng), torch.randn(24, 6, generator=rng) + 1.0)
    assert moved["kid"] > kid.max()


def test_features_of_other_widths_are_refused() -> None:
    with pytest.raises(UserError, match="one width"):
        distances(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(UserError, match="at least 2"):
        distances(torch.zeros(1, 3), torch.zeros(4, 3))


# Features of pictures and films


def blurred(clips: np.ndarray, reach: int) -> np.ndarray:
    pixels = torch.from_numpy(clips[:, 0]).permute(0, 3, 1, 2).float()
    wide = F.pad(pixels, (reach,) * 4, mode="replicate")
    return F.avg_pool2d(wide, 2 * reach + 1, 1).round().byte().permute(0, 2, 3, 1)[:, None].numpy()


def noisy(clips: np.ndarray, levels: float) -> np.ndarray:
    return np.clip(clips + np.random.RandomState(0).randn(*clips.shape) * levels, 0, 255).astype(np.uint8)


def missing(clips: np.ndarray, share: float) -> np.ndarray:
    clips = clips.copy()
    for clip in clips[: round(share * len(clips))]:
        seen = foreground(clip).astype(bool)
        for _ in range(2):
            seen = seen | np.roll(seen, 1, 1) | np.roll(seen, -1, 1) | np.roll(seen, 1, 2) | np.roll(seen, -1, 2)
        clip[seen] = WALL
    return clips


def doubled(clips: np.ndarray, share: float) -> np.ndarray:
    out = clips.copy()
    for n in range(round(share * len(clips))):
        seen = foreground(clips[(n + 1) % len(clips)]).astype(bool)
        out[n][seen] = clips[(n + 1) % len(clips)][seen]
    return out


def smeared(clips: np.ndarray, share: float) -> np.ndarray:
    out, some = clips.copy(), round(share * len(clips))
    pixels = torch.from_numpy(clips[:some, 0]).permute(0, 3, 1, 2).float()
    soft = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")
    out[:some, 0] = soft.round().byte().permute(0, 2, 3, 1).numpy()
    return out


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [(blurred, (1, 2)), (noisy, (4, 8)), (missing, (0.25, 0.5)), (doubled, (0.25, 0.5)), (smeared, (0.25, 0.5))],
)
def test_every_damage_is_seen_and_more_of_it_more(
    truth: np.ndarray, other: np.ndarray, damage: Callable[[np.ndarray, float], np.ndarray], strengths: tuple[float, float]
) -> None:
    seen = features(truth)
    whole = distances(seen, features(other))
    little, much = (distances(seen, features(damage(other, strength))) for strength in strengths)
    assert little["frechet"] > 2 * whole["frechet"]
    assert much["frechet"] > 2 * little["frechet"]
    assert little["kid"] > 3 * abs(whole["kid"])
    assert much["kid"] > 2 * little["kid"]


@pytest.mark.parametrize(("facet", "word"), [("color", "red"), ("shape", "ball"), ("size", "large")])
def test_a_network_that_always_draws_the_same_is_seen(truth: np.ndarray, other: np.ndarray, facet: str, word: str) -> None:
    """What pixel statistics miss: every picture is perfect, there is only no choice."""
    seen = features(truth)
    whole, same = distances(seen, features(other)), distances(seen, features(pictures(N, **{facet: word})))
    assert same["frechet"] > 1.6 * whole["frechet"]
    assert same["kid"] > whole["kid"] + 0.05


def test_features_of_films_also_say_how_much_changes() -> None:
    clips = pictures(0, 48, frames=4)
    moving, still = features(clips), features(np.repeat(clips[:, :1], 4, 1))
    assert moving.shape == still.shape == (48, 2 * PICTURE_FEATURES)
    torch.testing.assert_close(still[:, :PICTURE_FEATURES], features(clips[:, :1]), atol=1e-4, rtol=1e-4)
    assert float(still[:, PICTURE_FEATURES:].mean()) < float(moving[:, PICTURE_FEATURES:].mean()) - 0.3
    others = features(pictures(48, 48, frames=4))
    assert distances(moving, still)["kid"] > distances(moving, others)["kid"]


def test_features_are_fixed(truth: np.ndarray) -> None:
    before = features(truth[:8])
    _look.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(features(truth[:8]), before)
    torch.testing.assert_close(features(truth[:8], batch=3), before, atol=1e-5, rtol=1e-5)
    # No channel is dead: on clips of their own world all features spread.
    assert float(features(truth).std(0).min()) > 0.2


@pytest.mark.parametrize(
    ("clips", "says"),
    [
        (np.zeros((4, 64, 64, 3), np.uint8), "add the missing axes"),
        (np.zeros((4, 1, 64, 64, 3), np.float32), "must be uint8"),
        (np.zeros((0, 1, 64, 64, 3), np.uint8), "must be uint8"),
        (np.zeros((4, 1, 64, 8, 3), np.uint8), "16 x 16"),
    ],
)
def test_other_forms_are_refused(clips: np.ndarray, says: str) -> None:
    with pytest.raises(UserError, match=says):
        features(clips)
