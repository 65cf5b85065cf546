"""More convex sets: their proximal operators are projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import innermost, shown
from ..checks import check_number_or_tensor
from ..tree import on_host
from .base import Ball, Prox, Setting, Simplex, of_problem


@dataclass(frozen=True, eq=False)
class L1Ball(Ball):
    """``sum |y| <= radius`` (Duchi et al. 2008): sparse, as the lasso, at a size that is given."""

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        size = y.abs()
        outside = size.detach().sum(-1, keepdim=True) > of_problem("radius", self.radius, y)
        return torch.where(outside, y.sign() * Simplex(self.radius).prox(size, step), y)

    def value(self, y: Tensor) -> Tensor:
        slack = 1e-5 if y.dtype == torch.float32 else 1e-10
        radius = torch.as_tensor(of_problem("radius", self.radius, y), dtype=y.dtype, device=y.device)
        inside = y.abs().sum(-1, keepdim=True) <= radius + slack * (1 + radius)
        return torch.where(inside.squeeze(-1), 0.0, torch.inf).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Affine(Prox):
    """``A y = b``.

    Args:
        A: ``[m, n]``, or one for each problem ``[T, m, n]``; its rows do not depend on each other.
        b: ``[m]`` or ``[T, m]``.

    Raises:
        TypeError: no tensors. ValueError: shapes that do not fit, NaN, or rows that depend on each other.
    """

    A: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        _check_finite(A=self.A, b=self.b)
        if self.A.dim() < 2 or self.b.dim() < 1 or self.A.shape[-2] != self.b.shape[-1]:
            raise ValueError(
                f"A has shape {tuple(self.A.shape)} and b {tuple(self.b.shape)}: [m, n] and [m] go together."
            )
        if bool(innermost(torch.linalg.matrix_rank(self.A.detach().double()) < self.A.shape[-2]).any()):
            raise ValueError("the rows of A depend on each other: drop those that say nothing new.")

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        # In float64: the condition of A A' is the square of that of A.
        _check_length("A", self.A, y)
        A, wide = self.A.double(), y.double()
        gap = (A @ wide.unsqueeze(-1)) - self.b.double().unsqueeze(-1)
        found: Tensor = (wide - (A.mT @ torch.linalg.solve(A @ A.mT, gap)).squeeze(-1)).to(y.dtype)
        return found

    def value(self, y: Tensor) -> Tensor:
        slack = 1e-5 if y.dtype == torch.float32 else 1e-10
        A, wide = self.A.double(), y.double().unsqueeze(-1)
        gap = ((A @ wide).squeeze(-1) - self.b.double()).abs()
        rounding = (A.abs() @ wide.abs()).squeeze(-1) + self.b.double().abs()
        return torch.where((gap <= slack * rounding).all(-1), 0.0, torch.inf).to(y.dtype)


@dataclass(frozen=True, eq=False)
class HalfSpace(Prox):
    """A half-space, ``<a, y> <= b``.

    Args:
        a: ``[n]`` or ``[T, n]``, not zero.
        b: a number, or ``[T]``.

    Raises:
        TypeError: a is no tensor, or b no number. ValueError: a is zero, NaN, or of another length than the params.
    """

    a: Tensor
    b: Setting = 0.0

    def __post_init__(self) -> None:
        _check_finite(a=self.a)
        check_number_or_tensor("b", self.b)
        if not bool(torch.isfinite(innermost(on_host(self.b))).all()):
            raise ValueError(f"b is {shown(self.b)}: a finite number is needed.")
        if self.a.dim() < 1:
            raise ValueError("a has shape (): a vector [n] is needed, or one for each problem, [T, n].")
        if not bool(innermost((self.a.detach() != 0).any(-1)).all()):
            raise ValueError("a is zero: the half-space is everything, or nothing.")

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        over = self._over(y)
        over = torch.where(over > 0, over, torch.zeros_like(over))
        return (y.double() - (over / self.a.double().square().sum(-1)).unsqueeze(-1) * self.a.double()).to(y.dtype)

    def value(self, y: Tensor) -> Tensor:
        slack = 1e-5 if y.dtype == torch.float32 else 1e-10
        rounding = (self.a * y).double().abs().sum(-1) + on_host(self.b).double().abs()
        return torch.where(self._over(y) <= slack * rounding, 0.0, torch.inf).to(y.dtype)

    def _over(self, y: Tensor) -> Tensor:
        _check_length("a", self.a, y)
        return (self.a.double() * y.double()).sum(-1) - self.b


def _check_finite(**settings: Tensor) -> None:
    """Refuse settings that are no tensors of finite numbers, naming them."""
    for name, value in settings.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {value!r}: a tensor is needed, such as torch.as_tensor({name}).")
        if not bool(torch.isfinite(innermost(value)).all()):
            raise ValueError(f"{name} contains NaN or infinite values.")


def _check_length(name: str, setting: Tensor, y: Tensor) -> None:
    if setting.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(setting.shape)}, and the params are vectors of shape {tuple(y.shape)}, flattened "
            f"and one for each problem: its last dimension has to be {y.shape[-1]}."
        )
