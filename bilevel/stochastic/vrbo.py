"""VRBO: recursive directions on both levels with an inner loop and a full pass now and then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .base import Advance, State
from .neumann import NeumannMethod, Point, Sample
from .oracles import Batch
from .schedule import check_count


@dataclass(eq=False, repr=False, kw_only=True)
class VRBO(NeumannMethod):
    """For finite sums with cheap Hessian products: constant step sizes; `SRBA` does the same with fewer products::

        every ``period`` steps, on all the data:   v = G(y, x),  w = F(y, x)
        x+ = x - outer_lr w
        then on a fresh batch, ``num_inner_steps`` + 1 times:
            v <- v + G_b(y, x+) - G_b(y_old, x_old),    w <- w + F_b(y, x+) - F_b(y_old, x_old)
            y <- y - inner_lr v                         (not the last time)

    Here G = grad_y g, and F is the estimate of `MRBO` by a Neumann sum; (y_old, x_old) is the point of the estimate
    before. Pass the full data when ``wants_full_batch`` is true: one draw of each loss then serves for v and w, so that
    with `Draws` of the full data first and small batches after it the inner loop of that step stays cheap.

    Cost of a step with T = ``num_inner_steps`` and Q = ``num_terms``: (T + 1) times 4 gradients, 2 Q Hessian
    products and 2 cross products, and a gradient for each change of batch; on a full-batch step 2, Q and 1 more.
    Independent batches: (T + 1) (Q + 2) of the inner data, T + 1 of the outer data; on a full-batch step one more.

    Args:
        period: steps from one full batch to the next.
        neumann_lr: at most 1/L, constant; by default the largest ``inner_lr`` so far, a schedule's first peak.

    Other arguments and errors: `Stochastic`. Source: Yang, Ji, Liang 2021, algorithm 2.
    """

    period: int
    num_inner_steps: int = 3

    _kept = ("inner_direction", "outer_direction")

    def _check(self) -> None:
        super()._check()
        check_count("period", self.period)
        check_count("num_inner_steps", self.num_inner_steps)

    @property
    def wants_full_batch(self) -> bool:
        """Whether the next step is the first of a period."""
        return self.num_steps % self.period == 0

    def _draws(self) -> tuple[int, int]:
        sweeps = self.num_inner_steps + 1
        return sweeps * (self.num_terms + 2) + self.wants_full_batch, sweeps + self.wants_full_batch

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        y, x = now["inner"], now["outer"]
        inner_lr, outer_lr = self._sizes()
        losses = []
        if self.wants_full_batch:
            batch = next(inner)
            full = Sample(next(outer), (batch,) * self.num_terms, batch)
            point = Point(self._oracles, y, x)
            g = point.linearize(batch)
            outer_loss, direction = self._hypergradient(point, full)
            gradient = g.gradient
            losses.append((g.loss, outer_loss))
        else:
            gradient, direction = now["inner_direction"], now["outer_direction"]

        before, x = (y, x), x - outer_lr * direction
        for step in range(self.num_inner_steps + 1):
            batch, sample = next(inner), self._draw(inner, outer)
            point, old = Point(self._oracles, y, x), Point(self._oracles, *before)
            g = point.linearize(batch)
            gradient = gradient + g.gradient - old.linearize(batch).gradient
            outer_loss, new = self._hypergradient(point, sample)
            direction = direction + new - self._hypergradient(old, sample)[1]
            losses.append((g.loss, outer_loss))
            before = (y, x)
            if step < self.num_inner_steps:
                y = y - inner_lr * gradient
        state = {"inner": y, "outer": x, "inner_direction": gradient, "outer_direction": direction}
        return Advance(state, *losses[0], gradient, direction)
