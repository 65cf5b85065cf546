"""The unrolled hypergradient: differentiate the steps of the solver themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import InnerSolver
from ..problem import Objective
from ..solution import Solution, Throw
from ..tree import Tree, leaves
from .path import Path, eager_problem, finish, fixed_steps, unrollable
from .replay import Replay, Replayed

MODES = ("plain", "mixed")


@dataclass(frozen=True)
class Unroll:
    """Backpropagate through every step of `GradientDescent` or `Steps`, towards ``init`` as well.

    The exact derivative of what the solver returned, converged or not, towards all that it used: hyperparameters of the
    objective, step sizes, momentum. Memory grows with the steps. MAML (Finn et al. 2017) is this with few steps,
    hyperparameter optimization by reversed training (Maclaurin et al. 2015) with many, and `Implicit` its limit where
    the solver converges. Second derivatives are right, or refused (fused norms, whose third ones PyTorch gets wrong);
    they keep the graphs of all steps, in every mode.

    ``mode`` and ``checkpoint`` trade time for memory, and change nothing else. Steps that are made again draw what they
    drew (dropout and noise from the default generators), and an objective that has changed meanwhile is an error.

    Args:
        checkpoint: True keeps every ``sqrt(max_steps)``-th point and makes the others again in the backward pass
            (Chen et al. 2016), for one more run. ``"tree"`` halves the path again and again (REPLAY, Engstrom et al.
            2025): about ``2 log2(max_steps)`` points, for about ``log2(max_steps) / 2`` more runs.
        mode: ``"mixed"`` keeps points instead of graphs, and makes the graph of one gradient at a time, for the
            product of the Hessian with what comes back from the steps behind it (MixFlow-MG, Kemaev et al. 2025). With
            ``checkpoint=True`` it keeps fewer points and makes the gradients twice more; a tree has graphs of single
            steps in any mode.

    Raises:
        ValueError: another mode or checkpoint.
    """

    checkpoint: bool | Literal["tree"] = False
    mode: Literal["plain", "mixed"] = "plain"

    def __post_init__(self) -> None:
        if self.checkpoint not in (False, True, "tree"):
            raise ValueError(f"checkpoint is {self.checkpoint!r}: it is False, True or 'tree'.")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}: it is 'plain' or 'mixed'.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        if (self.checkpoint or self.mode == "mixed") and torch.is_grad_enabled():
            path = Path(objective, init, args, fixed_steps(solver, "Unroll"), repr(self), to_init=True)
            return finish(path.problem, self._replayed(path, init), throw, path.layer_norm)
        steps = unrollable(solver, "Unroll")
        problem, layer_norm = eager_problem(objective, init, args, steps.rule.tensors)
        found = (solver if isinstance(solver, GradientDescent) else steps).minimize(problem)
        return finish(problem, found, throw, layer_norm)

    def _replayed(self, path: Path, init: Tree) -> Solution:
        walk = path.walk
        y = walk.raveler.ravel(leaves(init)).clone()
        state = walk.steps.rule.init(y)
        replay = Replay(walk, tuple(state), self._lengths(walk.steps.max_steps))
        g = None if walk.draws else path.problem.start.g
        y, *last = Replayed.apply(replay, g, y, *state.values(), *walk.hparams)
        return path.solution(y, dict(zip(state, last, strict=True)))

    def _lengths(self, num_steps: int) -> tuple[int, ...]:
        """See `Replay`."""
        if self.checkpoint == "tree":
            return tuple(2**power for power in reversed(range(max(1, (num_steps - 1).bit_length()))))
        root = math.ceil(math.sqrt(num_steps))
        kept = (root,) if self.checkpoint else ()
        return (*kept, 1) if self.mode == "mixed" else kept
