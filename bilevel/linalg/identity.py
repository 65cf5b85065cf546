"""The identity in place of the inverse Hessian: the first-order hypergradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_fields
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm
from .operator import Operator
from .solve import LinearState, report


@dataclass(frozen=True)
class Identity:
    """``x = b * factor``, at no product at all (the T1-T2 method of Luketina et al. 2016).

    An approximation that is asked for by name: `Result.STEPS_DONE`, and ``residual_norm`` says how far off it
    is only with ``measure=True``, at one product; otherwise it is NaN.

    Args:
        factor: ``1/mu`` where the Hessian is about ``mu I``, such as ``1/strength`` under a strong proximal term.
        measure: compute the true residual.
    """

    factor: float = 1.0
    measure: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not abs(self.factor) > 0:
            raise ValueError(
                f"factor is {self.factor}: it stands for 1 / curvature, which is a number other than zero."
            )

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """``x = b * factor``; see `LinearSolver`."""
        x, length = b * self.factor, norm(b)
        residual = norm(b - operator.matvec(x)) if self.measure else torch.full_like(length, torch.nan)
        codes = marked(make_codes(Result.STEPS_DONE, length), ~torch.isfinite(length), Result.NONFINITE)
        return report(x, codes, torch.zeros_like(length, dtype=torch.int64), residual, length, LinearState(x))
