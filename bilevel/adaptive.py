"""Tolerances that follow the outer progress: loose while far, tight near the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_fields
from .hypergrad.implicit import Implicit
from .inner.lbfgs import LBFGS
from .linalg.cg import CG
from .linalg.operator import Operator
from .linalg.solve import LinearState, default_rtol
from .problem import Problem
from .solution import Solution


@dataclass(frozen=True)
class Adaptive:
    """One tolerance for the inner and the linear solve, driven by the outer loss (HOAG, Pedregosa 2016).

    An outer loop converges with inexact hypergradients if their errors are summable, and early ones need not be
    accurate. The tolerance shrinks in proportion to the progress of the outer loss, at least by ``slowest`` a step, and
    by ``fastest`` where the loss rose: a geometric sequence at the least, so summable. State is returned::

        tolerance = bl.Adaptive()
        for _ in range(50):
            fit = bl.argmin(inner, params, **tolerance.settings())
            loss = outer(fit.value)
            ...                                   # backward, outer step, warm start
            tolerance = tolerance.after(loss)

    Args:
        value: the tolerance now: of the inner solver ``gtol = value * scale``, of the linear one ``rtol = value``.
            Where float32 cannot reach it any more, the solvers of `settings` take their own default for that dtype.
        smallest: where it ends.
        scale: the inner gradient norm that counts as one, such as that at the start.
        slowest, fastest: factors in (0, 1), the largest and the smallest of a step.
    """

    value: float = 0.1
    smallest: float = 1e-8
    scale: float = 1.0
    slowest: float = 0.95
    fastest: float = 0.25
    previous: float | None = None
    first_progress: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.value < 1 or not 0 < self.smallest < 1:
            raise ValueError(f"value is {self.value} and smallest {self.smallest}: tolerances lie in (0, 1).")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}: it must be positive.")
        if not 0 < self.fastest <= self.slowest < 1:
            raise ValueError(f"fastest is {self.fastest} and slowest {self.slowest}: 0 < fastest <= slowest < 1.")

    @property
    def gtol(self) -> float:
        return self.value * self.scale

    @property
    def rtol(self) -> float:
        return self.value

    def settings(self) -> dict[str, Any]:
        """``solver`` and ``hypergrad`` for `argmin`: `LBFGS` and `CG` at this tolerance, or as the dtype allows."""
        if self.value > end_of(torch.float32):
            return {"solver": LBFGS(gtol=self.gtol), "hypergrad": Implicit(CG(rtol=self.rtol))}
        return {
            "solver": _ReachableLBFGS(gtol=self.gtol, value=self.value),
            "hypergrad": Implicit(_ReachableCG(rtol=self.rtol)),
        }

    def after(self, loss: float | Tensor) -> Adaptive:
        """The tolerance for the next outer step, given the outer loss of this one."""
        now = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self.previous is None or not math.isfinite(now):
            return replace(self, previous=now if math.isfinite(now) else self.previous)
        progress = self.previous - now
        first = self.first_progress if self.first_progress is not None else progress if progress > 0 else None
        factor = self.fastest
        if progress > 0 and first:
            wanted = min(1.0, progress / first) * 0.1
            factor = min(self.slowest, max(self.fastest, wanted / self.value))
        return replace(self, value=max(self.smallest, self.value * factor), previous=now, first_progress=first)


def end_of(dtype: torch.dtype) -> float:
    """The least relative tolerance of an inner gradient that can be reached: rounding leaves a thousandth of one."""
    return 1e3 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class _ReachableLBFGS(LBFGS):
    """`LBFGS` with its own default where ``value``, its tolerance relative to the scale, is beyond the dtype."""

    value: float = 0.0

    def minimize(self, problem: Problem) -> Solution:
        reached = self.value > end_of(problem.start.g.dtype)
        return LBFGS(self.max_steps, self.gtol if reached else None, self.history).minimize(problem)


@dataclass(frozen=True)
class _ReachableCG(CG):
    """`CG` at ``rtol``, or at its own default where that is looser."""

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution:
        own = default_rtol(b.dtype)
        return CG(rtol=own if self.rtol is None else max(self.rtol, own)).solve(operator, b, state)
