"""Truncated backpropagation: the derivative of the last steps only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..inner.minimize import InnerSolver
from ..inner.steps import LastStep
from ..problem import Objective, Problem
from ..solution import Solution, Throw
from ..tree import Tree
from .path import finish, fixed_steps


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
        if self.last < 1:
            raise ValueError(f"last is {self.last}: at least one step must be differentiated.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Any, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        steps = fixed_steps(solver, "Truncated")
        first = max(0, steps.max_steps - self.last)
        if first == 0:
            problem = Problem(objective, init, args, differentiable=torch.is_grad_enabled())
            return finish(problem, steps.minimize(problem), throw)
        before = Problem(objective, init, args)
        with torch.no_grad():
            start = replace(steps, max_steps=first).minimize(before)
        assert isinstance(start.state, LastStep)
        kept = {name: tensor.detach() for name, tensor in start.state.rule.items()}
        reached = before.raveler.unflatten(before.raveler.unravel(start.value.detach()))
        problem = Problem(objective, reached, args, differentiable=torch.is_grad_enabled())
        found = steps.resume(problem, kept, first)
        found.stats["num_steps"] = found.stats["num_steps"] + first
        return finish(problem, found, throw)
