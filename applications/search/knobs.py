"""What can be chosen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from applications.frame.command import DataKnobs, Purposes, SolverKnobs, require, require_at_least_one


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """Held-out loss against time of BilevelSearchCV, GridSearchCV, RandomizedSearchCV and Optuna on the same folds."""

    data: str = "built-in"
    """built-in: eight contests from 1 to 1,000 hyperparameters. A set (diabetes, digits, mnist, ...), or a file (.npz):
    one penalty, and a penalty for each feature."""
    task: Literal["regression", "classification"] = "classification"
    """What the targets of --data are."""
    examples: int = 0
    """Take so many of --data, at random; 0: all."""
    per_feature: bool = True
    """Whether --data is searched with a penalty for each feature too."""
    repeats: int = 1
    """Splits into training and test examples, each with its own folds; the tables have the means."""
    candidates: int = 20
    """Trials of random search and of Optuna; the grids have up to 64."""

    solver_settings = ("tol", "max_iter", "n_starts")

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        own = ("data_root", "task", "examples", "per_feature")
        return {"other --data than what is built in": (self.data != "built-in", own)}

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "repeats", "candidates"

    def check(self) -> None:
        """See `SolverKnobs`."""
        require_at_least_one(self, "repeats", "candidates")
        require(self.examples >= 0, f"--examples is {self.examples}: a number of examples, or 0 for all.")
