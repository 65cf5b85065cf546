"""One solve without derivatives, as its caller hears of it: solved, measured, looked at, told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

from torch import Tensor

from .._torch import NoSecondDerivativeError
from ..inner.minimize import InnerSolver
from ..inner.outcome import inner_advice, suspicious
from ..notices import Place, tell
from ..problem import Posed, Problem
from ..recording import free_looks, recording
from ..solution import Result, Solution, SolveError, SolveWarning, Throw, settle

Found = Solution[Tensor]


class Later:
    """What a solve may have to tell, where a look is not free: looked at with its backward pass, by one look for both.

    Of a solve that has none it is looked at, and told as a warning, when the graph of the solution is dropped.

    Attributes:
        flags: 0-d, of `Search`; 0: there is nothing to tell. told: tells it; gives what was found, looked at closer.
        codes: the results that the user has, ``[*batch]``, which are put right.
    """

    def __init__(self, flags: Tensor, told: Callable[[int], Found], place: Place | None):
        self.flags, self.told, self.place = flags, told, place
        self.codes: Tensor | None = None

    def look(self, other: Tensor | None = None) -> bool:
        """Tell what there is to tell; and whether ``other``, 0-d bool, is true, by the same look.

        Raises:
            SolveError, NonFiniteError: the solve was not finite.
        """
        flags, self.place = self.flags, None
        seen = int(flags if other is None else 4 * other + flags)
        if seen % 4:
            found = self.told(seen % 4)
            if self.codes is not None:
                self.codes.copy_(found.stats["result"])
        return seen >= 4

    def __del__(self) -> None:
        if self.place is None or sys.is_finalizing() or recording():
            return
        place = self.place
        try:
            self.look()
        except Exception as error:  # it cannot be raised here
            with suppress(Exception):
                tell(str(error), SolveWarning, place=place)


@dataclass(frozen=True)
class Search(Generic[Posed]):
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
        hides: what a solve that went well may hide, in words, likewise; empty: nothing was seen. None: nothing looks.
    """

    method: Callable[[Posed], Found]
    throw: Throw
    what: str
    advice: str | Mapping[Result | None, str] | Callable[[Posed, Found], str]
    fallback: InnerSolver | None = None
    look: Callable[[Posed, Found], Found] | None = None
    complete: Callable[[Posed, Found], Found] | None = None
    own_stats: tuple[str, ...] = ()
    hides: Callable[[Posed, Found], str] | None = None

    @classmethod
    def by(cls, solver: InnerSolver, throw: Throw, what: str, **closer: Any) -> Search[Problem]:
        """That of a solver whose failures `inner_advice` explains; ``closer``: the other attributes."""
        return Search(solver.minimize, throw, what, partial(inner_advice, solver=solver), **closer)

    def __call__(
        self,
        problem: Posed,
        measure: Callable[[Found], Found],
        postpone: Callable[[Later], None] | None = None,
        place: Place | None = None,
    ) -> Found:
        """Solve ``problem``; ``measure`` puts the norm of the residual into the stats.

        Args:
            postpone: takes what is to be looked at with the backward pass; None: it is looked at here.
            place: the user's line, which what is told later is told at.

        Raises:
            SolveError: as ``throw`` says.
        """
        solved = self.method(problem)
        found = measure(solved).with_stats(**{name: solved.stats[name] for name in self.own_stats})
        if self.throw == "ignore" or recording():
            return self._completed(problem, found)
        flags = _flags(found)
        if postpone and place and self.throw == "warn" and self.complete is None and not free_looks(flags):
            postpone(Later(flags, partial(self._heard, problem, found, place=place), place))
            return found
        seen = int(flags)
        if seen >= FAILED:
            problem.refuse_nonfinite()
        if seen >= FAILED and self.throw == "fallback" and self.fallback is not None:
            assert isinstance(problem, Problem)
            found = measure(self.fallback.minimize(problem))
            found = replace(found, recovered=(type(self.fallback).__name__,))
            seen = int(_flags(found))
        found = self._heard(problem, found, seen)
        if self.hides is not None and free_looks(flags):
            hidden = ""
            with suppress(NoSecondDerivativeError):  # without them nothing more can be seen
                hidden = self.hides(problem, found)
            self._tell(hidden, found)
        return found

    def _tell(self, hidden: str, found: Found) -> None:
        """What a solve that went well hides, as ``throw`` says."""
        if not hidden:
            return
        message = f"{self.what} went well by its own measures, which do not see this. {hidden}"
        if self.throw == "raise":
            raise SolveError(message, found)
        tell(message, SolveWarning)

    def _heard(self, problem: Posed, found: Found, seen: int, place: Place | None = None) -> Found:
        """Look closer where that is due, and let a failure be heard."""
        if place is not None and seen >= FAILED:
            problem.refuse_nonfinite()
        if self.look is not None and seen % FAILED:
            with suppress(NoSecondDerivativeError):
                found = self.look(problem, found)
        found = self._completed(problem, found)
        if seen or self.complete is not None:
            advice = partial(self.advice, problem, found) if callable(self.advice) else self.advice
            start = None if self.own_stats else problem.first_residual
            settle(found, self.throw, self.what, advice, start=start, place=place)
        return found

    def _completed(self, problem: Posed, found: Found) -> Found:
        return found if self.complete is None else self.complete(problem, found)


FAILED = 2
"""Among the flags: a problem failed; 1: one is odd enough to look closer."""


def _flags(found: Found) -> Tensor:
    """Both as one number, 0-d: one look at the device."""
    failed = (found.stats["result"] > int(Result.STEPS_DONE)).any()
    return FAILED * failed + suspicious(found).any()
