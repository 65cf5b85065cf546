"""The methods that are compared, on the same folds: scikit-learn's searches, Optuna, and the hypergradient."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import optuna
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    BaseCrossValidator,
    GridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
)

from applications.frame.errors import UserError
from applications.frame.interruption import stop_if_asked
from applications.search.contests import Contest
from bilevel.sklearn import BilevelSearchCV

Params = dict[str, Any]

SETTINGS: dict[str, Any] = {"tol": 1e-4, "max_iter": 50, "n_starts": 1}
"""Settings of `BilevelSearchCV` in the comparison: a looser ``tol`` than its default, unseen in the tables."""

S = TypeVar("S", bound=BilevelSearchCV)


@dataclass(frozen=True)
class Task:
    """What a method is given: the training examples of one repeat, the folds, how many candidates, a seed.

    Attributes:
        settings: of `BilevelSearchCV`, in place of `SETTINGS`.
    """

    contest: Contest
    x: np.ndarray
    y: np.ndarray
    candidates: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scoring(self, model: Any, x: np.ndarray, y: np.ndarray) -> float:
        """The contest's score of a fitted model, between two of which a signal may end the step."""
        stop_if_asked()
        return float(get_scorer(self.contest.scoring)(model, x, y))

    def folds(self) -> BaseCrossValidator:
        kind = StratifiedKFold if self.contest.examples.num_classes else KFold
        return kind(5, shuffle=True, random_state=self.seed)


@dataclass(frozen=True)
class Found:
    """What a method tried, in order: parameters, their cross-validation losses, and its seconds in all by then."""

    params: list[Params]
    losses: np.ndarray
    seconds: np.ndarray

    def improvements(self) -> Iterable[int]:
        """The candidates that were better than all before."""
        best = np.inf
        for index, loss in enumerate(self.losses):
            if loss < best:
                best = loss
                yield index


def untuned(task: Task) -> Found:
    """The defaults."""
    losses = -cross_val_score(
        task.contest.estimator(), task.x, task.y, scoring=task.scoring, cv=task.folds(), error_score="raise"
    )
    return Found([{}], np.array([losses.mean()]), np.zeros(1))


def hypergradient(task: Task) -> Found:
    """`BilevelSearchCV` from the defaults."""
    search = search_of(task, BilevelSearchCV)
    return from_results(lambda: search.fit(task.x, task.y))


def search_of(task: Task, kind: type[S]) -> S:
    """The search of a task, not begun."""
    contest = task.contest
    space = {contest.key(name): bounds for name, bounds in contest.bounds.items()}
    settings = {**SETTINGS, **task.settings}
    return kind(contest.estimator(), space, cv=task.folds(), refit=False, random_state=task.seed, **settings)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what `BilevelSearchCV` would refuse, before anything is computed.

    Raises:
        UserError: naming the setting.
    """
    try:
        BilevelSearchCV(None, {}, **settings).check_settings()
    except ValueError as error:
        raise UserError(f"--solver: {error}") from error


def grid(task: Task) -> Found:
    """`GridSearchCV`; where a hyperparameter is a vector, with one value for all its entries."""
    contest = task.contest
    axes = {
        contest.key(name): [in_full(contest, name, value) for value in np.geomspace(*bounds, contest.grid)]
        for name, bounds in contest.bounds.items()
    }
    search = GridSearchCV(contest.estimator(), axes, scoring=task.scoring, cv=task.folds(), refit=False)
    return from_results(lambda: search.fit(task.x, task.y))


def random(task: Task) -> Found:
    """`RandomizedSearchCV`, log-uniform, each entry of a vector for itself."""
    contest = task.contest
    axes = {contest.key(name): LogUniform(*bounds, contest.sizes.get(name)) for name, bounds in contest.bounds.items()}
    search = RandomizedSearchCV(
        contest.estimator(),
        axes,
        n_iter=task.candidates,
        scoring=task.scoring,
        cv=task.folds(),
        refit=False,
        random_state=task.seed,
    )
    return from_results(lambda: search.fit(task.x, task.y))


def tree_parzen(task: Task) -> Found:
    """Optuna's default sampler, tree-structured Parzen estimators (Bergstra et al. 2011)."""
    contest, tried, seconds = task.contest, [], []
    folds = list(task.folds().split(task.x, task.y))

    def objective(trial: optuna.Trial) -> float:
        params = {}
        for name, bounds in contest.bounds.items():
            size = contest.sizes.get(name)
            entries = [trial.suggest_float(f"{name}{i}", *bounds, log=True) for i in range(size or 1)]
            params[contest.key(name)] = np.array(entries) if size else entries[0]
        model = contest.estimator().set_params(**params)
        losses = -cross_val_score(model, task.x, task.y, scoring=task.scoring, cv=folds)
        tried.append(params)
        seconds.append(time.process_time() - begin)
        return float(losses.mean())

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=task.seed))
    begin = time.process_time()
    study.optimize(objective, n_trials=task.candidates)
    return Found(tried, np.array([trial.value for trial in study.trials]), np.array(seconds))


METHODS: dict[str, Callable[[Task], Found]] = {
    "untuned": untuned,
    "grid": grid,
    "random": random,
    "Optuna": tree_parzen,
    "hypergradient": hypergradient,
}


@dataclass(frozen=True)
class LogUniform:
    """As scikit-learn asks a distribution for a draw; of a vector each entry is drawn."""

    low: float
    high: float
    size: int | None

    def rvs(self, random_state: np.random.RandomState) -> Any:
        return np.exp(random_state.uniform(np.log(self.low), np.log(self.high), self.size))


def in_full(contest: Contest, name: str, value: float) -> Any:
    """The value, or a vector of it."""
    size = contest.sizes.get(name)
    return np.full(size, value) if size else float(value)


def from_results(fit: Callable[[], Any]) -> Found:
    """What a search in scikit-learn's form tried; its CPU time is shared out as the candidates' own times are."""
    begin = time.process_time()
    results = fit().cv_results_
    total = time.process_time() - begin
    each = results["mean_fit_time"] + results["mean_score_time"]
    return Found(results["params"], -results["mean_test_score"], total * np.cumsum(each) / each.sum())


def held_out(contest: Contest, params: Params, train: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...]) -> float:
    """Loss on the test examples of the model fitted on all training examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = clone(contest.estimator()).set_params(**params).fit(*train)
    return -float(get_scorer(contest.scoring)(fitted, *test))
