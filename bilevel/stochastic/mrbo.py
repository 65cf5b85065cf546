"""MRBO: recursive momentum on both levels, a Neumann series for the adjoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .base import Advance, State
from .fsla import mixing_at
from .neumann import NeumannMethod, Point
from .oracles import Batch
from .schedule import StepSize


@dataclass(eq=False, repr=False, kw_only=True)
class MRBO(NeumannMethod):
    """A single loop whose two directions average their noise away by recursive (STORM) momentum.

        d_y <- G(y, x) + (1 - mixing) (d_y - G(y_old, x_old)),     G = grad_y g
        d_x <- F(y, x) + (1 - mixing) (d_x - F(y_old, x_old)),     F = grad_x f - (d_x grad_y g)^T u
        y <- y - inner_lr d_y,    x <- x - outer_lr d_x

    with u the Neumann sum of `StocBiO` at each of the two points, the new and the old estimate on the same batches;
    at the first step d_y = G and d_x = F. The paper's schedules are ``Decay(lr, 1/3)`` for both step sizes and
    ``Decay(mixing, 2/3)``.

    Cost of a step: 4 gradients, 2 ``num_terms`` Hessian products, 2 cross products, and a gradient for each change
    of batch at each point. Independent inner batches: ``num_terms + 2``.

    Args:
        mixing: weight of the fresh gradients in (0, 1], a number or a function of the step number; 1: no momentum.
        neumann_lr: at most 1/L, constant; by default the largest ``inner_lr`` so far, a schedule's first peak.

    Other arguments and errors: `Stochastic`. Source: Yang, Ji, Liang 2021, algorithm 1.
    """

    mixing: StepSize = 0.5

    _kept = ("inner_old", "outer_old", "inner_direction", "outer_direction")

    def _check(self) -> None:
        super()._check()
        mixing_at(self.mixing, 0)

    def _draws(self) -> tuple[int, int]:
        return self.num_terms + 2, 1

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        y, x = now["inner"], now["outer"]
        gradient_batch, sample = next(inner), self._draw(inner, outer)
        point = Point(self._oracles, y, x)
        g = point.linearize(gradient_batch)
        outer_loss, direction = self._hypergradient(point, sample)
        gradient = g.gradient
        if "inner_old" in now:
            keep = 1 - mixing_at(self.mixing, self.num_steps)
            before = Point(self._oracles, now["inner_old"], now["outer_old"])
            gradient = gradient + keep * (now["inner_direction"] - before.linearize(gradient_batch).gradient)
            _, old = self._hypergradient(before, sample)
            direction = direction + keep * (now["outer_direction"] - old)
        inner_lr, outer_lr = self._sizes()
        state = {
            "inner": y - inner_lr * gradient,
            "outer": x - outer_lr * direction,
            "inner_old": y,
            "outer_old": x,
            "inner_direction": gradient,
            "outer_direction": direction,
        }
        return Advance(state, g.loss, outer_loss, gradient, direction)
