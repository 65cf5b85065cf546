"""Four ways to choose the penalties; each yields a point and its validation loss every time it has one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

import bilevel as bl
from applications.measurements.compare.problem import HIGH, LOW, Penalties

Points = Iterator[tuple[float, Tensor]]
"""Validation loss, and the weights that have it."""


def hypergradient(problem: Penalties, seed: int) -> Points:
    """Adam on the log-penalties with implicit hypergradients, warm-started; nothing in it is random."""
    x, fit = problem.start().requires_grad_(), None
    optimizer = torch.optim.Adam([x], lr=0.3)
    while True:
        fit = problem.fit(x, fit, bl.Implicit(bl.CG(rtol=1e-3)))
        loss = problem.val.loss(fit.value)
        yield float(loss.detach()), fit.value.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(LOW, HIGH)


def black_box(problem: Penalties, sampler: optuna.samplers.BaseSampler) -> Points:
    """An Optuna study over the box, from the same start; each trial is one fit, warm-started too."""
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"x{i}": optuna.distributions.FloatDistribution(LOW, HIGH) for i in range(problem.size)
    }
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({name: float(value) for name, value in zip(space, problem.start(), strict=True)})
    fit = None
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = study.ask(space)
        x = torch.tensor([trial.params[name] for name in space], dtype=torch.float64)
        fit = problem.fit(x, fit)
        loss = float(problem.val.loss(fit.value))
        study.tell(trial, loss)
        yield loss, fit.value


METHODS: dict[str, Callable[[Penalties, int], Points]] = {
    "hypergradient": hypergradient,
    "TPE": lambda problem, seed: black_box(problem, optuna.samplers.TPESampler(seed=seed)),
    "Gaussian process": lambda problem, seed: black_box(problem, optuna.samplers.GPSampler(seed=seed)),
    "random": lambda problem, seed: black_box(problem, optuna.samplers.RandomSampler(seed=seed)),
}


def trace(
    points: Points, seconds: float, test: Callable[[Tensor], Tensor], clock: Callable[[], float]
) -> dict[str, Any]:
    """Best validation loss so far against seconds, until the time is over; a trial that ends after it does not count.

    Returns:
        ``curve`` [seconds, loss] at each improvement, ``evaluations``, and the ``test`` loss of the best point.
    """
    begin, best, curve, evaluations, held_out = clock(), np.inf, [], 0, None
    for loss, weights in points:
        elapsed = clock() - begin
        if elapsed > seconds and evaluations:
            break
        evaluations += 1
        if loss < best:
            best, held_out = loss, float(test(weights))
            curve.append([round(elapsed, 4), loss])
        begin += (clock() - begin) - elapsed  # the test loss is off the clock
    return {"curve": curve, "evaluations": evaluations, "test": held_out}
