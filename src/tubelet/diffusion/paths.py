"""Noise paths: how a clean x and unit noise n are mixed at a noise level, and which levels are visited.

A path is `z = alpha(sigma) * x + noise(sigma) * n`, with `sigma` from 0 (clean) to 1 (noise) on every path, so that solvers,
guidance and objectives need no other notion of noise level. Rectified flow: Liu et al. 2022 (2209.03003). Variance preserving
paths: DDPM, Ho et al. 2020 (2006.11239); cosine, Nichol & Dhariwal 2021 (2102.09672, eq. 17); LDM, Rombach et al. 2022
(2112.10752); zero terminal SNR, Lin et al. 2023 (2305.08891).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tubelet.core.errors import UserError


class Path(ABC):
    """Maps a noise level in [0, 1] to the two coefficients of `z = alpha * x + noise * n`.

    All methods are elementwise: any shape in, the same shape, dtype and device out.
    """

    @abstractmethod
    def alpha(self, sigma: Tensor) -> Tensor:
        """The share of the clean signal: 1 at sigma 0, falling."""

    @abstractmethod
    def noise(self, sigma: Tensor) -> Tensor:
        """The standard deviation of the noise: 0 at sigma 0, rising."""

    @abstractmethod
    def log_snr(self, sigma: Tensor) -> Tensor:
        """log(alpha^2 / noise^2): +inf at sigma 0, strictly falling, -inf where no signal is left."""


class RectifiedFlow(Path):
    """The straight line `z = (1 - sigma) * x + sigma * n` (Liu et al. 2022, eq. 1 with their t = 1 - sigma)."""

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def noise(self, sigma: Tensor) -> Tensor:
        return sigma

    def log_snr(self, sigma: Tensor) -> Tensor:
        return 2 * (torch.log1p(-sigma) - torch.log(sigma))


class VariancePreserving(Path):
    """A discrete chain of N steps, alpha^2 + noise^2 = 1, read continuously.

    Integer step i (0 .. N-1, as DDPM code counts them) is sigma = (i + 1) / N, and sigma 0 is the clean signal that the chain
    starts from; `sigma_of_step` and `step_of_sigma` convert. Between steps the log-SNR is linear in sigma. Where it is
    infinite at one end it cannot be: below step 0 the noise is proportional to sigma, and in the last interval of a chain with
    zero terminal SNR alpha falls linearly to 0.

    Args:
        alphas_cumprod: `(N,)`, the signal's variance after each step, strictly falling, in [0, 1) (only the last may be 0);
            held and read in float64, because a float32 cumulative product is off in the fifth digit.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise UserError(f"a noise table is one row of at least 2 steps, got shape {tuple(table.shape)}; give more steps")
        whole = torch.cat([torch.ones(1, dtype=torch.float64), table])
        if not bool((whole.diff() < 0).all()) or float(table[-1]) < 0:
            raise UserError("a noise table must fall strictly from below 1 to 0 or more; check its betas, each in (0, 1]")
        self.alphas_cumprod = table
        self._log_snr = torch.log(table) - torch.log1p(-table)

    def __len__(self) -> int:
        """The number of integer steps."""
        return len(self.alphas_cumprod)

    def sigma_of_step(self, step: Tensor) -> Tensor:
        """The noise level of integer (or fractional) steps, float64."""
        return (step.double() + 1) / len(self)

    def step_of_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma_of_step`, float64; below 0 where sigma is less than the first step's."""
        return sigma.double() * len(self) - 1

    def told_step(self, sigma: Tensor) -> Tensor:
        """`step_of_sigma` as networks are told it: at least 0, and whole where the level, blurred by float32, is a step's."""
        step = self.step_of_sigma(sigma)
        whole = step.round()
        return torch.where((step - whole).abs() < 1e-3, whole, step).clamp(min=0)

    def log_snr(self, sigma: Tensor) -> Tensor:
        return self._log_snr_float64(sigma).to(sigma.dtype)

    def alpha(self, sigma: Tensor) -> Tensor:
        return self._log_snr_float64(sigma).sigmoid().sqrt().to(sigma.dtype)

    def noise(self, sigma: Tensor) -> Tensor:
        return self._log_snr_float64(sigma).neg().sigmoid().sqrt().to(sigma.dtype)

    def _log_snr_float64(self, sigma: Tensor) -> Tensor:
        table = self._log_snr.to(sigma.device)
        step = self.step_of_sigma(sigma).clamp(-1, len(self) - 1)
        low = step.floor().clamp(0, len(self) - 2).long()
        part = step - low
        value = torch.lerp(table[low], table[low + 1], part.clamp(min=0))
        first = (1 - self.alphas_cumprod[0]).sqrt()
        near_clean = (first * (step + 1).clamp(0, 1)) ** 2
        value = torch.where(step < 0, torch.log1p(-near_clean) - torch.log(near_clean), value)
        if bool(torch.isneginf(self._log_snr[-1])):
            near_noise = (self.alphas_cumprod[-2].sqrt() * (1 - part).clamp(0, 1)) ** 2
            value = torch.where(step >= len(self) - 2, torch.log(near_noise) - torch.log1p(-near_noise), value)
        return value


class VPLinear(VariancePreserving):
    """DDPM's chain: betas linear from 1e-4 to 0.02 (Ho et al. 2020, section 4; DiT and W.A.L.T use it too)."""

    def __init__(self, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> None:
        super().__init__(_cumulative(torch.linspace(first, last, steps, dtype=torch.float64)))


class LDM(VariancePreserving):
    """Stable Diffusion's chain: linear in the square root of beta from .00085 to .012, which its code calls "linear"."""

    def __init__(self, steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> None:
        super().__init__(_cumulative(torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2))


class Cosine(VariancePreserving):
    """The cosine chain (Nichol & Dhariwal 2021, eq. 17, s = .008), betas capped at .999; "squaredcos_cap_v2" elsewhere."""

    def __init__(self, steps: int = 1000, cap: float = 0.999) -> None:
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2
        super().__init__(_cumulative((1 - curve[1:] / curve[:-1]).clamp(max=cap)))


def _cumulative(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, 0)


def zero_terminal_snr(path: VariancePreserving) -> VariancePreserving:
    """The same chain with sqrt(alphas_cumprod) shifted and scaled so that the first step stays and the last is exactly 0.

    Lin et al. 2023, algorithm 1. An eps prediction is undefined at its last step: train x or v on it, and sample it with
    trailing spacing, which alone visits that step.
    """
    root = path.alphas_cumprod.sqrt()
    return VariancePreserving(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


RECTIFIED_FLOW = RectifiedFlow()
PATHS: dict[str, Callable[[], Path]] = {
    "rectified_flow": RectifiedFlow,
    "vp_linear": VPLinear,
    "cosine": Cosine,
    "ldm": LDM,
}

Spacing = Literal["trailing", "leading", "linspace"]


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """`shift * s / (1 + (shift - 1) * s)`: a shift above 1 moves levels towards noise and keeps 0 and 1.

    Esser et al. 2024 (2403.03206), eq. 23, where the shift is the square root of the ratio of token counts.
    """
    if not shift > 0:
        raise UserError(f"shift must be positive, got {shift}; 1 means no shift")
    return shift * sigma / (1 + (shift - 1) * sigma)


def uniform_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """`(steps + 1,)` float64 noise levels from 1 to 0, evenly spaced and then shifted: the schedule of rectified flow."""
    _check_steps(steps)
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def spaced_sigmas(path: VariancePreserving, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """`(steps + 1,)` float64 noise levels that visit integer steps of a chain, noisiest first, and end at 0.

    "trailing" counts down from the last step, "leading" up from the first, "linspace" includes both (Lin et al. 2023, table 2;
    DiT's respacing is "linspace"). Raises UserError when there are more steps than the chain has.
    """
    _check_steps(steps)
    N = len(path)
    if steps > N:
        raise UserError(f"steps must be at most {N}, the length of this noise table, got {steps}; ask for fewer")
    count = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        visited = (N - count * (N / steps)).round() - 1
    elif spacing == "leading":
        visited = (count * (N // steps)).flip(0)
    elif spacing == "linspace":
        visited = torch.linspace(N - 1, 0, steps, dtype=torch.float64).round()
    else:
        raise UserError(f"spacing must be trailing, leading or linspace, got {spacing!r}; choose one of them")
    return torch.cat([path.sigma_of_step(visited), torch.zeros(1, dtype=torch.float64)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}; 16 is a good start")


@dataclass(frozen=True)
class SigmaSampling:
    """Which noise levels training sees: a logit-normal mixed with a uniform, then shifted.

    Logit-normal: Esser et al. 2024, eq. 19. The uniform part keeps both ends trained, where the logit-normal has no mass.
    """

    mean: float = 0.0  # of logit(sigma) before the shift; above 0 leans to noise
    std: float = 1.0
    uniform: float = 0.1  # share drawn evenly from [0, 1)
    shift: float = 1.0
    per_frame: bool = False  # one level per frame instead of one per sample
    tokens: int = (
        0  # the shift holds for clips of so many tokens and grows with the root of their count; 0: it is the same for all
    )

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"std must be positive, got {self.std}; 1 is the usual choice")
        if not 0 <= self.uniform <= 1:
            raise UserError(f"uniform must be a share in [0, 1], got {self.uniform}; 0.1 is the usual choice")
        if not self.shift > 0:
            raise UserError(f"shift must be positive, got {self.shift}; 1 means no shift")
        if self.tokens < 0:
            raise UserError(f"tokens must be at least 0, got {self.tokens}; 0 shifts all clips alike")

    def shift_of(self, tokens: int | None) -> float:
        """The shift of a clip of `tokens` tokens: larger clips stay legible under more noise (Esser et al. 2024, eq. 23)."""
        return shift_of_tokens(self.shift, tokens, self.tokens)


def shift_of_tokens(shift: float, tokens: int | None, reference: int) -> float:
    """`shift`, meant for `reference` tokens, at another count: times the root of the ratio. Either unknown or 0: as it is."""
    return shift * math.sqrt(tokens / reference) if tokens and reference else shift


def sample_sigma(
    n: int | tuple[int, ...], rng: torch.Generator, sampling: SigmaSampling | None = None, tokens: int | None = None
) -> Tensor:
    """Draw float32 noise levels in [0, 1], of shape `(n,)` or `n`, on the generator's device, for clips of `tokens` tokens.

    The draws taken from `rng` depend on the shape only, never on the settings.
    """
    sampling = sampling or SigmaSampling()
    shape = (n,) if isinstance(n, int) else n
    normal = torch.randn(shape, generator=rng, device=rng.device)
    even = torch.rand(shape, generator=rng, device=rng.device)
    choice = torch.rand(shape, generator=rng, device=rng.device)
    sigma = torch.where(choice < sampling.uniform, even, torch.sigmoid(sampling.mean + sampling.std * normal))
    return shift_sigma(sigma, sampling.shift_of(tokens))
