"""One solve without derivatives, as its caller hears of it: solved, measured, looked at, told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..inner.minimize import InnerSolver
from ..inner.outcome import suspicious
from ..recording import recording
from ..solution import Result, Solution, Throw, settle

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
        look: looks closer at what is `suspicious`, from the problem and what was found; None: nothing does.
        complete: gives whatever was found its last stats, likewise; None: nothing is missing.
        own_stats: names of stats that the solver knows better than they can be measured.
    """

    method: Callable[[Any], Found]
    throw: Throw
    what: str
    advice: str | Callable[[Any, Found], str]
    fallback: InnerSolver | None = None
    look: Callable[[Any, Found], Found] | None = None
    complete: Callable[[Any, Found], Found] | None = None
    own_stats: tuple[str, ...] = ()

    def __call__(self, problem: Any, measure: Callable[[Found], Found]) -> Found:
        """Solve ``problem``; ``measure`` puts the norm of the residual into the stats.

        Raises:
            SolveError: as ``throw`` says.
        """
        solved = self.method(problem)
        found = measure(solved).with_stats(**{name: solved.stats[name] for name in self.own_stats})
        if self.throw == "ignore" or recording():
            return self._completed(problem, found)
        ok, odd = self._seen(found)
        if not ok:
            problem.refuse_nonfinite()
        if not ok and self.throw == "fallback" and self.fallback is not None:
            found = measure(self.fallback.minimize(problem))
            found = replace(found, recovered=(type(self.fallback).__name__,))
            ok, odd = self._seen(found)
        if self.look is not None and odd:
            found = self.look(problem, found)
        found = self._completed(problem, found)
        if odd or not ok or self.complete is not None:
            advice = partial(self.advice, problem, found) if callable(self.advice) else self.advice
            settle(found, self.throw, self.what, advice, start=None if self.own_stats else problem.first_residual)
        return found

    def _completed(self, problem: Any, found: Found) -> Found:
        return found if self.complete is None else self.complete(problem, found)

    def _seen(self, found: Found) -> tuple[bool, bool]:
        """Whether all problems are well, and whether one is odd enough to look closer: one look at the device."""
        failed = (found.stats["result"] > int(Result.STEPS_DONE)).any()
        seen = int(2 * failed + suspicious(found).any())
        return seen < 2, seen % 2 == 1
