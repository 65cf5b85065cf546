"""The settings of a hypergradient whose truth is known: which inner and linear solver, and how many steps of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import optuna
import optunahub

import bilevel as bl

PROBLEMS: dict[str, Callable[[], bl.problems.ClosedFormProblem]] = {
    "ridge": lambda: bl.problems.Ridge(per_feature=True),
    "quadratic": lambda: bl.problems.Quadratics(conditions=(300.0,)),
    "kernel ridge": bl.problems.KernelRidge,
}
METRICS = ("log10_error", "cost")
WORST = 3.0
"""The log10 of an error that counts as no answer at all: a diverged solve, or one that is not finite."""
BEST = -16.0


class Problem(optunahub.benchmarks.BaseProblem):
    """Solver settings of a hypergradient, scored against its closed form.

    A trial chooses an inner solver, a linear solver and what each of them needs; the search space is conditional, so it
    is suggested step by step. The same parameters always have the same values.

    Args:
        name: one of `Problem.available_names`.
        metrics: what is minimised, one or several of `Problem.available_metric_names`. ``log10_error``: of the relative
            error of the hypergradient, in [-16, 3]. ``cost``: gradients of the inner loss that were evaluated, a
            Hessian product counted as two.
        max_cost: a limit on ``cost``, as a constraint; None: no limit.
    """

    available_names = tuple(PROBLEMS)
    available_metric_names = METRICS

    def __init__(self, name: str = "ridge", metrics: tuple[str, ...] = ("log10_error",), max_cost: int | None = None):
        if name not in PROBLEMS:
            raise ValueError(f"name is {name!r}: there are {', '.join(PROBLEMS)}.")
        if not metrics or not set(metrics) <= set(METRICS):
            raise ValueError(f"metrics is {metrics!r}: one or several of {', '.join(METRICS)} are needed.")
        if max_cost is not None and not max_cost > 0:
            raise ValueError(f"max_cost is {max_cost}: it must be positive.")
        self.name, self.metric_names, self.max_cost = name, tuple(metrics), max_cost
        self._problem = PROBLEMS[name]()

    def __call__(self, trial: optuna.trial.BaseTrial) -> float | tuple[float, ...]:
        """Suggest the settings step by step, and score them."""
        inner = bl.tuning.suggest_inner_solver(trial, choices=("GradientDescent", "LBFGS", "NewtonCG"))
        linear = bl.tuning.suggest_linear_solver(trial, choices=("CG", "Jacobi-CG", "MINRES", "Neumann", "Identity"))
        found = self._score(inner, linear)
        for metric, value in found.items():
            trial.set_user_attr(metric, value)
        if self.max_cost is not None and isinstance(trial, optuna.Trial):
            bl.tuning.limit(trial, "cost", found["cost"], self.max_cost)
        values = tuple(found[metric] for metric in self.metric_names)
        return values if len(values) > 1 else values[0]

    def evaluate(self, params: dict[str, Any]) -> float | tuple[float, ...]:
        """The same for given parameters, such as ``trial.params``."""
        return self(optuna.trial.FixedTrial(params))

    @property
    def search_space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """There is none that could be listed: what is suggested depends on what was chosen before."""
        raise NotImplementedError("The search space is conditional: call the problem with a trial.")

    @property
    def directions(self) -> list[optuna.study.StudyDirection]:
        return [optuna.study.StudyDirection.MINIMIZE] * len(self.metric_names)

    def _score(self, inner: Any, linear: Any) -> dict[str, float]:
        """Error and cost of one hypergradient with these solvers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.SolveWarning)
            methods = {"trial": (inner, bl.Implicit(linear))}
            (row,) = bl.diagnostics.compare_methods(self._problem, methods, repeats=1).rows
        error = math.log10(max(row.error, 10**BEST)) if math.isfinite(row.error) else WORST
        cost = (row.evaluations or 0) + 2 * (row.products or 0)
        return {"log10_error": min(error, WORST), "cost": float(cost)}
