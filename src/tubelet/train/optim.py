"""Muon for the matrices inside, AdamW for the rest, as one optimiser with one learning-rate scale.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by Newton-Schulz steps.
With the factor 0.2 * sqrt(max(rows, columns)) (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4) its updates have
the root mean square of AdamW's, so both take the same learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic a x + b x^3 + c x^5 of steep slope at 0: 5 steps bring singular values to about [0.7, 1.2] (Jordan et al. 2024)."""

NARROW = 16
"""A convolution with this many input or output channels or fewer touches pixels or latents: a first or last layer."""

MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Split(NamedTuple):
    """A model's trainable parameters by name: who is trained by Muon and who by AdamW."""

    muon: dict[str, nn.Parameter]
    adamw: dict[str, nn.Parameter]


def split(model: nn.Module, inside: Sequence[str] = ("blocks",)) -> Split:
    """Weights of linear layers and convolutions within modules named `inside`, and of wide convolutions anywhere, go to Muon.

    Embeddings, linear layers outside blocks, the first and the last layer, narrow convolutions (see NARROW), gains, biases and
    free parameters go to AdamW.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MATRIX_LAYERS)]
    chosen: set[int] = set()
    for place, (name, module) in enumerate(layers):
        within = not set(inside).isdisjoint(name.split("."))
        convolution = not isinstance(module, nn.Linear)
        wide = convolution and min(module.in_channels, module.out_channels) > NARROW
        if (within and (not convolution or wide)) or (wide and 0 < place < len(layers) - 1):
            chosen.add(id(module.weight))
    muon, adamw = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (muon if id(parameter) in chosen else adamw)[name] = parameter
    return Split(muon, adamw)


def adamw_only(model: nn.Module) -> Split:
    """Everything to AdamW."""
    return Split({}, {name: p for name, p in model.named_parameters() if p.requires_grad})


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices of a stack `(n, rows, columns)`: singular values near 1; in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # (n, columns, rows): the Gram matrix is taken of the shorter side
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (n, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum with Nesterov's look-ahead, orthogonalised. Parameters of equal shape are handled as one stack."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        learning_rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.learning_rate, self.momentum, self.weight_decay, self.steps, self.dtype = (
            learning_rate,
            momentum,
            weight_decay,
            steps,
            dtype,
        )
        self.stacks: dict[tuple[int, int], dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            assert parameter.ndim >= 2, f"{name} is no matrix: {tuple(parameter.shape)}"
            rows = parameter.shape[0]
            self.stacks.setdefault((rows, parameter.numel() // rows), {})[name] = parameter
        self.momenta = {
            shape: torch.zeros(len(members), *shape, device=next(iter(members.values())).device)
            for shape, members in self.stacks.items()
        }

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """One update at `scale` times the learning rate. A parameter without gradient counts as having a zero one."""
        rate = self.learning_rate * scale
        for (rows, columns), members in self.stacks.items():
            parameters: list[Tensor] = list(members.values())
            gradients = torch.stack(
                [
                    torch.zeros(rows, columns, device=p.device) if p.grad is None else p.grad.reshape(rows, columns)
                    for p in parameters
                ]
            )  # (n, rows, columns)
            momentum = self.momenta[rows, columns].lerp_(gradients, 1.0 - self.momentum)
            update = orthogonalise(gradients.lerp_(momentum, self.momentum), self.steps, self.dtype)
            update.mul_(-rate * 0.2 * max(rows, columns) ** 0.5)
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1.0 - rate * self.weight_decay)
            torch._foreach_add_(parameters, [u.view(p.shape) for u, p in zip(update, parameters, strict=True)])

    def state(self) -> dict[str, Tensor]:
        """`NAME.momentum` per parameter, in the parameter's shape."""
        return {
            f"{name}.momentum": momentum.view(p.shape)
            for shape, members in self.stacks.items()
            for (name, p), momentum in zip(members.items(), self.momenta[shape], strict=True)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for shape, members in self.stacks.items():
            for place, name in enumerate(members):
                self.momenta[shape][place].copy_(_entry(state, f"{name}.momentum").reshape(shape))


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; gains, biases and free vectors are never decayed."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.learning_rate = learning_rate
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in self.parameters.values())
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.inner = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused) if groups else None

    def step(self, scale: float = 1.0) -> None:
        """One update at `scale` times the learning rate."""
        if self.inner is None:
            return
        for group in self.inner.param_groups:
            group["lr"] = self.learning_rate * scale
        self.inner.step()
        # The fused step does not count its changes, by which packed copies of weights know that they are old.
        torch.autograd.graph.increment_version([p for p in self.parameters.values() if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """`NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq` per parameter that was ever updated."""
        if self.inner is None:
            return {}
        return {
            f"{name}.{part}": value
            for name, p in self.parameters.items()
            for part, value in self.inner.state.get(p, {}).items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        if self.inner is None:
            return
        self.inner.state.clear()
        for name, p in self.parameters.items():
            if f"{name}.step" in state:
                # The fused step walks memory, so moments lie in it as their parameter does (channels last in codecs).
                self.inner.state[p] = {
                    "step": _entry(state, f"{name}.step").to(p.device),
                    **{part: torch.empty_like(p).copy_(_entry(state, f"{name}.{part}")) for part in ("exp_avg", "exp_avg_sq")},
                }


@dataclass(frozen=True)
class OptimizerConfig:
    """How a model is optimised. Learning rates are peaks: the loop's schedule multiplies them."""

    kind: str = "muon"
    """`muon` (with AdamW on the rest) or `adamw` alone."""
    learning_rate: float = 1.2e-3
    """Of Muon's matrices."""
    learning_rate_adamw: float = 1.2e-3
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    newton_schulz_steps: int = 5

    def __post_init__(self) -> None:
        if self.kind not in ("muon", "adamw"):
            raise UserError(f"the optimiser must be muon or adamw, got {self.kind!r}; choose one of them")
        for name in ("learning_rate", "learning_rate_adamw"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}; 1e-3 is a good start")
        if self.weight_decay < 0.0 or not 0.0 <= self.momentum < 1.0 or not all(0.0 <= b < 1.0 for b in self.betas):
            raise UserError("weight_decay must be at least 0, momentum and betas in [0, 1); correct the optimiser's settings")
        if self.newton_schulz_steps < 1:
            raise UserError(f"newton_schulz_steps must be at least 1, got {self.newton_schulz_steps}; 5 is usual")


class Optimizer:
    """Muon and AdamW side by side. `dtype` is the arithmetic of Muon's orthogonalisation; all state is fp32."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
        choose: Callable[[nn.Module], Split] | None = None,
    ) -> None:
        parts = adamw_only(model) if config.kind == "adamw" else (choose or split)(model)
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        assert wanted == parts.muon.keys() | parts.adamw.keys(), "a split must name every trainable parameter"
        assert not parts.muon.keys() & parts.adamw.keys(), "a split must name a parameter once"
        self.parameters = list(parts.muon.values()) + list(parts.adamw.values())
        self.muon = Muon(
            parts.muon, config.learning_rate, config.momentum, config.weight_decay, config.newton_schulz_steps, dtype
        )
        self.adamw = AdamW(parts.adamw, config.learning_rate_adamw, config.betas, config.weight_decay)

    def step(self, scale: float = 1.0) -> None:
        """Update every parameter from its gradient at `scale` times the learning rates."""
        self.muon.step(scale)
        self.adamw.step(scale)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors by name."""
        return {**self.muon.state(), **self.adamw.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises UserError when it belongs to another model or split."""
        self.muon.restore(state)
        self.adamw.restore(state)


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError(
            f"the checkpoint's optimiser has no {name!r}; resume with the model and optimiser that it was written with"
        )
    return state[name]
