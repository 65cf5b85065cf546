"""One solve without derivatives, as its caller hears of it: solved, measured, looked at, told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..inner.minimize import InnerSolver
from ..solution import Solution, Throw, settle

Found = Solution[Tensor]


@dataclass(frozen=True)
class Search:
    """How a problem is solved, and how a failure is told.

    Attributes:
        method: from a problem to what a solver found; `InnerSolver.minimize` or `RootSolver.find`.
        throw: as in `argmin`.
        what: what has failed, as a message says it.
        advice: what to try; or what says it, from the problem and what was found, where that failed.
        fallback: the solver of ``throw="fallback"``, where the first failed.
        look: gives what was found its last stats, from the problem and what was found; None: nothing is missing.
        own_stats: names of stats that the solver knows better than they can be measured.
    """

    method: Callable[[Any], Found]
    throw: Throw
    what: str
    advice: str | Callable[[Any, Found], str]
    fallback: InnerSolver | None = None
    look: Callable[[Any, Found], Found] | None = None
    own_stats: tuple[str, ...] = ()

    def __call__(self, problem: Any, measure: Callable[[Found], Found]) -> Found:
        """Solve ``problem``; ``measure`` puts the norm of the residual into the stats.

        Raises:
            SolveError: as ``throw`` says.
        """
        solved = self.method(problem)
        found = measure(solved).with_stats(**{name: solved.stats[name] for name in self.own_stats})
        if self.throw == "fallback" and self.fallback is not None and not found.result.ok:
            found = measure(self.fallback.minimize(problem))
            found = replace(found, recovered=(type(self.fallback).__name__,))
        if self.look is not None:
            found = self.look(problem, found)
        if self.throw != "ignore":
            advice = partial(self.advice, problem, found) if callable(self.advice) else self.advice
            settle(found, self.throw, self.what, advice, start=None if self.own_stats else problem.first_residual)
        return found
