"""`TwoLoops`: some steps on the inner problem, an estimate of the hypergradient, one step on the outer problem."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from .base import Advance, State, Stochastic
from .neumann import NeumannMethod, Point
from .oracles import Batch
from .schedule import check_count


@dataclass(frozen=True)
class Estimate:
    """The outer loss, the hypergradient, the linear residual where there is one, and the vectors to keep."""

    outer_loss: Tensor
    outer: Tensor
    linear: Tensor | None = None
    kept: State = field(default_factory=dict)


@dataclass(eq=False, repr=False, kw_only=True)
class TwoLoops(Stochastic):
    """Base of the methods with an inner loop, warm-started where the last one ended."""

    num_inner_steps: int = 10

    def _check(self) -> None:
        super()._check()
        check_count("num_inner_steps", self.num_inner_steps)

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
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
    def _estimate(self, now: State, y: Tensor, inner: Iterator[Batch], outer: Iterator[Batch]) -> Estimate:
        """The hypergradient at the new ``y`` and the old ``x``."""


@dataclass(eq=False, repr=False, kw_only=True)
class NeumannLoops(TwoLoops, NeumannMethod):
    """Two loops with a Neumann series for the adjoint: their base."""

    def _draws(self) -> tuple[int, int]:
        return self.num_inner_steps + self.num_terms + 1, 1

    def _estimate(self, now: State, y: Tensor, inner: Iterator[Batch], outer: Iterator[Batch]) -> Estimate:
        return Estimate(*self._hypergradient(Point(self._oracles, y, now["outer"]), self._draw(inner, outer)))
