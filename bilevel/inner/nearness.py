"""When a solve without a tolerance of the user's is near enough: by the step to the solution that the solver predicts.

A gradient norm has the units of the loss over those of the params, so no number of it is small by itself, and its size
at the start says nothing of the solution. The step to the solution has the units of the params: it is measured against
the params that were reached, so that neither the scales of loss, params and data nor the start matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tree import norm

PATIENCE = 10
"""Steps in which the predicted step does not halve, after which the precision is held to be used up."""

PROGRESS = 0.995
"""What a step that rounding does not hide leaves of the distance, at most."""

VANISHED = 1e-30
"""Part of the way that the params have come: what is shorter is zero."""

CRAWL = 0.3
"""The part of the step before that a short step is at least, where it crawls."""

STILL = 1e-2
"""Part of the wanted step that is the end by itself. A longer one may be short beside params whose origin is far from
them, or beside those of other units, and yet change the curvature: what is to vanish must have fallen as well."""


@dataclass(frozen=True)
class Goal:
    """How near is near enough, relative to the norm of the params.

    Attributes:
        wanted: a solve ends there. accepted: what counts as converged where rounding allows no more.
        promised: what holds when the adjoint solve looks again.
    """

    wanted: float
    accepted: float
    promised: float

    @classmethod
    def of(cls, dtype: torch.dtype, coarsest: torch.dtype | None = None) -> Goal:
        """That of a precision; where some params have a coarser one, no more is accepted or promised than theirs."""
        if coarsest not in (None, dtype):
            theirs = cls.of(coarsest)
            return replace(cls.of(dtype), accepted=theirs.accepted, promised=theirs.promised)
        if dtype == torch.float64:
            return cls(1e-9, 1e-7, 1e-6)
        if dtype == torch.float32:
            return cls(3e-5, 3e-4, 1e-3)
        roundoff = torch.finfo(dtype).eps
        return cls(4 * roundoff, 16 * roundoff, 64 * roundoff)


class Nearness:
    """The stopping rule, problem by problem; all tensors are of the batch shape.

    Args:
        like: the params at the start, ``[*batch, n]``. coarsest: the lowest precision among them.

    Attributes:
        predicted: the distance to the solution, as the last step says.
        crawled: how many short steps in a row were hardly shorter than the one before, for unknowns without a loss.
    """

    def __init__(self, like: Tensor, coarsest: torch.dtype):
        self.goal, self.start = Goal.of(like.dtype, coarsest), like
        self.roundoff = torch.finfo(coarsest).eps
        self.least = torch.full(like.shape[:-1], torch.inf, dtype=torch.float64, device=like.device)
        self.predicted = self.first = self.least
        self.largest = torch.zeros_like(self.least)
        self.idle = torch.zeros_like(self.least, dtype=torch.int64)
        self.crawled = self.idle
        self.near = self.flat = self.done = torch.zeros_like(self.idle, dtype=torch.bool)

    def look(
        self,
        predicted: Tensor,
        y: Tensor,
        decrement: Tensor | None = None,
        f: Tensor | None = None,
        settled: Tensor | None = None,
    ) -> Tensor:
        """Which problems have arrived.

        Args:
            predicted: the norm of the step to the solution. y: the params there.
            decrement: by how much the step lowers the loss, twice. f: the loss.
            settled: where a step that is short is the end, as far as is known beside (see `STILL`); None: by the
                decrement, where there is one, else anywhere.
        """
        # One short step may be chance: two in a row are not.
        chance = torch.where(torch.isinf(self.predicted), predicted, (predicted * self.predicted).sqrt())
        both = torch.maximum(predicted, chance)
        last, self.predicted = self.predicted, torch.where(self.done, self.predicted, predicted)
        near = both <= self.goal.accepted * norm(y)
        self.near = near
        if f is None:  # of unknowns that end at zero only the way that they have come has a scale
            travelled = norm(y - self.start)
            self.near = near | (predicted <= 10 * torch.finfo(y.dtype).eps * travelled)
            crawls = (predicted > CRAWL * last) & (predicted <= 1e-3 * norm(y))
            self.crawled = torch.where(self.done, self.crawled, torch.where(crawls, self.crawled + 1, 0 * self.crawled))
        # Of params that end at zero only the loss has a scale: the step does not change it any more.
        if decrement is not None and f is not None:
            self.first = torch.where(torch.isinf(self.first), decrement, self.first)
            self.flat = (decrement <= 2 * self.goal.wanted**2 * f.abs()) & (decrement <= self.goal.wanted * self.first)
            known, self.largest = self.largest > 0, torch.maximum(self.largest, decrement.nan_to_num(0.0, 0.0))
            if settled is None:
                fallen = decrement <= self.goal.promised**2 * self.largest
                settled = ~known | fallen | (predicted <= STILL * self.goal.wanted * norm(y))
        # A slow contraction must not pass for rounding: any progress counts, where no loss tells them apart.
        hurried = self.flat if f is None else near | self.flat
        progress = torch.where(hurried, 0.5, PROGRESS)
        waiting = self.acceptable & ~(predicted <= progress * self.least)
        self.idle = torch.where(waiting, self.idle + 1, torch.zeros_like(self.idle))
        self.least = torch.where(waiting, self.least, predicted)
        used_up = self.idle >= torch.where(self.flat, 2, PATIENCE)
        self.done = self.done | (self.reached(both, y) & (True if settled is None else settled)) | used_up
        return self.done

    def reached(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Where the step is as small as is wanted, or nothing beside the way that the params have come (to zero)."""
        return predicted <= torch.maximum(self.goal.wanted * norm(y), VANISHED * norm(y - self.start))

    def settled(self, step: Tensor, y: Tensor, bound: Tensor | None = None) -> Tensor:
        """Where each unknown of a system has arrived, in its own units.

        Args:
            step: to the solution, as the solver predicts it, ``[*batch, n]``. y: the params.
            bound: what is nothing beside the steps before, likewise; None: there were none, as at a warm start.
        """
        if bound is None:
            bound = self.goal.promised * y.abs() + 10 * self.roundoff * norm(y).unsqueeze(-1)
        return (step.abs() <= torch.maximum(bound, 100 * self.roundoff * y.abs())).all(-1)

    @property
    def acceptable(self) -> Tensor:
        """Which problems have converged as far as rounding allows, where no further progress is possible."""
        return self.near | self.flat
