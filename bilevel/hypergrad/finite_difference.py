"""Hessian-free: the mixed derivative by a central difference of gradients, as in DARTS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields, check_step_size
from ..recording import recording
from ..solution import Result, Solution, make_codes, marked, settle
from ..tree import dot, norm, scale, wide
from .base import Point, Pulled


@dataclass(frozen=True)
class FiniteDifference:
    """``-lr d_xy g grad_y f`` by ``lr (grad_x g(y - h v) - grad_x g(y + h v)) / 2h``, v the outer gradient.

    DARTS (Liu, Simonyan, Yang 2019): the inverse Hessian is replaced by ``lr I``, as by `OneStep`, and the mixed
    derivative by a difference, so that no second derivative is ever taken: for models whose double backward is slow or
    missing. Two gradients; error of the difference O(h^2), and the bias of `OneStep`.

    A move that is lost in the rounding of the params, or a difference in that of the gradients, is a failed solve, as
    ``throw`` says.

    Args:
        lr: step size of the inner optimizer.
        epsilon: ``h ||v||``, how far the params are moved; None: the cube root of their precision, times their norm,
            where rounding and curvature cost about the same.
    """

    lr: float = 1.0
    epsilon: float | None = None
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_step_size(self.lr, advice="This method makes one step")
        check_epsilon(self.epsilon)

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        return Pulled(mixed_difference(point, self.lr * cotangent, self.epsilon, "FiniteDifference"))


def mixed_difference(point: Point, u: Tensor, epsilon: float | None, method: str) -> list[Tensor | None]:
    """``-(d_x grad_y g)^T u`` by a central difference of ``grad_x g``; each problem moves by ``epsilon``.

    Args:
        method: on whose behalf; what a failure is told of.
    """
    point.require_objective(method)
    ideal = _ideal_move(point)
    move = torch.full_like(ideal, epsilon) if epsilon is not None else ideal
    found, broken = _difference(point, u, move)
    if not recording() and _drowned(found):
        # Rounding or no influence? Where a longer move says the same, the difference is what it is.
        further, _ = _difference(point, u, torch.maximum(4 * move, ideal))
        broken = torch.full_like(broken, 1.0) if _disagree(found, further) else broken
    codes = marked(make_codes(Result.CONVERGED, broken), broken > MOST_BROKEN, Result.STAGNATED)
    stats = {"result": codes, "residual_norm": broken, "num_steps": torch.full_like(codes, 2, dtype=torch.int64)}
    settle(Solution(u, stats), point.throw, f"The difference of {method} is lost in rounding", ADVICE)
    return [None if part is None else part.value for part in found]


def check_epsilon(epsilon: float | None) -> None:
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: it must be positive, or None.")


ADVICE = (
    "The hypergradient is noise or zero: leave epsilon away or raise it, keep the params and the loss in float32 or "
    "float64, or use OneStep() or Implicit()"
)
MOST_BROKEN = 0.05
"""The part of a move that rounding may turn elsewhere, and of a difference that it may make up."""


@dataclass(frozen=True)
class _Part:
    """One hyperparameter's part of the hypergradient, and what the rounding of its gradients can make of it."""

    value: Tensor
    floor: Tensor


def _ideal_move(point: Point) -> Tensor:
    """``[*batch]``; of params that are zero, as in DARTS."""
    length = norm(point.raveler.ravel(point.params))
    return torch.where(length > 0, _precision(point) ** (1 / 3) * length, torch.full_like(length, 1e-2))


def _precision(point: Point) -> float:
    return max(torch.finfo(leaf.dtype).eps for leaf in point.params)


def _difference(point: Point, u: Tensor, move: Tensor) -> tuple[list[_Part | None], Tensor]:
    """The parts, and how much of each problem's move rounding has turned elsewhere, ``[*batch]``."""
    raveler, size = point.raveler, norm(u)
    unit = scale(torch.where(size > 0, 1 / size, torch.zeros_like(size)), u.double())
    base = raveler.ravel(point.params).double()
    sides = [raveler.unravel(base + scale(sign * move, unit)) for sign in (1, -1)]
    ahead, behind = (raveler.ravel(side).double() for side in sides)
    moved = (ahead - behind) / 2
    along = dot(moved, unit)
    turned = torch.where(along > 0, norm(moved - scale(along, unit)) / along, torch.full_like(along, torch.inf))
    weights = torch.where((size > 0) & (along > 0), size / (2 * along), torch.zeros_like(size))
    largest = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)  # taken out, lest a low precision overflows
    gradients = [point.loss_gradient(side, weights=weights / largest) for side in sides]
    parts: list[_Part | None] = []
    for a, b in zip(*gradients, strict=True):
        if a is None or b is None:
            parts.append(None)
            continue
        precision = max(torch.finfo(a.dtype).eps, _precision(point))
        heights = torch.stack([torch.linalg.vector_norm(wide(g)) for g in (a, b)])
        parts.append(_Part((largest * (wide(b) - wide(a))).to(a.dtype), precision * largest * heights.amax()))
    return parts, torch.where(size > 0, turned, torch.zeros_like(turned))


def _drowned(parts: list[_Part | None]) -> bool:
    """Whether rounding can be more than `MOST_BROKEN` of a part."""
    known = [part for part in parts if part is not None]
    return any(bool(torch.linalg.vector_norm(wide(part.value)) * MOST_BROKEN < part.floor) for part in known)


def _disagree(parts: list[_Part | None], others: list[_Part | None]) -> bool:
    for part, other in zip(parts, others, strict=True):
        if part is not None and other is not None:
            apart = torch.linalg.vector_norm(wide(part.value) - wide(other.value))
            if bool(apart > MOST_BROKEN * torch.linalg.vector_norm(wide(other.value))):
                return True
    return False
