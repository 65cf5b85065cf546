"""Proximal operators and projections, for inner problems with a penalty or a constraint that is not smooth.

Each works on flat vectors ``[*batch, n]`` and is differentiable towards the vector and its own settings, which may be
tensors that require grad: hyperparameters like others. ``prox(y, step) = argmin_z ||z - y||^2 / 2 + step * value(z)``.
Settings broadcast against ``[*batch, n]`` (those that are one number for a problem: ``[T, 1]`` for T problems).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from .._torch import innermost, shown
from ..checks import check_number_or_tensor
from ..tree import broadcasts_to, on_host

Setting = float | Tensor


class Prox(ABC):
    """A closed convex function with a prox.

    ``separable``: it acts on each coordinate by itself, so that its Jacobian is diagonal. ``not_negative``: the names
    of its settings that must be 0 or more. Two are equal where their numbers are, and their tensors are the same
    tensors.
    """

    separable: ClassVar[bool] = False
    not_negative: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_not_negative(**{name: getattr(self, name) for name in self.not_negative})

    @abstractmethod
    def prox(self, y: Tensor, step: Setting) -> Tensor:
        """``[*batch, n] -> [*batch, n]``; ``step`` a number, or one for each problem ``[*batch]``."""

    @abstractmethod
    def value(self, y: Tensor) -> Tensor:
        """``[*batch, n] -> [*batch]``; of a constraint 0 inside (to rounding) and inf outside."""

    @property
    def tensors(self) -> list[Tensor]:
        """Settings that are tensors."""
        return [value for value in self._settings() if isinstance(value, Tensor)]

    def _settings(self) -> list[Setting]:
        return [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]

    def _key(self) -> tuple[object, ...]:
        return (type(self), *[id(value) if isinstance(value, Tensor) else value for value in self._settings()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prox) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, eq=False)
class L1(Prox):
    """``sum strength |y|``: the lasso. ``strength`` a number, or one for each coordinate ``[n]``."""

    strength: Setting = 1.0
    separable: ClassVar[bool] = True
    not_negative: ClassVar[tuple[str, ...]] = ("strength",)

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        return soft_threshold(y, per_problem(step, y) * fitting("strength", self.strength, y))

    def value(self, y: Tensor) -> Tensor:
        return (fitting("strength", self.strength, y) * y.abs()).sum(-1)


@dataclass(frozen=True, eq=False)
class ElasticNet(Prox):
    """``sum l1 |y| + l2 y^2 / 2``."""

    l1: Setting = 1.0
    l2: Setting = 1.0
    separable: ClassVar[bool] = True
    not_negative: ClassVar[tuple[str, ...]] = ("l1", "l2")

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        step, l1, l2 = per_problem(step, y), fitting("l1", self.l1, y), fitting("l2", self.l2, y)
        return soft_threshold(y, step * l1) / (1 + step * l2)

    def value(self, y: Tensor) -> Tensor:
        return (fitting("l1", self.l1, y) * y.abs() + fitting("l2", self.l2, y) * y.square() / 2).sum(-1)


@dataclass(frozen=True, eq=False)
class GroupLasso(Prox):
    """``sum_g strength_g ||y_g||``.

    Args:
        groups: the group of each coordinate, int64 ``[n]``, counted from 0.
        strength: a number, or one for each group.
    """

    groups: Tensor
    strength: Setting = 1.0
    not_negative: ClassVar[tuple[str, ...]] = ("strength",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, Tensor):
            raise TypeError(f"groups is {self.groups!r}: a tensor is needed, such as torch.tensor([0, 0, 1]).")
        if self.groups.dtype != torch.int64 or self.groups.dim() != 1 or bool((self.groups < 0).any()):
            raise ValueError("groups is a vector of int64 that names the group of each coordinate, counted from 0.")
        count = int(self.groups.max()) + 1 if len(self.groups) else 0
        if isinstance(self.strength, Tensor) and self.strength.dim() and self.strength.shape[-1] not in (1, count):
            raise ValueError(
                f"strength has shape {tuple(self.strength.shape)} for {count} groups: a number is needed, or one for "
                "each group."
            )

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        size = self._sizes(y)
        alive = size > 0
        safe = torch.where(alive, size, torch.ones_like(size))
        strength = fitting("strength", self.strength, size)
        factor = torch.where(alive, 1 - per_problem(step, y) * strength / safe, torch.zeros_like(size))
        factor = torch.where(factor > 0, factor, torch.zeros_like(factor))
        return y * factor[..., self.groups].to(y.dtype)

    def value(self, y: Tensor) -> Tensor:
        return (self.strength * self._sizes(y)).sum(-1).to(y.dtype)

    def _sizes(self, y: Tensor) -> Tensor:
        if y.shape[-1:] != self.groups.shape:
            raise ValueError(f"groups names {len(self.groups)} coordinates: there are {y.shape[-1]}.")
        count = int(self.groups.max()) + 1
        # In float64: the squares of a float32 may under- or overflow.
        wide = y.double()
        squares = wide.new_zeros(*y.shape[:-1], count).index_add(-1, self.groups, wide.square())
        alive = squares > 0
        return torch.where(alive, torch.where(alive, squares, torch.ones_like(squares)).sqrt(), squares)


@dataclass(frozen=True, eq=False)
class Box(Prox):
    """``lower <= y <= upper``: numbers, or one for each coordinate."""

    lower: Setting = 0.0
    upper: Setting = 1.0
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            if not isinstance(bound, Tensor | Real):
                raise TypeError(f"{name} is {bound!r}: a number or a tensor is needed, such as torch.as_tensor(bound).")
        low, high = on_host(self.lower).detach(), on_host(self.upper).detach()
        if not bool(innermost((low <= high) & (low < torch.inf) & (high > -torch.inf)).all()):
            raise ValueError(f"lower is {shown(self.lower)} and upper {shown(self.upper)}: the box is empty.")

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        # By choices, not clamps: a clamp halves the derivative on the boundary.
        low, high = (_bound(fitting(*bound, y), y) for bound in (("lower", self.lower), ("upper", self.upper)))
        return torch.where(y < low, low, torch.where(y > high, high, y))

    def value(self, y: Tensor) -> Tensor:
        slack = 1e-6 if y.dtype == torch.float32 else 1e-12
        fitting("lower", self.lower, y), fitting("upper", self.upper, y)
        inside = ((y >= self.lower - slack) & (y <= self.upper + slack)).all(-1)
        return _indicator(inside, y)


@dataclass(frozen=True, eq=False)
class NonNegative(Prox):
    """``y >= 0``."""

    separable: ClassVar[bool] = True

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        return torch.where(y <= 0, torch.zeros_like(y), y)  # of NaN it is NaN

    def value(self, y: Tensor) -> Tensor:
        return _indicator((y >= 0).all(-1), y)


@dataclass(frozen=True, eq=False)
class Simplex(Prox):
    """``y >= 0, sum y = total`` (Held, Wolfe, Crowder 1974; by sorting)."""

    total: Setting = 1.0
    not_negative: ClassVar[tuple[str, ...]] = ("total",)

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        # Moving all coordinates by one number changes nothing, and keeps what is compared small.
        total = of_problem("total", self.total, y)
        y = y - y.detach().amax(-1, keepdim=True)
        with torch.no_grad():
            ordered = y.sort(-1, descending=True).values
            count = torch.arange(1, y.shape[-1] + 1, device=y.device)
            kept = (ordered * count > ordered.cumsum(-1) - total).sum(-1, keepdim=True).clamp_min(1)
            support = ~(y < ordered.gather(-1, kept - 1))  # of NaN it is NaN
        inside = torch.where(support, y, torch.zeros_like(y))
        shift = (inside.sum(-1, keepdim=True) - total) / support.sum(-1, keepdim=True)
        return torch.where(support, y - shift, torch.zeros_like(y))

    def value(self, y: Tensor) -> Tensor:
        total = _bound(of_problem("total", self.total, y), y)
        slack = (1e-5 if y.dtype == torch.float32 else 1e-10) * (1 + total)
        inside = ((y >= -slack) & ((y.sum(-1, keepdim=True) - total).abs() <= slack)).all(-1)
        return _indicator(inside, y)


@dataclass(frozen=True, eq=False)
class Ball(Prox):
    """Base of the balls: all that is no farther from zero than ``radius``, in a norm that a subclass knows."""

    radius: Setting = 1.0
    not_negative: ClassVar[tuple[str, ...]] = ("radius",)


@dataclass(frozen=True, eq=False)
class L2Ball(Ball):
    """``||y|| <= radius``."""

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        radius = of_problem("radius", self.radius, y)
        outside = self._size(y.detach()) > radius
        safe = torch.where(outside, y, torch.ones_like(y))
        return torch.where(outside, (radius / self._size(safe)).to(y.dtype) * y, y)

    def value(self, y: Tensor) -> Tensor:
        inside = (self._size(y) <= of_problem("radius", self.radius, y) * (1 + 1e-6)).squeeze(-1)
        return _indicator(inside, y)

    def _size(self, y: Tensor) -> Tensor:
        # In float64: the squares of a float32 may under- or overflow.
        sizes: Tensor = torch.linalg.vector_norm(y.double(), dim=-1, keepdim=True)
        return sizes


def _bound(value: Setting, like: Tensor) -> Tensor:
    """A setting as a tensor like that one; a number is made on the device and not copied to it."""
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def soft_threshold(y: Tensor, threshold: Setting) -> Tensor:
    """``sign(y) max(|y| - threshold, 0)``"""
    return torch.where(y.abs() <= threshold, torch.zeros_like(y), y - y.sign() * threshold)  # of NaN it is NaN


def per_problem(step: Setting, y: Tensor) -> Setting:
    """A step for each problem, ready to multiply vectors."""
    return (
        step.to(y.dtype).unsqueeze(-1)
        if isinstance(step, Tensor) and step.dim() == y.dim() - 1 and step.dim()
        else step
    )


def fitting(name: str, setting: Setting, y: Tensor) -> Setting:
    """The setting, which broadcasts to vectors ``y [*batch, n]``.

    Raises:
        ValueError: it does not.
    """
    shape = setting.shape if isinstance(setting, Tensor) else ()
    if not broadcasts_to(shape, y.shape):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, and the params are vectors of shape {tuple(y.shape)}, flattened and one "
            "for each problem: a number is needed, one for each coordinate [n], or one for each problem [T, 1]. For a "
            f"leaf that is a matrix write {name}.flatten(); for several leaves give a tree of prox, one for each."
        )
    return setting


def of_problem(name: str, setting: Setting, y: Tensor) -> Setting:
    """The setting, one number for each of the vectors ``y [*batch, n]``.

    Raises:
        ValueError: it is another one for each coordinate, or does not broadcast.
    """
    if isinstance(setting, Tensor) and setting.dim() and setting.shape[-1] != 1:
        raise ValueError(
            f"{name} has shape {tuple(setting.shape)}: a number is needed, or one for each problem, [T, 1], of which "
            "all coordinates are held to one."
        )
    return fitting(name, setting, y)


def check_not_negative(**settings: Setting) -> None:
    """Refuse settings that are no numbers, or negative, naming them."""
    for name, value in settings.items():
        check_number_or_tensor(name, value)
        if not bool((innermost(on_host(value)) >= 0).all()):
            raise ValueError(f"{name} is {shown(value)}: it cannot be negative.")


def _indicator(inside: Tensor, y: Tensor) -> Tensor:
    """Zero inside, infinite outside, in the dtype of the point."""
    return torch.where(inside, 0.0, torch.inf).to(y.dtype)
