"""All methods on all contests, one after another: a training that can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge

from applications.data import split
from applications.run import Row
from applications.search.contests import Contest
from applications.search.estimator import BilevelSearchCV
from applications.search.methods import METHODS, Task, held_out

TEST_SHARE = 0.4


def warm_up() -> None:
    """Before any clock runs: what PyTorch sets up at its first derivative."""
    x = np.linspace(-1, 1, 20)[:, None]
    BilevelSearchCV(Ridge(), {"alpha": (0.1, 10)}).fit(x, x[:, 0])


class Comparison:
    """A step is one method on one contest and one split into training and test examples.

    The test examples are looked at when a method has ended, and by no method: its record has their loss for each
    candidate that was the best so far by cross-validation.

    Args:
        repeats: splits, each with its own folds. candidates: of random search and Optuna.
    """

    def __init__(self, contests: list[Contest], repeats: int, candidates: int, seed: int):
        self.candidates, self.seed, self.step = candidates, seed, 0
        self.plan = [
            (contest, repeat, method) for contest in contests for repeat in range(repeats) for method in METHODS
        ]
        self.steps = len(self.plan)
        for contest in contests:  # whether every class is in every part is known before anything is computed
            for repeat in range(repeats):
                self._parts(contest, repeat)

    def records(self) -> Iterator[Row]:
        warm_up()
        while self.step < self.steps:
            contest, repeat, method = self.plan[self.step]
            record = self._compare(contest, repeat, method)
            self.step += 1
            yield {"step": self.step, "contest": contest.name, "repeat": repeat, "method": method, **record}

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def _parts(self, contest: Contest, repeat: int) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = split(contest.examples, [1 - TEST_SHARE, TEST_SHARE], self.seed + repeat)
        return [(np.asarray(part.features), part.targets) for part in parts]

    def _compare(self, contest: Contest, repeat: int, method: str) -> Row:
        train, test = self._parts(contest, repeat)
        found = METHODS[method](Task(contest, train[0], train[1], self.candidates, self.seed + repeat))
        curve = [
            [float(found.seconds[i]), float(found.losses[i]), held_out(contest, found.params[i], train, test)]
            for i in found.improvements()
        ]
        return {
            "candidates": len(found.losses),
            "search_seconds": float(found.seconds[-1]),
            "cv_loss": curve[-1][1],
            "test_loss": curve[-1][2],
            "curve": curve,
        }
