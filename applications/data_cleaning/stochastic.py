"""The methods on mini-batches: step sizes tuned on the validation loss, then error against time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from applications.benchmarks.solutions import BATCHES, STOCHASTIC
from applications.data_cleaning.cleaning import Cleaning
from applications.data_cleaning.model import Model, Params, mean_loss
from applications.data_cleaning.scores import detection
from applications.data_cleaning.task import Task
from applications.stochastic_curves.methods import Batches
from applications.stochastic_curves.trace import Point, trace

INNER_FACTORS = (1.0, 4.0)
"""Of 1/L: the weights begin at 1/2, and a softmax seldom has its largest curvature."""
OUTER_FACTORS = (0.25, 1.0, 4.0, 16.0)
"""Of the outer step that each method has in the benchmarks."""
IMPLICIT = "implicit"
"""The name of full-batch implicit differentiation among the curves."""


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

    def longest_step(self) -> float:
        """1/L with L the largest curvature of the unweighted loss: |X|^2 / 2n and the penalty."""
        features = torch.cat([self.task.train.features, torch.ones(len(self.task.train), 1)], 1)
        return 1 / (float(torch.linalg.matrix_norm(features, 2)) ** 2 / len(features) / 2 + self.model.ridge)


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
        points = stochastic_curve(problem, name, candidate, seconds, measure_val_loss)
        found[candidate] = math.inf if "stopped" in points[-1] else points[-1]["validation loss"]
    return min(found, key=lambda candidate: found[candidate])


Measure = Callable[[MiniBatches, Params, Tensor], dict[str, float]]


def measure_val_loss(problem: MiniBatches, params: Params, logits: Tensor) -> dict[str, float]:
    with torch.no_grad():
        loss = problem.val_loss(params, logits).item()
    return {"validation loss": math.inf if math.isnan(loss) else loss}


def measure_all(problem: MiniBatches, params: Params, logits: Tensor) -> dict[str, float]:
    """Validation loss, test error in percent, and how well wrong labels are found, where a method stands."""
    error = 100 - problem.model.accuracy(params, problem.task.test)
    f1 = detection(logits.detach().sigmoid(), problem.task.wrong)["F1"]
    return {**measure_val_loss(problem, params, logits), "test error": error, "F1": f1}


def stochastic_curve(
    problem: MiniBatches, name: str, candidate: Candidate, seconds: float, measure: Measure = measure_all
) -> list[Point]:
    """One method from the start, for ``seconds`` of processor time on one thread."""
    kind, multiple, settings = STOCHASTIC[name]
    params, logits = problem.start()
    inner_lr = candidate.inner * problem.longest_step()
    # The weights' gradients are means over n examples of which each weight has one: steps grow with n.
    outer_lr = candidate.outer * (multiple * len(logits) / 2 or inner_lr)
    method = kind(
        params, logits, problem.train_loss, problem.val_loss, inner_lr=inner_lr, outer_lr=outer_lr, **settings
    )
    batches = Batches(len(problem.task.train), BATCHES, num_outer=len(problem.task.val))
    step = partial(batches.step, method)
    return trace(step, partial(measure, problem, params, logits), seconds, clock=time.process_time)


def implicit_curve(problem: MiniBatches, lr: float, seconds: float) -> list[Point]:
    """Full-batch implicit differentiation, as in the other setting, on the same clock."""
    cleaning = Cleaning(problem.model, problem.task, steps=sys.maxsize, lr=lr)
    records = cleaning.records()

    def step() -> float:
        record = next(records)
        return float(record["inner_steps"] + record["adjoint_steps"] + 2)

    def measure() -> dict[str, float]:
        return measure_all(problem, cleaning.params, cleaning.logits)

    return trace(step, measure, seconds, clock=time.process_time)
