"""The unrolled hypergradient: differentiate the steps of the solver themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import InnerSolver
from ..problem import Objective
from ..solution import Solution, Throw
from ..tree import Tree, leaves, norm
from .path import Path, Randomness, eager_problem, finish, fixed_steps, unrollable
from .seen import changed


@dataclass(frozen=True)
class Unroll:
    """Backpropagate through every step of `GradientDescent` or `Steps`, towards ``init`` as well.

    The exact derivative of what the solver returned, converged or not, towards all that it used: hyperparameters of the
    objective, step sizes, momentum. Memory grows with the steps. MAML (Finn et al. 2017) is this with few steps,
    hyperparameter optimization by reversed training (Maclaurin et al. 2015) with many, and `Implicit` its limit where
    the solver converges. Second derivatives are right, or refused (fused norms, whose third ones PyTorch gets wrong).

    Args:
        checkpoint: keep only every ``sqrt(max_steps)``-th point and compute the others again in the backward pass
            (Chen et al. 2016): memory of ``2 sqrt(K)`` steps for the time of one more run. Dropout and noise from the
            default generators are drawn again as they were.
    """

    checkpoint: bool = False

    def run(
        self, objective: Objective, init: Tree, args: tuple[Any, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        if self.checkpoint and torch.is_grad_enabled():
            path = Path(objective, init, args, fixed_steps(solver, "Unroll"), "Unroll(checkpoint=True)")
            return finish(path.problem, _checkpointed(path, init), throw, path.layer_norm)
        steps = unrollable(solver, "Unroll")
        problem, layer_norm = eager_problem(objective, init, args, steps.rule.tensors)
        found = (solver if isinstance(solver, GradientDescent) else steps).minimize(problem)
        return finish(problem, found, throw, layer_norm)


def _checkpointed(path: Path, init: Tree) -> Solution:
    steps = path.steps
    length = math.ceil(math.sqrt(steps.max_steps))
    y = path.problem.raveler.ravel(leaves(init)).clone()
    state = steps.rule.init(y)
    names = list(state)

    def segment(first: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            state, hparams = dict(zip(names, rest[: len(names)], strict=True)), list(rest[len(names) :])
            for index in range(first, min(first + length, steps.max_steps)):
                y, state = path.step(y, state, hparams, index)
            return (y, *(state[name] for name in names))

        return run

    for first in range(0, steps.max_steps, length):
        y, *kept = _Segment.apply(segment(first), y, *state.values(), *path.hparams)
        state = dict(zip(names, kept, strict=True))
    return path.solution(y, state)


class _Segment(torch.autograd.Function):
    """A pure function of which only the operands are kept; the backward pass runs it again."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.randomness = run, Randomness.now(operands[0])
        outputs = tuple(out.clone() for out in run(*operands))
        ctx.save_for_backward(*operands, outputs[0])  # kept anyway, as an operand of the next segment
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *operands, reached = ctx.saved_tensors
        with ctx.randomness.again():
            outputs, pull = torch.func.vjp(ctx.run, *operands)  # type: ignore[misc]
        roundoff = torch.finfo(reached.dtype).eps ** 0.75
        if bool((norm(outputs[0] - reached) > roundoff * torch.maximum(norm(reached), norm(operands[0]))).any()):
            raise changed("objective")
        return (None, *pull(grads))
