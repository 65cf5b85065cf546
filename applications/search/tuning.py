"""What ``python -m applications.search tune`` searches: when `BilevelSearchCV` stops, and how often it starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import optuna
from sklearn.exceptions import ConvergenceWarning

from applications.frame import tune
from applications.search.comparison import parts_of
from applications.search.contests import Contest, contests_of
from applications.search.knobs import Config
from applications.search.methods import SETTINGS, Task, search_of
from applications.search.one_by_one import one_by_one
from bilevel.sklearn import BilevelSearchCV, Evaluation

BUILT_IN = "diabetes, penalty a feature"
"""A quick contest with ten hyperparameters: a search of a second, in which each setting counts."""


def tunable(knobs: Config) -> tune.Tunable:
    """The search of one contest: `BUILT_IN`, or of --data the one with most hyperparameters.

    An outer step is one evaluation of all folds. A search ends by itself. Each seed has its own training examples (the
    test examples are never looked at), folds and random starts.

    Raises:
        UserError: bad data.
    """
    tuned(knobs, knobs.seed)  # bad data is told now

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        return {
            "tol": trial.suggest_float("tol", 1e-6, 1e-1, log=True),
            "max_iter": trial.suggest_int("max_iter", 2, 200, log=True),
            "n_starts": trial.suggest_int("n_starts", 1, 16, log=True),
        }

    def train(settings: tune.Settings, seed: int) -> Iterator[tuple[int, float, None]]:
        contest = tuned(knobs, seed)
        x, y = parts_of(contest, seed)[0]
        search = search_of(Task(contest, x, y, knobs.candidates, seed, settings), Watched)
        return least(quietly(search.losses(x, y)))

    return tune.Tunable("cross-validation loss", "minimize", SETTINGS, suggest, train, seconds=3.0, steps=tune.UNENDING)


def tuned(knobs: Config, seed: int) -> Contest:
    contests = contests_of(knobs, seed)
    if knobs.data == "built-in":
        return next(contest for contest in contests if contest.name == BUILT_IN)
    return contests[-1]


def least(losses: Iterator[float]) -> Iterator[tuple[int, float, None]]:
    """The number of each evaluation, and the least loss so far."""
    best = math.inf
    for step, loss in enumerate(losses, 1):
        best = min(best, loss)
        yield step, best, None


def quietly(losses: Iterator[float]) -> Iterator[float]:
    """Without the warning that ``max_iter`` was reached: here that is a choice like others."""
    while True:
        with warnings.catch_warnings():  # around each one: the filters are those of the process
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = next(losses, None)
        if found is None:
            return
        yield found


class Watched(BilevelSearchCV):
    """Its evaluations one by one."""

    give: Callable[[float], None]

    def losses(self, x: np.ndarray, y: np.ndarray) -> Iterator[float]:
        """The loss of each evaluation; the search waits until the next is asked for."""

        def search(give: Callable[[float], None]) -> None:
            self.give = give
            self.fit(x, y)

        return one_by_one(search)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.give(float(evaluation.test_losses.mean()))
