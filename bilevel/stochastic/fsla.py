"""FSLA: one step for each variable in turn, with momentum on the outer one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .base import Advance, State, Stochastic
from .oracles import Batch, Gradients, Linearized
from .schedule import StepSize, size_at


@dataclass(eq=False, repr=False, kw_only=True)
class FSLA(Stochastic):
    """Like `SOBA`, but one variable after the other, and with recursive momentum on the hypergradient.

        y+ = y - inner_lr grad_y g(y, x)
        u+ = u - linear_lr (H(y+, x) u - grad_y f(y+, x))
        h+ = D_x(y+, x, u+) + (1 - mixing) (h - D_x(y, x_old, u)),    D_x = grad_x f - (d_x grad_y g)^T u
        x+ = x - outer_lr h+

    Both D_x of a step use the same batches; the first step has h+ = D_x. ``mixing`` = 1 is no momentum.

    Cost: 7 gradients and 3 products a step (the first: 5 and 2). Independent batches: 3 of the inner data, 2 of
    the outer data, see `Draws`.

    Args:
        mixing: the weight of the fresh estimate, in (0, 1]; a number or a function of the step number.
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Li, Gu, Huang 2022, algorithm 1.
    """

    mixing: StepSize = 0.5
    linear_lr: StepSize | None = None

    _kept = ("adjoint", "outer_old", "outer_direction")

    def _check(self) -> None:
        super()._check()
        mixing_at(self.mixing, 0)

    def _draws(self) -> tuple[int, int]:
        return 3, 2

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        y, x = now["inner"], now["outer"]
        u = now.get("adjoint", y.new_zeros(y.shape))
        inner_lr, outer_lr = self._sizes()

        inner_loss, gradient = self._oracles.inner_gradient(y, x, next(inner))
        new_y = y - inner_lr * gradient

        g, f = self._linearize(new_y, x, next(inner), next(outer))
        linear = g.product(u) - f.inner
        new_u = u - self._lr("linear_lr") * linear

        batches = next(inner), next(outer)
        direction = self._hypergradient(new_y, x, new_u, batches)
        if "outer_old" in now:
            old = self._hypergradient(y, now["outer_old"], u, batches)
            direction = direction + (1 - mixing_at(self.mixing, self.num_steps)) * (now["outer_direction"] - old)
        state = {
            "inner": new_y,
            "outer": x - outer_lr * direction,
            "adjoint": new_u,
            "outer_old": x,
            "outer_direction": direction,
        }
        return Advance(state, inner_loss, f.loss, gradient, direction, linear)

    def _linearize(self, y: Tensor, x: Tensor, inner_batch: Batch, outer_batch: Batch) -> tuple[Linearized, Gradients]:
        return self._oracles.linearize(y, x, inner_batch), self._oracles.outer_gradients(y, x, outer_batch)

    def _hypergradient(self, y: Tensor, x: Tensor, u: Tensor, batches: tuple[Batch, Batch]) -> Tensor:
        g, f = self._linearize(y, x, *batches)
        return f.outer - g.cross(u)


def mixing_at(mixing: StepSize, step: int) -> float:
    """The weight of the fresh estimate in a recursive momentum, checked."""
    weight = size_at("mixing", mixing, step)
    if not 0 < weight <= 1:
        raise ValueError(f"mixing is {weight}: the weight of the fresh estimate lies in (0, 1]; 1 is no momentum.")
    return weight
