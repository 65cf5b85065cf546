"""SOBA: stochastic steps for all three variables at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .base import Advance, State, Stochastic
from .oracles import Batch
from .schedule import StepSize


@dataclass(frozen=True)
class Directions:
    """Estimates of grad_y g, of the linear residual and of the hypergradient, and what to keep for the next step."""

    inner_loss: Tensor
    outer_loss: Tensor
    inner: Tensor
    linear: Tensor
    outer: Tensor
    kept: State = field(default_factory=dict)
    remember: Callable[[], None] | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class SOBA(Stochastic):
    """The first single-loop method to try: one batch of each loss a step, no inner loop, no Neumann series.

        D_y = grad_y g(y, x)                          y <- y - inner_lr  D_y
        D_u = H u - grad_y f(y, x)                    u <- u - linear_lr D_u
        D_x = grad_x f(y, x) - (d_x grad_y g)^T u     x <- x - outer_lr  D_x

    all three from the same point. With mini-batches the step sizes must decrease (power 1/2 for the rate of the
    paper); with constant ones it stays at a distance of their order. Full-batch it converges linearly on strongly
    convex problems once ``outer_lr`` is small beside ``inner_lr``.

    Cost: 2 gradients and 1 joint product (Hessian and cross from one backward pass) a step.

    Args:
        linear_lr: step size of the adjoint u; ``inner_lr`` by default, as in the paper.

    Other arguments and errors: `Stochastic`. Source: Dagréou, Ablin, Vaiter, Moreau 2022, algorithm 1.
    """

    linear_lr: StepSize | None = None

    _kept: ClassVar[tuple[str, ...]] = ("adjoint",)

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        now = {"adjoint": now["inner"].new_zeros(now["inner"].shape), **now}
        found = self._directions(now, inner, outer)
        inner_lr, outer_lr = self._sizes()
        state = {
            "inner": now["inner"] - inner_lr * found.inner,
            "adjoint": now["adjoint"] - self._lr("linear_lr") * found.linear,
            "outer": now["outer"] - outer_lr * found.outer,
            **found.kept,
        }
        return Advance(
            state, found.inner_loss, found.outer_loss, found.inner, found.outer, found.linear, found.remember
        )

    def _directions(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Directions:
        return self._plain(now, next(inner), next(outer))

    def _plain(self, at: State, inner_batch: Batch, outer_batch: Batch) -> Directions:
        """The three directions on one batch each."""
        y, x, u = at["inner"], at["outer"], at["adjoint"]
        g = self._oracles.linearize(y, x, inner_batch)
        hessian, cross = g.products(u)
        f = self._oracles.outer_gradients(y, x, outer_batch)
        return Directions(g.loss, f.loss, g.gradient, hessian - f.inner, f.outer - cross)
