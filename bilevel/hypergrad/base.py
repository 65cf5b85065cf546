"""What all hypergradient methods share: what they are given at the solution, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._torch import pytree, refuses_hooks, saved_tensors_hooks
from ..inner.minimize import InnerSolver
from ..inner.outcome import inner_advice
from ..linalg.solve import LinearState
from ..problem import Linearization, Objective, Problem
from ..solution import Solution, Throw, settle
from ..tree import Raveler, Tree, leaves
from .seen import Seen
from .statement import Statement, free_leaves, raveler_of


@dataclass
class Point:
    """A solved problem as a hypergradient method sees it: the solution, the hyperparameters, ways to look again.

    Attributes:
        params: leaves of the solution, detached. hparams: the tensors that the problem reached, detached.
        found: the inner solve; its ``stats`` have the batch shape.
        minimize: solves an objective of the leaves, ``[*batch]`` losses, from ``params``, with the inner solver.
        seen: what the problem gave there when it was solved.
    """

    statement: Statement
    params: list[Tensor]
    hparams: list[Tensor]
    batch_dims: int
    throw: Throw
    minimize: Callable[[Problem], Solution[Tensor]] | None = None
    found: Solution[Tensor] | None = None
    state: LinearState | None = None
    seen: Seen | None = None
    _at: Linearization | None = field(default=None, repr=False)

    @cached_property
    def raveler(self) -> Raveler:
        return raveler_of(self.params, self.batch_dims)

    def linearization(self) -> Linearization:
        """The residual with its graph; the one that the solve ended with, where it is still there."""
        if self._at is None:
            self._at = self.statement.linearize(self.params, self.hparams)
            if self.seen is not None:
                self.seen.check(self._at.loss, self.raveler.ravel([r.detach() for r in self._at.residual]))
        return self._at

    def meet_hooks(self) -> None:
        """Give the graph that is kept the hooks that the caller has entered, such as those of a checkpoint.

        `torch.func` inside of the problem bears none: the graph then stays as it is.
        """
        if saved_tensors_hooks() is None:
            return
        plain, self._at = self._at, None
        try:
            self.linearization()
        except RuntimeError as error:
            if not refuses_hooks(error):
                raise
            self._at = plain

    def check_unchanged(self) -> None:
        """Raise where the objective, which is about to be evaluated elsewhere, is not the one that was solved."""
        if self.seen is not None and self.seen.loss is not None:
            with torch.no_grad():
                self.seen.check_loss(self.statement.closure(self.params, self.hparams))

    def release(self) -> None:
        """Drop the graph."""
        self._at = None

    def require_objective(self, method: str) -> None:
        """Raise where the problem is not one of `argmin`."""
        if not self.statement.has_objective or self.minimize is None:
            raise TypeError(
                f"{method} needs the objective of an argmin; a root or fixed point has none, and where a prox or "
                "bounds hold the params it is not all that is minimised: use hypergrad=Implicit()."
            )
        self.check_unchanged()

    def solve(self, objective: Callable[[list[Tensor]], Tensor], what: str) -> Tensor:
        """Minimise another objective of the leaves, from the solution, with the user's solver; flat ``[*batch, n]``."""
        if self.minimize is None:
            raise TypeError(
                f"{what} needs an inner solver that can be called again, that of an argmin without a prox or bounds: "
                "use hypergrad=Implicit()."
            )
        start = pytree.tree_unflatten([leaf.detach() for leaf in self.params], self.statement.closure.spec)
        problem = Problem(lambda tree: objective(leaves(tree)), start, max_batch_dims=self.batch_dims)
        found = self.minimize(problem)
        if "residual_norm" not in found.stats:
            found = found.with_stats(residual_norm=torch.full(self.raveler.batch_shape, torch.nan, device="cpu"))
        settle(found, self.throw, what, partial(inner_advice, problem, found, None), start=problem.first_residual)
        return found.value.detach()

    def loss_gradient(self, params: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor | None]:
        """``d_x g(params, x)``, summed over the problems, or their weighted sum: no second derivative."""
        free = free_leaves(self.hparams)
        with torch.enable_grad():
            losses = self.statement.closure(params, free)
            loss = losses.sum() if weights is None else (losses.double() * weights).sum()
            wanted = [tensor for tensor in free if tensor.requires_grad]
            grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [])
        return [next(grads, None) if tensor.requires_grad else None for tensor in free]


@dataclass(frozen=True)
class Pulled:
    """A cotangent of the solution, pulled back.

    Attributes:
        hparams: a gradient, or None, for each tensor that the problem reached.
        start: the same for the leaves of ``init``; None: no gradient flows there.
        adjoint: how the linear solve went, where there was one; its value is flat.
    """

    hparams: list[Tensor | None]
    start: list[Tensor] | None = None
    adjoint: Solution[Tensor] | None = None


class Hypergrad(Protocol):
    """A method that needs the solution only, whatever solver found it. Frozen settings only.

    ``reaches_init``: a gradient flows to ``init`` as well.
    """

    reaches_init: ClassVar[bool]

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """``cotangent`` is ``df/dy``, flat ``[*batch, n]``."""
        ...


@runtime_checkable
class PathMethod(Protocol):
    """A method that differentiates the path to the solution, and so runs the solver itself."""

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """The solution, its value a tree like ``init`` with the graph of the derivative."""
        ...
