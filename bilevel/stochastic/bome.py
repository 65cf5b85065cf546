"""BOME: first-order, by dynamic barrier descent on the value function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..tree import dot
from .base import Advance, State, Stochastic
from .oracles import Batch
from .schedule import check_count, check_positive


@dataclass(eq=False, repr=False, kw_only=True)
class BOME(Stochastic):
    """First-order like `F2SA`, without a penalty to choose: the multiplier follows from the gradients.

    With ``y_T`` the result of ``num_inner_steps`` gradient steps on g from y, held fixed, and the gap
    q(y, x) = g(y, x) - g(y_T, x)::

        multiplier = max(0, control - <grad f, grad q> / |grad q|^2)
        (y, x) <- (y, x) - outer_lr (grad f + multiplier grad q)

    for gradients towards y and x together. Near the solution the multiplier grows like 1/distance until the step is
    too long for it, at about 2/(outer_lr L): so ``outer_lr`` must decrease, or a bias of its order stays. Another, of
    (1 - inner_lr mu)^num_inner_steps, comes from ``y_T``. Measured on full-batch quadratics of condition 10, the
    relative outer gap stalls at 3e-2 with a constant step and falls to 1e-3 in 800 steps of ``Decay(0.5, 1, 50)``. With
    mini-batches the noise in q enters the multiplier: a method for full or large batches.

    Cost of a step: ``num_inner_steps`` + 3 gradients, no products. Independent inner batches:
    ``num_inner_steps + 1``.

    Args:
        inner_lr: of the steps from y to ``y_T``.
        outer_lr: of the joint step of y and x; a decreasing one.
        control: how fast q must shrink, the paper's eta.

    Other arguments and errors: `Stochastic`. Source: Liu, Ye, Wright, Stone, Liu 2022, algorithm 1.
    """

    control: float = 0.5
    num_inner_steps: int = 10

    def _check(self) -> None:
        super()._check()
        check_positive("control", self.control)
        check_count("num_inner_steps", self.num_inner_steps)

    def _draws(self) -> tuple[int, int]:
        return self.num_inner_steps + 1, 1

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        y, x = now["inner"], now["outer"]
        inner_lr, outer_lr = self._sizes()
        target = y
        for _ in range(self.num_inner_steps):
            target = target - inner_lr * self._oracles.inner_gradient(target, x, next(inner))[1]

        batch = next(inner)
        g = self._oracles.inner_gradients(y, x, batch)
        below = self._oracles.inner_gradients(target, x, batch)
        f = self._oracles.outer_gradients(y, x, next(outer))
        gap = torch.cat([g.inner, g.outer - below.outer])
        goal = torch.cat([f.inner, f.outer])
        square = dot(gap, gap)
        # Where the gap's gradient vanishes there is nothing to keep shrinking.
        multiplier = torch.where(square > 0, self.control - dot(goal, gap) / square, 0.0).clamp_min(0)
        direction = goal + (multiplier * gap.double()).to(gap.dtype)
        towards_y, towards_x = direction.split([y.numel(), x.numel()])
        state = {"inner": y - outer_lr * towards_y, "outer": x - outer_lr * towards_x}
        return Advance(state, g.loss, f.loss, towards_y, towards_x)
