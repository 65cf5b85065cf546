"""Hessian-free: the mixed derivative by a central difference of gradients, as in DARTS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..tree import norm, scale
from .base import Point, Pulled


@dataclass(frozen=True)
class FiniteDifference:
    """``-lr d_xy g grad_y f`` by ``lr (grad_x g(y - h v) - grad_x g(y + h v)) / 2h``, v the outer gradient.

    DARTS (Liu, Simonyan, Yang 2019): the inverse Hessian is replaced by ``lr I``, as by `OneStep`, and the mixed
    derivative by a difference, so that no second derivative is ever taken: for models whose double backward is slow or
    missing. Two gradients; error of the difference O(h^2), and the bias of `OneStep`.

    Args:
        lr: step size of the inner optimizer.
        epsilon: ``h ||v||``, how far the params are moved.
    """

    lr: float = 1.0
    epsilon: float = 1e-2
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("lr", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        return Pulled(mixed_difference(point, self.lr * cotangent, self.epsilon))


def mixed_difference(point: Point, u: Tensor, epsilon: float) -> list[Tensor | None]:
    """``-(d_x grad_y g)^T u`` by a central difference of ``grad_x g``; each problem moves by ``epsilon``."""
    point.require_objective("FiniteDifference and SAMA")
    size = norm(u)
    unit = scale(torch.where(size > 0, 1 / size, torch.zeros_like(size)), u)
    base, raveler = point.raveler.ravel(point.params), point.raveler
    ahead, behind = (
        point.loss_gradient(raveler.unravel(base + sign * epsilon * unit), weights=size / (2 * epsilon))
        for sign in (1, -1)
    )
    return [None if a is None or b is None else b - a for a, b in zip(ahead, behind, strict=True)]
