"""Gradient descent, with momentum, or with a line search that finds each problem's own step size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_fields, check_momentum, check_step_size
from ..linalg.solve import chosen
from ..problem import Evaluation, Problem
from ..solution import Solution
from ..tree import axpy
from .descent import descend
from .minimize import DEFAULT_STEPS, Progress, check_settings, choose
from .watch import Callbacks, watch


@dataclass(frozen=True)
class GradientDescent:
    """``y <- y - lr m``, ``m <- momentum m + grad`` (heavy ball, as `torch.optim.SGD`).

    The inner solver of implicit MAML with ``max_steps`` alone. `Unroll` differentiates it, as it does `Steps`.

    Args:
        lr: step size, or one for each problem as a tuple of T numbers.
        max_steps: steps at most. Where ``gtol`` is None, exactly this many.
        gtol: stop a problem at this gradient norm; None: no check, no synchronisation with a GPU.
        momentum: in [0, 1).
        safeguard: where a step raises the loss of a problem, take it back, halve that problem's step size and
            restart its momentum. One more evaluation in all, and no divergence.
        line_search: find step sizes by a weak Wolfe search, starting from ``lr`` and then from twice the last
            one, for each problem its own. Excludes momentum.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    lr: float | tuple[float, ...] = 0.1
    max_steps: int = DEFAULT_STEPS
    gtol: float | None = None
    momentum: float = 0.0
    safeguard: bool = False
    line_search: bool = False
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_fields(self)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        for lr in self.lr if isinstance(self.lr, tuple) else (self.lr,):
            check_step_size(lr)
        if self.line_search and (self.momentum or self.safeguard):
            raise ValueError("line_search excludes momentum and safeguard: it finds its own steps.")

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        lr = self._step_sizes(problem.start)
        return self._search(problem, lr) if self.line_search else self._descend(problem, lr)

    def _descend(self, problem: Problem, lr: Tensor) -> Solution[Tensor]:
        at = problem.start
        velocity = torch.zeros_like(at.g) if self.momentum else at.g
        progress = Progress.begin(at, self.gtol)
        told = watch(self, problem)
        for step in range(self.max_steps):
            if told is not None and told(step, at.y, at.g, at.f, progress.active):
                progress.stop()
                break
            if progress.done(step):
                break
            velocity = self.momentum * velocity + at.g if self.momentum else at.g
            y = axpy(-lr, velocity, at.y)
            progress.count()
            if self.gtol is None and told is None and step == self.max_steps - 1:
                # Nothing asks for the last gradient, which argmin measures once: a safeguard asks for the loss.
                new = Evaluation(y, problem.losses(y) if self.safeguard else at.f, at.g)
            else:
                new = problem.evaluate(y)
            if self.safeguard:
                better = new.f <= at.f
                lr = torch.where(better, lr, lr / 2)
                new = choose(better, new, at)
                if self.momentum:
                    velocity = chosen(better, velocity, torch.zeros_like(velocity))
            at = choose(progress.active, new, at) if self.gtol is not None else new
            if self.gtol is not None:
                progress.look(at)
        if told is not None and bool(progress.steps.max() == self.max_steps):
            told(self.max_steps, at.y, at.g, at.f, progress.active)
        return progress.solution(at.y, step_size=lr)

    def _search(self, problem: Problem, lr: Tensor) -> Solution[Tensor]:
        def direction(at: Evaluation, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return -at.g, torch.where(last > 0, 2 * last, lr), last > 0

        return descend(problem, self.gtol, self.max_steps, direction, watch=watch(self, problem))

    def _step_sizes(self, at: Evaluation) -> Tensor:
        if not isinstance(self.lr, tuple):
            return torch.full_like(at.f, self.lr)  # made on the device: nothing is copied to it
        lr = torch.as_tensor(self.lr, dtype=torch.float64, device=at.f.device)
        if lr.shape != at.f.shape:
            raise ValueError(f"lr has {lr.numel()} step sizes for {tuple(at.f.shape)} problems: give one or T.")
        return lr.expand_as(at.f)
