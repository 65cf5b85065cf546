"""The path of an inner solver: its steps as pure functions of point, state and hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..closure import Autocast, Closure, Recorder, Substitute, in_transform
from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import INNER_ADVICE, InnerSolver, Progress
from ..inner.steps import SGD, LastStep, State, Steps
from ..linalg.curvature import fused_norm
from ..problem import Objective, Problem, graph_nodes
from ..solution import Solution, Throw, settle
from ..tree import Tree, norm
from .call import measured


class Path:
    """A fixed number of steps from ``init``, with all tensors that objective and rule reach as ``hparams``.

    Raises:
        NotImplementedError: the objective uses a fused batch norm, whose derivatives under `torch.func` are wrong.
    """

    def __init__(self, objective: Objective, init: Tree, args: tuple[Any, ...], steps: Steps, method: str):
        recorder = Recorder()
        recorder.note(steps.rule.tensors)
        self.problem = Problem(objective, init, args, recorder=recorder)
        self.steps, self.hparams = steps, recorder.resolved
        autocast = Autocast.current(self.problem.start.y.device)
        self.closure = Closure(objective, pytree.tree_structure(init), args, recorder.captured, autocast)
        loss = self.problem.linearize(self.problem.start.y, create_graph=False).loss
        fused = None if loss is None else fused_norm(graph_nodes([loss]))
        if fused:
            raise NotImplementedError(
                f"hypergrad={method}(...) cannot be used: the objective contains the fused {fused}, whose derivatives "
                "under torch.func are silently wrong. Use Unroll(), or a norm written with torch.var_mean and rsqrt."
            )

    def step(self, y: Tensor, state: State, hparams: list[Tensor], index: int) -> tuple[Tensor, State]:
        """One step, as `torch.func` differentiates it."""
        raveler = self.problem.raveler
        g = torch.func.grad(lambda flat: self.closure(raveler.unravel(flat), hparams).sum())(y)
        with Substitute(self.closure.captured, hparams):
            return self.steps.rule.step(y, g, state, index)

    def solution(self, y: Tensor, state: State) -> Solution:
        """What ended at ``y`` after all steps."""
        progress = Progress.begin(self.problem.start, None)
        progress.steps = progress.steps + self.steps.max_steps
        found = progress.solution(y)
        found.state = LastStep(state)
        return found


def unrollable(solver: InnerSolver, method: str) -> Steps:
    """The steps of a solver whose path can be differentiated."""
    if in_transform():
        raise NotImplementedError(
            f"hypergrad={method}(...) does not work under torch.func: use Implicit(), or autograd outside of it."
        )
    if isinstance(solver, Steps):
        return solver
    if isinstance(solver, GradientDescent) and not solver.line_search:
        lr = torch.tensor(solver.lr, dtype=torch.float64).unsqueeze(-1) if isinstance(solver.lr, tuple) else solver.lr
        return Steps(SGD(lr, solver.momentum), solver.max_steps, solver.gtol)
    raise TypeError(
        f"hypergrad={method}(...) cannot differentiate {solver!r}: it needs Steps(rule, ...), or GradientDescent "
        "without line_search. Every solver works with hypergrad=Implicit()."
    )


def fixed_steps(solver: InnerSolver, method: str) -> Steps:
    """The same, for methods that know the number of steps beforehand."""
    steps = unrollable(solver, method)
    if steps.gtol is not None or (isinstance(solver, GradientDescent) and solver.safeguard):
        raise TypeError(f"hypergrad={method}(...) needs a fixed number of steps: leave gtol and safeguard away.")
    return steps


def finish(problem: Problem, found: Solution, throw: Throw) -> Solution:
    """Measure what was found, let a failure be heard, and give the value the shape of ``init``."""
    at = problem.evaluate(found.value.detach())
    measured(found, norm(at.g.detach()), torch.isfinite(at.f.detach()))
    settle(found, throw, "The inner solve", INNER_ADVICE)
    found.value = problem.raveler.unflatten(problem.raveler.unravel(found.value))
    return found
