"""AmIGO: warm-started inner and linear loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .base import State
from .neumann import Point
from .oracles import Batch
from .schedule import StepSize, check_count
from .two_loops import Estimate, TwoLoops


@dataclass(eq=False, repr=False, kw_only=True)
class AmIGO(TwoLoops):
    """For expensive outer steps: both the inner solution and the adjoint are refined from where they were.

        y <- y - inner_lr grad_y g(y, x)             ``num_inner_steps`` times
        u <- u - linear_lr (H u - grad_y f(y, x))    ``num_linear_steps`` times
        x <- x - outer_lr (grad_x f - (d_x grad_y g)^T u)

    Unlike a Neumann series from zero, the warm start leaves no bias. With one step of each it is nearly `SOBA`.

    Cost of a step: ``num_inner_steps`` gradients, one outer gradient, ``num_linear_steps`` Hessian products, one
    cross product, and a gradient for each change of batch. Independent inner batches:
    ``num_inner_steps + num_linear_steps + 1``.

    Args:
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Arbel and Mairal 2022, algorithm 1.
    """

    num_linear_steps: int = 10
    linear_lr: StepSize | None = None

    _kept = ("adjoint",)

    def _check(self) -> None:
        super()._check()
        check_count("num_linear_steps", self.num_linear_steps)

    def _draws(self) -> tuple[int, int]:
        return self.num_inner_steps + self.num_linear_steps + 1, 1

    def _estimate(self, now: State, y: Tensor, inner: Iterator[Batch], outer: Iterator[Batch]) -> Estimate:
        point = Point(self._oracles, y, now["outer"])
        f = self._oracles.outer_gradients(y, now["outer"], next(outer))
        u = now.get("adjoint", y.new_zeros(y.shape))
        linear_lr = self._lr("linear_lr")
        for _ in range(self.num_linear_steps):
            residual = point.linearize(next(inner)).product(u) - f.inner
            u = u - linear_lr * residual
        direction = f.outer - point.linearize(next(inner)).cross(u)
        return Estimate(f.loss, direction, residual, {"adjoint": u})
