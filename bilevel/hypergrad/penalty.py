"""The value-function penalty: two inner solves in place of a linear one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.solve import normalise
from ..problem import linearize_objective
from ..recording import recording
from ..solution import Result, Solution, make_codes, marked, settle
from ..tree import norm
from .base import Point, Pulled

NUDGE_ADVICE = (
    "The params moved by no more than their precision, so the hypergradient is noise or zero: lower strength, give the "
    "inner solver a gtol far below 1 / strength, scale the inner loss down, or use float64"
)
INEXACT_ADVICE = (
    "The hypergradient is as inexact as that: give the inner solver a gtol of 0.01 / strength or less, or more steps, "
    "or lower strength"
)
BENT_ADVICE = (
    "The number is the part of it that is missing half-way; of a linear response it is none. The hypergradient is off "
    "by as much or more: raise strength, tenfold for instance, and the accuracy of the inner solver with it (gtol)"
)
BENT = 0.02
"""Part of the nudge that may be missing at half of the response, where it is not linear."""
INEXACT = 0.02
"""Part of the nudge that a nudged solve may leave unanswered."""
TRIES = 5
"""Runs of the solver towards one nudge, as long as they help: a fixed number of steps is seldom enough."""


@dataclass(frozen=True)
class Penalty:
    """``strength (grad_x g(y_s, x) - grad_x g(y, x))`` with ``y_s = argmin g + f / strength``: first derivatives only.

    The gradient of ``min_y f + strength (g - min g)``, the penalty of F2SA (Kwon et al. 2023) and BOME (Liu, Ye et al.
    2022), for an outer loss that is linear around the solution; also known as equilibrium propagation (Scellier and
    Bengio 2017). For models without second derivatives, or where the inner solver is cheap when warm. The inner problem
    is solved again with the user's solver, once or twice, or more often where it makes few steps.

    Args:
        strength: in units of the norm of the outer gradient: the params move by about ``1 / (strength curvature)``.
            Error O(1/strength), or O(1/strength^2) symmetric; the solver has to be more accurate than that.
        symmetric: nudge both ways and take the difference: two solves, one order more.

    A nudge that moves the params by no more than their rounding is a failed solve, as ``throw`` says, and so are one
    that the inner solver does not answer, since the gradient that it leaves is compared with the nudge, and one so
    large that the params do not answer in proportion. A solver that makes few steps is called a few times. The nudge is
    given to the solution at hand, as if that were exact.
    """

    strength: float = 100.0
    symmetric: bool = True
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}: it must be positive.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        point.require_objective("Penalty")
        unit, length = normalise(cotangent)
        here = _residual(point)
        ahead, gained = self._gradient(point, here, unit, length, 1.0)
        if self.symmetric:
            behind, lost = self._gradient(point, here, unit, length, -1.0)
            self._look(point, unit, length, (gained - lost) / 2)
            pairs = zip(ahead, behind, strict=True)
            return Pulled([None if a is None or b is None else (a - b) / 2 for a, b in pairs])
        self._look(point, unit, length, gained)
        base = point.loss_gradient(point.params, weights=length * self.strength)
        return Pulled([None if a is None or b is None else a - b for a, b in zip(ahead, base, strict=True)])

    def _look(self, point: Point, unit: Tensor, length: Tensor, gained: Tensor) -> None:
        """Tell a nudge to which the response is not linear: half-way, half of it must be there; NaN is told already."""
        if recording():
            return
        missing = norm(gained * self.strength + unit / 2) * 2
        _tell(point, (length > 0) & (missing > BENT), missing, "The nudge of Penalty is too large", BENT_ADVICE)

    def _gradient(
        self, point: Point, here: Tensor, unit: Tensor, length: Tensor, sign: float
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradient where the nudge has moved the params, and the inner gradient that was gained half-way.

        ``here``: the inner gradient at the point.
        """
        raveler = point.raveler
        base = raveler.ravel(point.params)
        found, left = self._nudged(point, base, sign / self.strength * unit - here)
        rounding = 10 * torch.finfo(base.dtype).eps * norm(base)
        moved = norm(found - base)
        lost = (length > 0) & (moved <= rounding)
        _tell(point, lost, moved, "The nudge of Penalty is lost in rounding", NUDGE_ADVICE)
        inexact = (length > 0) & ~lost & ~(left * self.strength <= INEXACT)
        _tell(point, inexact, left, "The nudged inner solve of Penalty is inexact", INEXACT_ADVICE)
        half = replace(point, params=raveler.unravel((base + found) / 2), _at=None)
        gained = torch.zeros_like(base) if recording() else _residual(half) - here
        gained = gained.masked_fill((lost | inexact).unsqueeze(-1), torch.nan)
        return point.loss_gradient(raveler.unravel(found), weights=length * self.strength), gained

    def _nudged(self, point: Point, base: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The minimum under a linear term, and the norm of the gradient that is left."""
        raveler = point.raveler

        def nudged(params: list[Tensor]) -> Tensor:
            nudged: Tensor = point.statement.closure(params, point.hparams) + (raveler.ravel(params) * slope).sum(-1)
            return nudged

        at, best = point, torch.full(base.shape[:-1], torch.inf, dtype=torch.float64, device=base.device)
        found = base
        for _ in range(TRIES):
            tried = at.solve(nudged, "The nudged inner solve of Penalty")
            at = replace(point, params=raveler.unravel(tried), _at=None)
            left = norm(_residual(at) + slope)
            better = left < best
            helped = left < 0.7 * best
            found, best = torch.where(better.unsqueeze(-1), tried, found), torch.where(better, left, best)
            if recording() or not bool((helped & (best * self.strength > INEXACT)).any()):
                break
        return found, best


def _residual(point: Point) -> Tensor:
    """The gradient of the inner loss, flat."""
    at = linearize_objective(
        lambda params: point.statement.closure(params, point.hparams), point.params, create_graph=False
    )
    return point.raveler.ravel([r.detach() for r in at.residual])


def _tell(point: Point, failed: Tensor, size: Tensor, what: str, advice: str) -> None:
    codes = marked(make_codes(Result.CONVERGED, size), failed, Result.STAGNATED)
    stats = {"result": codes, "residual_norm": size, "num_steps": torch.ones_like(codes, dtype=torch.int64)}
    settle(Solution(None, stats), point.throw, what, advice)
