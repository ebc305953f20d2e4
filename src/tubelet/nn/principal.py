"""Vectors as short rows of codes: principal components, each cut into equal buckets.

As unCLIP's autoregressive prior tells image embeddings (Ramesh et al. 2022, section 2.2): 319 of 1024 components, in the order
of their variance, 1024 buckets each, a third of the tokens that the whole vector would need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.errors import UserError


@dataclass(frozen=True)
class PCA:
    """Principal components: `mean (E,)` and orthonormal `axes (K, E)`, largest variance first."""

    mean: Tensor
    axes: Tensor

    def project(self, x: Tensor) -> Tensor:
        """Embeddings `(..., E)` to coefficients `(..., K)`."""
        return (x - self.mean) @ self.axes.T

    def restore(self, coefficients: Tensor) -> Tensor:
        """Coefficients `(..., K)` to embeddings `(..., E)`, without what the components do not hold."""
        return coefficients @ self.axes + self.mean


def fit_pca(embeddings: Tensor, components: int = 319) -> PCA:
    """The principal components of embeddings `(S, E)`.

    Of CLIP's 1024 dimensions 319 keep all but 1 % of the mean squared error (section 2.2). An axis' largest entry is positive,
    so that equal data give equal codes. Raises UserError unless there are more embeddings than components.
    """
    S, E = embeddings.shape
    if not 1 <= components <= min(E, S - 1):
        raise UserError(f"{S} embeddings of {E} dimensions have no {components} components; pass more or ask for fewer")
    x = embeddings.double()
    mean = x.mean(0)  # (E,)
    centred = x - mean
    vectors = torch.linalg.eigh(centred.T @ centred / S).eigenvectors  # (E, E), smallest first
    axes = vectors.T.flip(0)[:components]  # (K, E)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return PCA(mean.to(embeddings.dtype), axes.to(embeddings.dtype))


@dataclass(frozen=True)
class Buckets:
    """`count` equal buckets for each of K coefficients: the least value `low (K,)`, and `width (K,)` of one bucket."""

    low: Tensor
    width: Tensor
    count: int

    def quantise(self, coefficients: Tensor) -> Tensor:
        """Coefficients `(..., K)` to codes `(..., K)` int64; what lies outside falls into the first or the last bucket."""
        return ((coefficients - self.low) / self.width).floor().long().clamp(0, self.count - 1)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Codes `(..., K)` to the middles of their buckets `(..., K)`; `quantise` returns the same codes."""
        return self.low + (codes + 0.5) * self.width


def fit_buckets(coefficients: Tensor, count: int = 1024) -> Buckets:
    """Buckets that cover coefficients `(S, K)` from the least to the largest of each component.

    Raises UserError when a component is the same everywhere.
    """
    low, high = coefficients.aminmax(dim=0)  # (K,) each
    if count < 1 or not (high > low).all():
        raise UserError("a component that never changes has no buckets; pass more embeddings or keep fewer components")
    return Buckets(low, (high - low) / count, count)
