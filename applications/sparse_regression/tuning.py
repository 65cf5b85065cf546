"""What ``python -m applications.sparse_regression tune`` searches: the linear solve for the hypergradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import optuna
import torch

import bilevel as bl
from applications.frame import tune
from applications.sparse_regression.criterion import Criterion
from applications.sparse_regression.descent import Descent
from applications.sparse_regression.folds import Folds
from applications.sparse_regression.knobs import Config, study
from applications.sparse_regression.penalties import Penalty

ITERATIVE = {"CG": bl.CG, "MINRES": bl.MINRES, "Neumann": bl.Neumann}


def tunable(knobs: Config) -> tune.Tunable:
    """A penalty for each feature on every data set of the knobs, side by side; each seed is a draw of its own.

    The fits are always coordinate descent's, and exact: they are what the hypergradient is derived at.

    Raises:
        UserError: bad data.
    """
    for name in knobs.data:
        study(knobs, name, knobs.seed)

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        # A residual and no number of steps: how many a system needs grows with its support. No `Identity`: these
        # descents find their own step size and cannot tell its factor, which those with a pull depend on.
        kind = trial.suggest_categorical("linear", [*ITERATIVE, "Jacobi-CG", "Nystrom-CG"])
        rtol = trial.suggest_float("linear.rtol", 1e-10, 0.5, log=True)
        if kind == "Jacobi-CG":
            preconditioner: Any = bl.Jacobi(trial.suggest_int("linear.num_probes", 1, 20, log=True))
        elif kind == "Nystrom-CG":
            preconditioner = bl.NystromPreconditioner(trial.suggest_int("linear.rank", 1, 40, log=True))
        else:
            return {"hypergrad": bl.Implicit(ITERATIVE[kind](rtol=rtol))}
        return {"hypergrad": bl.Implicit(bl.CG(rtol=rtol, preconditioner=preconditioner))}

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        descents = [descent(knobs, name, seed, settings) for name in knobs.data]
        without = [one.criterion.without_features() for one in descents]

        def score() -> float:
            parts = [one.at.criterion / v for one, v in zip(descents, without, strict=True) if one.at is not None]
            return sum(parts) / len(parts)

        return ((step, score, None) for step in evaluate(descents))

    default = {"linear": "CG", "linear.rtol": 1e-8}
    return tune.Tunable("criterion, part of the variance", "minimize", default, suggest, train, seconds=0.8, steps=8)


def evaluate(descents: list[Descent]) -> Iterator[int]:
    """One evaluation of each that has not ended, at every step, until all have."""
    rows, step = [one.rows() for one in descents], 0
    while any([next(one, None) is not None for one in rows]):
        step += 1
        yield step


def descent(knobs: Config, name: str, seed: int, settings: tune.Settings) -> Descent:
    """On a penalty for each feature, from a tenth of that which selects none."""
    one = study(knobs, name, seed)
    folds = Folds.make(one.features, one.targets, knobs.folds, one.shuffle, one.intercept)
    penalty = Penalty(torch.arange(len(one.noise)))
    start = torch.full((penalty.size,), math.log(folds.largest_penalty() / 10), dtype=torch.float64)
    return Descent(Criterion(folds, penalty, **settings), start, knobs.evaluations)
