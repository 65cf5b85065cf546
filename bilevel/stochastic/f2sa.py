"""F2SA: first-order, by a penalty on the value function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .base import Advance, State, Stochastic
from .oracles import Batch
from .schedule import check_count, check_not_negative, check_positive


@dataclass(eq=False, repr=False, kw_only=True)
class F2SA(Stochastic):
    """No second derivatives at all: for losses where Hessian products fail or cost too much. Biased by O(1/penalty).

    With p = ``penalty + penalty_growth t`` at step t, z the inner variables (``inner_params``) and y a second copy:

        z <- z - inner_lr grad_y g(z, x)                              ``num_inner_steps`` times, together with
        y <- y - inner_lr / p (grad_y f(y, x) + p grad_y g(y, x))
        x <- x - outer_lr (grad_x f(y, x) + p (grad_x g(y, x) - grad_x g(z, x)))

    For a constant penalty the fixed point is the minimiser over x of ``min over y  f + p (g - min g)``, whose
    gradient is at a distance of order 1/p from the hypergradient; noise grows with p. Both gradients of g in the last
    line take the same batch, which leaves their mean and removes most of the noise of their difference (the paper
    draws two).

    Cost of a step: 3 ``num_inner_steps`` + 3 gradients, no products. Independent batches: ``num_inner_steps + 1`` of
    each loss.

    Args:
        penalty: its first value, positive. penalty_growth: added at each step, 0 or more.

    Other arguments and errors: `Stochastic`. Source: Kwon, Kwon, Wright, Nowak 2023, algorithm 1.
    """

    penalty: float = 10.0
    penalty_growth: float = 0.0
    num_inner_steps: int = 10

    _kept = ("penalised",)

    def _check(self) -> None:
        super()._check()
        check_positive("penalty", self.penalty)
        check_not_negative("penalty_growth", self.penalty_growth)
        check_count("num_inner_steps", self.num_inner_steps)

    def _draws(self) -> tuple[int, int]:
        return self.num_inner_steps + 1, self.num_inner_steps + 1

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        z, x = now["inner"], now["outer"]
        y = now.get("penalised", z)
        penalty = self.penalty + self.penalty_growth * self.num_steps
        inner_lr, outer_lr = self._sizes()
        losses = []
        for _ in range(self.num_inner_steps):
            batch = next(inner)
            inner_loss, gradient = self._oracles.inner_gradient(z, x, batch)
            f = self._oracles.outer_gradients(y, x, next(outer))
            _, pull = self._oracles.inner_gradient(y, x, batch)
            losses.append((inner_loss, f.loss))
            z = z - inner_lr * gradient
            y = y - inner_lr * (f.inner / penalty + pull)

        batch = next(inner)
        f = self._oracles.outer_gradients(y, x, next(outer))
        at_y, at_z = (self._oracles.inner_gradients(point, x, batch).outer for point in (y, z))
        direction = f.outer + penalty * (at_y - at_z)
        state = {"inner": z, "outer": x - outer_lr * direction, "penalised": y}
        return Advance(state, *losses[0], gradient, direction)
