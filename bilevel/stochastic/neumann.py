"""Hypergradient estimates by Neumann series of mini-batch Hessian products: what needs no adjoint kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..notices import tell
from ..solution import SolveWarning
from ..tree import norm
from .base import Advance, State, Step, Stochastic
from .divergence import Growth
from .oracles import Batch, Linearized, Oracles
from .schedule import StepSize, check_count, check_positive, peak


@dataclass(frozen=True)
class Sample:
    """The batches of one estimate, kept so that it can be repeated at another point."""

    outer: Batch
    hessian: tuple[Batch, ...]
    cross: Batch


class Series(Protocol):
    """A stochastic approximation of H^-1 b."""

    @property
    def num_terms(self) -> int: ...

    def draw(self, inner: Iterator[Batch], outer: Iterator[Batch], step: int) -> Sample: ...

    def invert(self, at: Point, b: Tensor, sample: Sample, lr: float) -> Tensor: ...


@dataclass(frozen=True)
class NeumannSum:
    """``lr sum_{q=0}^{Q} prod_{i=1}^{q} (I - lr H_i) b`` with Q = ``num_terms`` products (Ji et al. 2021).

    For lr at most 1/L its error is (1 - lr mu)^(Q+1), a bias.
    """

    num_terms: int

    def draw(self, inner: Iterator[Batch], outer: Iterator[Batch], step: int) -> Sample:
        return Sample(next(outer), tuple(next(inner) for _ in range(self.num_terms)), next(inner))

    def invert(self, at: Point, b: Tensor, sample: Sample, lr: float) -> Tensor:
        term = total = b
        for batch in sample.hessian:
            term = term - lr * at.linearize(batch).product(term)
            total = total + term
        at.growth = norm(term) / norm(b)
        return lr * total


@dataclass(frozen=True)
class NeumannTerm:
    """One term of that sum at random: ``lr Q prod_{i=1}^{p} (I - lr H_i) b``, p uniform in {0, ..., Q-1}.

    Its mean is the sum of Q terms, at half the products, for much variance (Ghadimi and Wang 2018). p follows
    from ``seed`` and the step number, so that a resumed run draws the same.
    """

    num_terms: int
    seed: int = 0

    def draw(self, inner: Iterator[Batch], outer: Iterator[Batch], step: int) -> Sample:
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        count = int(torch.randint(self.num_terms, (), generator=random, device="cpu"))
        return Sample(next(outer), tuple(next(inner) for _ in range(count)), next(inner))

    def invert(self, at: Point, b: Tensor, sample: Sample, lr: float) -> Tensor:
        term = b
        for batch in sample.hessian:
            term = term - lr * at.linearize(batch).product(term)
        at.growth = norm(term) / norm(b)
        return lr * self.num_terms * term


@dataclass
class Point:
    """(y, x), with the graph of the batch that was asked for last: equal batches in a row are linearized once.

    Attributes:
        growth: the last term of a Neumann series here over the first.
    """

    oracles: Oracles
    y: Tensor
    x: Tensor
    last: tuple[Batch, Linearized] | None = None
    growth: Tensor | None = None

    def linearize(self, batch: Batch) -> Linearized:
        if self.last is None or self.last[0] is not batch:
            self.last = (batch, self.oracles.linearize(self.y, self.x, batch))
        return self.last[1]

    def hypergradient(self, series: Series, sample: Sample, lr: float) -> tuple[Tensor, Tensor]:
        """The outer loss, and ``grad_x f - (d_x grad_y g)^T u`` with u the approximation of H^-1 grad_y f."""
        f = self.oracles.outer_gradients(self.y, self.x, sample.outer)
        u = series.invert(self, f.inner, sample, lr)
        return f.loss, f.outer - self.linearize(sample.cross).cross(u)


def check_seed(seed: int) -> int:
    return check_count("seed", seed, least=0)


@dataclass(eq=False, repr=False, kw_only=True)
class NeumannMethod(Stochastic):
    """Base of the methods that invert the Hessian by a Neumann series."""

    num_terms: int = 10
    neumann_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        follows, self.neumann_lr = self.neumann_lr is None, neumann_step(self.inner_lr, self.neumann_lr)
        self._follows, self._grown = follows, cast("Tensor | None", None)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_follows" not in self.__dict__:
            return
        if name == "neumann_lr":
            self.__dict__.update(_follows=value is None, neumann_lr=neumann_step(self.inner_lr, value))
        if name == "inner_lr" and self._follows:  # not where it is lowered: that may be a decay
            self.__dict__["neumann_lr"] = max(self.neumann_lr or 0.0, float(peak(value)))

    def _check(self) -> None:
        super()._check()
        check_count("num_terms", self.num_terms)
        neumann_step(self.inner_lr, self.neumann_lr)
        self._series()

    def _series(self) -> Series:
        return NeumannSum(self.num_terms)

    def _draw(self, inner: Iterator[Batch], outer: Iterator[Batch]) -> Sample:
        return self._series().draw(inner, outer, self.num_steps)

    def _hypergradient(self, at: Point, sample: Sample) -> tuple[Tensor, Tensor]:
        assert self.neumann_lr is not None
        found = at.hypergradient(self._series(), sample, self.neumann_lr)
        self._grown = at.growth
        return found

    def _judge(self, now: State, found: Advance, record: Step, inner: list[Batch], outer: list[Batch]) -> Growth:
        growth = super()._judge(now, found, record, inner, outer)
        if self._grown is not None and float(self._grown) > GROWN:
            name = type(self).__name__
            text = GROWS.format(name=name, step=self.num_steps, growth=float(self._grown), lr=self.neumann_lr)
            tell(text, SolveWarning, kind=(name, "neumann"))
        return growth


GROWN = 2.0
"""A last term so many times as long as the first is of a series that does not converge."""
GROWS = (
    "{name}, step {step}: the terms of the Neumann series grow, the last one to {growth:.2g} times the first, so that "
    "their sum is not the adjoint and the hypergradient is wrong: neumann_lr = {lr:.4g} is above 2/L, with L the "
    "largest curvature of inner_loss, or inner_loss has negative curvature here. Lower neumann_lr (step_sizes(...) "
    "measures L), or take a method that keeps an adjoint, such as SOBA or AmIGO, with longest_move."
)


def neumann_step(inner_lr: StepSize, neumann_lr: float | None) -> float:
    """The given step size of a Neumann series, or the peak of ``inner_lr``.

    It must not follow a schedule: the sum is in proportion to it where the terms do not make up for it, so that a
    step of a warm-up, or of the end of a decay, would shrink the adjoint.
    """
    if neumann_lr is not None:
        return check_positive("neumann_lr", neumann_lr)
    highest = peak(inner_lr)
    if not highest > 0:
        raise ValueError(
            f"neumann_lr is {highest}, the largest of inner_lr: the series would be zero. Give neumann_lr, at most "
            "1/L with L the largest curvature of the inner loss."
        )
    return float(highest)
