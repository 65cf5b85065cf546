"""L-BFGS, batched: every problem has its own curvature pairs, line search and stopping."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..checks import check_fields
from ..linalg.single import is_single
from ..problem import Problem
from ..prox import Prox
from ..prox.parts import within
from ..solution import Solution
from ..tree import Tree
from .bounded import box_of, check_bounds, descend_within
from .descent import descend
from .minimize import check_settings
from .nearness import Nearness
from .pairs import Memory
from .single import descend_single
from .watch import Callbacks, watch


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS (Liu and Nocedal 1989) with a weak Wolfe line search. The default inner solver.

    For smooth problems of any size whose gradient is not noisy.

    Args:
        max_steps: steps at most.
        gtol: stop a problem at this gradient norm; None: where the next step is at most 1e-9 (float64) or 3e-5
            (float32) times the norm of the params, whatever the scales of loss, params and start; see `Nearness`.
        history: curvature pairs kept, two vectors each.
        bounds: ``(lower, upper)`` of the params: None, a number, a tensor or array, or a tree like ``init`` of these.
            The steps are then projected (Bertsekas 1982), ``gtol`` is for the gradient of the params that are free to
            move, and the hypergradient holds those at a bound that pulls them; it reaches bounds that require grad.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    max_steps: int = 500
    gtol: float | None = None
    history: int = 10
    bounds: tuple[Tree, Tree] | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        if self.history < 1:
            raise ValueError(f"history is {self.history}: at least one curvature pair must be kept.")
        check_bounds(self.bounds)

    def prox_for(self, init: Tree) -> Prox | None:
        """The bounds as a projection of the flat params; None: there are none."""
        return None if self.bounds is None else within(self.bounds, init)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        if self.bounds is not None:
            box, told = box_of(problem, self.bounds), watch(self, problem)
            return descend_within(problem, box, self.gtol, self.max_steps, self.history, told)
        if self.callback is None and not problem.differentiable and is_single(problem.start.y):
            return descend_single(problem, self.gtol, self.max_steps, self.history)
        memory = Memory(self.history, problem, probe=self.gtol is None)
        nearness = Nearness(problem.start.y, problem.raveler.coarsest) if self.gtol is None else None
        return descend(problem, self.gtol, self.max_steps, memory, nearness, watch=watch(self, problem))
