"""What an objective gave at its solution: held against what it gives there later, when it is evaluated again.

A derivative that evaluates the objective anew (a second backward pass, ``create_graph``, products by `torch.func`,
differences, penalties, steps run again from a checkpoint) is right only where it is still the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem, RootProblem
from ..recording import recording
from ..solution import ObjectiveChangedError
from ..tree import norm

ROUNDING = 200.0
"""Rounding errors by which two evaluations of one function may differ, in other kernels or with other threads."""


def changed(what: str) -> ObjectiveChangedError:
    """The error that says so."""
    return ObjectiveChangedError(
        f"The {what} has changed since it was solved: evaluated again at the solution, it gives another value, so its "
        "hypergradient would be that of another problem. Either it captured a variable that was assigned anew (that of "
        "a loop: bind it as a default argument, or pass it as one of args), or data were changed in place (pass a "
        "copy, or differentiate before), or it is random (dropout, noise, a batch drawn inside: fix what is drawn)."
    )


@dataclass(frozen=True)
class Seen:
    """The losses (None for a system) and the residual at the solution, and the sizes of both at the start.

    Attributes:
        loss, loss_scale: ``[*batch]`` float64. residual: flat ``[*batch, n]``; residual_scale: ``[*batch]`` float64.
    """

    loss: Tensor | None
    residual: Tensor
    loss_scale: Tensor
    residual_scale: Tensor

    @classmethod
    def of(cls, problem: Problem | RootProblem, loss: Tensor | None, residual: Tensor) -> Seen:
        """What a `Problem` or `RootProblem` gave at its solution."""
        scale = norm(problem.first_residual)
        if loss is None:
            return cls(None, residual, norm(residual), scale)
        assert isinstance(problem, Problem)
        loss = loss.detach().double()
        return cls(loss, residual, torch.maximum(loss.abs(), problem.start.f.abs()), scale)

    def check(self, loss: Tensor | None, residual: Tensor) -> None:
        """Hold an evaluation of both against what was seen.

        Raises:
            ObjectiveChangedError: they differ by more than rounding.
        """
        if residual.shape != self.residual.shape or recording():
            return
        allowed = self._allowed(self.residual_scale) + 10 * norm(self.residual)
        differs = norm(residual.detach() - self.residual) > allowed
        if self.loss is None or loss is None:
            if bool(differs.any()):
                raise changed("system")
        elif bool((differs & self._differs(loss)).any()):
            raise changed("objective")

    def check_loss(self, loss: Tensor) -> None:
        """The same of the losses alone."""
        known = self.loss is not None and loss.shape == self.loss.shape and not recording()
        if known and bool(self._differs(loss).any()):
            raise changed("objective")

    def check_apart(self, apart: Tensor) -> None:
        """The same, given by how much the sum of the losses was another one in later evaluations, 0-d."""
        if not recording() and not bool(apart <= self._allowed(self.loss_scale).sum()):
            raise changed("objective")

    def _differs(self, loss: Tensor) -> Tensor:
        assert self.loss is not None
        return ~((loss.detach().double() - self.loss).abs() <= self._allowed(self.loss_scale))

    def _allowed(self, scale: Tensor) -> Tensor:
        return ROUNDING * torch.finfo(self.residual.dtype).eps * scale
