"""What all inner solvers share: their protocol and their stopping rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.solve import chosen, stop_now
from ..problem import Evaluation, Problem
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm


class InnerSolver(Protocol):
    """Minimises a `Problem`. Frozen settings only: the same object twice gives the same answer."""

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """The solution's ``value`` is flat, ``[*batch, n]``; its stats lack what `argmin` measures at the end."""
        ...


class Unasked(int):
    """A number of steps that is a default, and so no order of the user's; it equals that number."""


DEFAULT_STEPS = Unasked(100)


def check_settings(*, max_steps: int, gtol: float | None) -> None:
    """Refuse limits and tolerances that mean nothing, naming the argument."""
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")
    if gtol is not None and not gtol >= 0:
        raise ValueError(f"gtol is {gtol}: a tolerance on the gradient norm cannot be negative.")


def check_tolerance(*, max_steps: int, tol: float | None) -> None:
    """The same for solvers of systems."""
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol is {tol}: a tolerance on the residual norm cannot be negative.")


@dataclass
class Ends:
    """How the problems of a batch stand: ``active`` ones go on, the others are frozen, and ``codes`` say why.

    Attributes:
        codes, steps, active: of the batch shape; the result, the steps made, and whether to go on.
    """

    codes: Tensor
    steps: Tensor
    active: Tensor

    def end(self, where: Tensor, result: Result) -> None:
        """End the active problems of a mask with this result."""
        self.codes = marked(self.codes, self.active & where, result)
        self.active = self.active & ~where

    def stop(self) -> None:
        """End all active problems, as a callback wishes: what was made is what was ordered."""
        self.end(self.active, Result.STEPS_DONE)

    def mark(self, where: Tensor, result: Result) -> None:
        """Give the problems of a mask this result, whether they have ended or not."""
        self.codes = marked(self.codes, where, result)

    def count(self) -> None:
        """The active problems have made one more step."""
        self.steps = self.steps + self.active

    def done(self, step: int) -> bool:
        """Whether all have ended, before this step: where a look is not free, now and then."""
        return stop_now(self.active, step)

    def solution(self, y: Tensor, **stats: Tensor) -> Solution[Tensor]:
        """What a solver gives back where it ends at ``y [*batch, n]``, with ``stats`` of its own ``[*batch]``."""
        return Solution(y, {"num_steps": self.steps, "result": self.codes, **stats})


@dataclass
class Progress(Ends):
    """The stopping rule of minimisers, problem by problem."""

    gtol: float | Tensor | None

    @classmethod
    def begin(cls, at: Evaluation, gtol: float | Tensor | None) -> Progress:
        codes = make_codes(Result.STEPS_DONE if gtol is None else Result.MAX_STEPS, at.f)
        state = cls(codes, torch.zeros_like(codes, dtype=torch.int64), torch.ones_like(codes, dtype=torch.bool), gtol)
        state.look(at)
        return state

    def look(self, at: Evaluation) -> None:
        """End the problems whose gradient is small enough, or that are not finite."""
        size = norm(at.g.detach())
        if self.gtol is not None:
            self.end(size <= self.gtol, Result.CONVERGED)
        self.end(~((size < torch.inf) & (at.f.abs() < torch.inf)), Result.NONFINITE)

    def done(self, step: int) -> bool:
        """The same; without a tolerance it does not ask."""
        return self.gtol is not None and super().done(step)


def choose(where: Tensor, new: Evaluation, old: Evaluation) -> Evaluation:
    """Take ``new`` in the problems of the mask, ``old`` in the others."""
    return Evaluation(chosen(where, new.y, old.y), torch.where(where, new.f, old.f), chosen(where, new.g, old.g))
