"""All methods on all contests, one after another: a training that can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge

from applications.frame.data import split
from applications.frame.run import Row
from applications.search.contests import Contest
from applications.search.methods import METHODS, Task, held_out
from bilevel.sklearn import BilevelSearchCV

TEST_SHARE = 0.4


def warm_up() -> None:
    """Before any clock runs: what PyTorch sets up at its first derivative."""
    x = np.linspace(-1, 1, 20)[:, None]
    BilevelSearchCV(Ridge(), {"alpha": (0.1, 10)}).fit(x, x[:, 0])


def parts_of(contest: Contest, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features and targets of the training and of the test examples."""
    parts = split(contest.examples, [1 - TEST_SHARE, TEST_SHARE], seed)
    return [(np.asarray(part.features), part.targets) for part in parts]


class Comparison:
    """A step is one method on one contest and one split into training and test examples.

    The test examples are looked at when a method has ended, and by no method: its record has their loss for each
    candidate that was the best so far by cross-validation.

    Args:
        repeats: splits, each with its own folds. candidates: of random search and Optuna.
        settings: of `BilevelSearchCV`, in place of `methods.SETTINGS`.
    """

    def __init__(
        self,
        contests: list[Contest],
        repeats: int,
        candidates: int,
        seed: int,
        settings: Mapping[str, Any] | None = None,
    ):
        self.candidates, self.seed, self.settings, self.step = candidates, seed, settings or {}, 0
        self.plan = [
            (contest, repeat, method) for contest in contests for repeat in range(repeats) for method in METHODS
        ]
        self.steps = len(self.plan)
        for contest in contests:  # whether every class is in every part is known before anything is computed
            for repeat in range(repeats):
                parts_of(contest, self.seed + repeat)

    def rows(self) -> Iterator[Row]:
        warm_up()
        while self.step < self.steps:
            contest, repeat, method = self.plan[self.step]
            row = self._compare(contest, repeat, method)
            self.step += 1
            yield {"step": self.step, "contest": contest.name, "repeat": repeat, "method": method, **row}

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def _compare(self, contest: Contest, repeat: int, method: str) -> Row:
        train, test = parts_of(contest, self.seed + repeat)
        found = METHODS[method](Task(contest, *train, self.candidates, self.seed + repeat, self.settings))
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
