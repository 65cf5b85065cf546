"""`TwoLoops`: some steps on the inner problem, an estimate of the hypergradient, one step on the outer problem."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..tree import Tree
from .base import Advance, State, Stochastic
from .neumann import Point, Series
from .oracles import Loss
from .schedule import StepSize, check_count, check_step_size, size_at


@dataclass(frozen=True)
class Estimate:
    """The outer loss, the hypergradient, the linear residual where there is one, and the vectors to keep."""

    outer_loss: Tensor
    outer: Tensor
    linear: Tensor | None = None
    kept: State = field(default_factory=dict)


class TwoLoops(Stochastic):
    """Base of the methods with an inner loop, warm-started where the last one ended."""

    def __init__(
        self,
        inner_params: Tree,
        outer_params: Tree,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        inner_lr: StepSize,
        outer_lr: StepSize,
        num_inner_steps: int,
    ):
        super().__init__(inner_params, outer_params, inner_loss, outer_loss, inner_lr=inner_lr, outer_lr=outer_lr)
        self.num_inner_steps = check_count("num_inner_steps", num_inner_steps)

    def _advance(self, now: State, inner: Iterator[Any], outer: Iterator[Any]) -> Advance:
        y, x = now["inner"], now["outer"]
        inner_lr, outer_lr = self._sizes()
        losses = []
        for _ in range(self.num_inner_steps):
            inner_loss, gradient = self._oracles.inner_gradient(y, x, next(inner))
            losses.append(inner_loss)
            y = y - inner_lr * gradient
        found = self._estimate(now, y, inner, outer)
        state = {"inner": y, "outer": x - outer_lr * found.outer, **found.kept}
        return Advance(state, losses[0], found.outer_loss, gradient, found.outer, found.linear)

    @abstractmethod
    def _estimate(self, now: State, y: Tensor, inner: Iterator[Any], outer: Iterator[Any]) -> Estimate:
        """The hypergradient at the new ``y`` and the old ``x``."""


class NeumannLoops(TwoLoops):
    """Two loops with a Neumann series for the adjoint: their base; ``neumann_lr`` stays constant."""

    def __init__(
        self,
        inner_params: Tree,
        outer_params: Tree,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        inner_lr: StepSize,
        outer_lr: StepSize,
        num_inner_steps: int,
        series: Series,
        neumann_lr: float | None,
    ):
        super().__init__(
            inner_params,
            outer_params,
            inner_loss,
            outer_loss,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            num_inner_steps=num_inner_steps,
        )
        self._series = series
        check_count("num_terms", series.num_terms)
        self.neumann_lr = neumann_step(inner_lr, neumann_lr)
        self.inner_draws = num_inner_steps + series.num_terms + 1

    def _estimate(self, now: State, y: Tensor, inner: Iterator[Any], outer: Iterator[Any]) -> Estimate:
        sample = self._series.draw(inner, outer, self.num_steps)
        point = Point(self._oracles, y, now["outer"])
        return Estimate(*point.hypergradient(self._series, sample, self.neumann_lr))


def neumann_step(inner_lr: StepSize, neumann_lr: float | None) -> float:
    """The given step size of a Neumann series, or the first of ``inner_lr``: it must not decay, or the sum shrinks."""
    if neumann_lr is None:
        return size_at("inner_lr", inner_lr, 0)
    check_step_size("neumann_lr", neumann_lr)
    return neumann_lr
