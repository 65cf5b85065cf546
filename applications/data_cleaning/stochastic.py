"""The methods on mini-batches: step sizes tuned on the validation loss, then error against time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import torch
from torch import Tensor

import bilevel as bl
from applications.data_cleaning.cleaning import Cleaning
from applications.data_cleaning.model import SOLVER, Model, Params, mean_loss
from applications.data_cleaning.scores import detection
from applications.data_cleaning.task import Task
from applications.frame.mini_batches import BATCHES, STOCHASTIC, Batches
from applications.frame.trace import Point, trace

INNER_FACTORS = (1.0, 4.0)
"""Multiples of 1/L: the weights begin at 1/2, and a softmax seldom has its largest curvature."""
OUTER_FACTORS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Multiples of the outer step that each method has in the benchmarks."""
IMPLICIT = "implicit"
"""The name of full-batch implicit differentiation among the curves."""
GROWTH = 1.35
"""Growth of the steps between two points of a curve: each point costs an inner solve."""


@dataclass(frozen=True)
class MiniBatches:
    """The problem of `Cleaning` as a mean over batches; a batch is a tensor of indices, None all the data."""

    model: Model
    task: Task

    def start(self) -> tuple[Params, Tensor]:
        params = {name: value.requires_grad_() for name, value in self.model.start().items()}
        return params, torch.zeros(len(self.task.train), requires_grad=True)

    def train_loss(self, params: Params, logits: Tensor, batch: Tensor | None = None) -> Tensor:
        data, chosen = (self.task.train, logits) if batch is None else (self.task.train[batch], logits[batch])
        return self.model.loss(params, data, chosen.sigmoid())

    def val_loss(self, params: Params, logits: Tensor, batch: Tensor | None = None) -> Tensor:
        data = self.task.val if batch is None else self.task.val[batch]
        return mean_loss(self.model.logits(params, data.features), data.labels)

    def solve(self, logits: Tensor, start: Params) -> Params:
        """W*(x)."""
        fit = bl.argmin(self.train_loss, start, logits.detach(), solver=SOLVER, hypergrad=None, throw="ignore")
        found: Params = fit.value
        return found

    @cached_property
    def solution_at_start(self) -> Params:
        """W*(0), from which the first solve of every curve goes on."""
        return self.solve(torch.zeros(len(self.task.train)), self.model.start())

    @cached_property
    def longest_step(self) -> float:
        """1/L with L the largest curvature of the unweighted loss: |X|^2 / 2n and the penalty."""
        features = torch.cat([self.task.train.features, torch.ones(len(self.task.train), 1)], 1)
        return 1 / (float(torch.linalg.matrix_norm(features, 2)) ** 2 / len(features) / 2 + self.model.ridge)


class Judge:
    """What weights are worth: validation loss and test error (%) at the exact inner solution, and what they find.

    Not at the method's own inner variables: those of a penalty method are drawn towards the validation data.
    """

    def __init__(self, problem: MiniBatches):
        self.problem, self.params = problem, problem.solution_at_start

    def __call__(self, logits: Tensor) -> dict[str, float]:
        model, task = self.problem.model, self.problem.task
        self.params = self.problem.solve(logits, self.params)
        with torch.no_grad():
            loss = self.problem.val_loss(self.params, logits).item()
        return {
            "validation loss": math.inf if math.isnan(loss) else loss,
            "test error": 100 - model.accuracy(self.params, task.test),
            "F1": detection(logits.detach().sigmoid(), task.wrong)["F1"],
        }


@dataclass(frozen=True)
class Candidate:
    """Step sizes of a method, as multiples: of 1/L, and of the outer step that it has in the benchmarks."""

    inner: float
    outer: float


def tune(problem: MiniBatches, name: str, seconds: float) -> Candidate:
    """The candidate of the least validation loss after ``seconds``, each from the start, none with the test data.

    All methods have the same grid and the same time; one that diverges has lost.
    """
    found = {}
    for inner, outer in product(INNER_FACTORS, OUTER_FACTORS):
        candidate = Candidate(inner, outer)
        step, logits = begin(problem, name, candidate)
        points = trace(step, dict, seconds, clock=time.process_time)
        diverged = "stopped" in points[-1]
        found[candidate] = math.inf if diverged else Judge(problem)(logits)["validation loss"]
    return min(found, key=lambda candidate: found[candidate])


def begin(problem: MiniBatches, name: str, candidate: Candidate) -> tuple[Callable[[], float], Tensor]:
    """A method at the start: what makes a step and returns its cost in passes, and the logits that it moves."""
    kind, multiple, settings = STOCHASTIC[name]
    params, logits = problem.start()
    inner_lr = candidate.inner * problem.longest_step
    # The slope of a weight is 1/n of the mean loss's: steps grow with n. BOME has one step size for both levels.
    outer_lr = candidate.outer * (multiple * len(logits) / 2 or inner_lr)
    method = kind(
        params, logits, problem.train_loss, problem.val_loss, inner_lr=inner_lr, outer_lr=outer_lr, **settings
    )
    batches = Batches(len(problem.task.train), BATCHES, num_outer=len(problem.task.val))
    return partial(batches.step, method), logits


def stochastic_curve(problem: MiniBatches, name: str, candidate: Candidate, seconds: float) -> list[Point]:
    """One method from the start, for ``seconds`` of processor time on one thread, without those of the judge."""
    step, logits = begin(problem, name, candidate)
    return trace(step, partial(Judge(problem), logits), seconds, growth=GROWTH, clock=time.process_time)


def implicit_curve(problem: MiniBatches, lr: float, seconds: float) -> list[Point]:
    """Full-batch implicit differentiation, as in the other setting, on the same clock."""
    cleaning = Cleaning(problem.model, problem.task, steps=sys.maxsize, lr=lr)
    rows = cleaning.rows()

    def step() -> float:
        row = next(rows)
        return float(row["inner_steps"] + row["adjoint_steps"] + 2)

    measure = partial(Judge(problem), cleaning.logits)
    return trace(step, measure, seconds, growth=GROWTH, clock=time.process_time)
