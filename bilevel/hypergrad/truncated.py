"""Truncated backpropagation: the derivative of the last steps only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_fields
from ..closure import Tracer
from ..inner.minimize import InnerSolver
from ..inner.steps import LastStep
from ..problem import Objective, Problem
from ..solution import Solution, Throw
from ..tree import Tree, tree_map
from .path import eager_problem, finish, fixed_steps


@dataclass(frozen=True)
class Truncated:
    """Unroll the last ``last`` steps of `Steps` or `GradientDescent`; those before leave no graph (Shaban et al. 2019).

    For long inner runs: memory of ``last`` steps. Where the steps contract by a factor q, the error decays like
    ``q^last``; where they do not, it is biased towards the short horizon. The momentum or Adam state is carried over,
    without its derivative. No gradient flows to ``init`` unless all steps are unrolled.

    Args:
        last: steps with a graph.
    """

    last: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.last < 1:
            raise ValueError(f"last is {self.last}: at least one step must be differentiated.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        steps = fixed_steps(solver, "Truncated")
        first = max(0, steps.max_steps - self.last)
        if first == 0:
            problem, layer_norm = eager_problem(objective, init, args, steps.rule.tensors)
            return finish(problem, steps.minimize(problem), throw, layer_norm)
        before = Problem(objective, init, args, tracer=Tracer(differentiable=False))
        with torch.no_grad():
            start = steps.first_steps(first).minimize(before)
        assert isinstance(start.state, LastStep)
        detached = tree_map(torch.Tensor.detach, init)
        problem, layer_norm = eager_problem(objective, detached, args, steps.rule.tensors)
        found = steps.resume(problem, problem.evaluate(start.value), start.state.rule, first)
        found = found.with_stats(num_steps=torch.full_like(found.stats["num_steps"], steps.max_steps))
        return finish(problem, found, throw, layer_norm)
