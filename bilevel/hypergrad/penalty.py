"""The value-function penalty: two inner solves in place of a linear one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.solve import normalise
from ..solution import Result, Solution, make_codes, settle
from ..tree import norm
from .base import Point, Pulled

NUDGE_ADVICE = (
    "The params moved by no more than their precision, so the hypergradient is noise or zero: lower strength, scale "
    "the inner loss down, use a more accurate solver, or float64"
)


@dataclass(frozen=True)
class Penalty:
    """``strength (grad_x g(y_s, x) - grad_x g(y, x))`` with ``y_s = argmin g + f / strength``: first derivatives only.

    The gradient of ``min_y f + strength (g - min g)``, the penalty of F2SA (Kwon et al. 2023) and BOME (Liu, Ye et al.
    2022), for an outer loss that is linear around the solution; also known as equilibrium propagation (Scellier and
    Bengio 2017). For models without second derivatives, or where the inner solver is cheap when warm. The inner problem
    is solved again with the user's solver, once or twice.

    Args:
        strength: in units of the norm of the outer gradient: the params move by about ``1 / (strength curvature)``.
            Error O(1/strength), or O(1/strength^2) symmetric; the solver has to be more accurate than that.
        symmetric: nudge both ways and take the difference: two solves, one order more.

    A nudge that moves the params by no more than their rounding is a failed solve, as ``throw`` says.
    """

    strength: float = 100.0
    symmetric: bool = True
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}: it must be positive.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        point.require_objective("Penalty")
        unit, length = normalise(cotangent)
        ahead = self._gradient(point, unit, length, 1.0)
        if self.symmetric:
            behind = self._gradient(point, unit, length, -1.0)
            pairs = zip(ahead, behind, strict=True)
            return Pulled([None if a is None or b is None else (a - b) / 2 for a, b in pairs])
        base = point.loss_gradient(point.params, weights=length * self.strength)
        return Pulled([None if a is None or b is None else a - b for a, b in zip(ahead, base, strict=True)])

    def _gradient(self, point: Point, unit: Tensor, length: Tensor, sign: float) -> list[Tensor | None]:
        raveler = point.raveler

        def nudged(params: list[Tensor]) -> Tensor:
            loss = point.statement.closure(params, point.hparams)
            return loss + sign / self.strength * (raveler.ravel(params) * unit).sum(-1)

        found = point.solve(nudged, "The nudged inner solve of Penalty")
        base = raveler.ravel(point.params)
        rounding = 10 * torch.finfo(base.dtype).eps * norm(base)
        moved = norm(found - base)
        lost = (length > 0) & (moved <= rounding)
        codes = torch.where(lost, make_codes(Result.STAGNATED, moved), make_codes(Result.CONVERGED, moved))
        stats = {"result": codes, "residual_norm": moved, "num_steps": torch.ones_like(codes, dtype=torch.int64)}
        settle(Solution(found, stats), point.throw, "The nudge of Penalty is lost in rounding", NUDGE_ADVICE)
        return point.loss_gradient(raveler.unravel(found), weights=length * self.strength)
