"""What can be chosen, and the data that it gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import bilevel as bl
from applications.frame.command import Purposes, SolverKnobs, require, require_at_least_one
from applications.frame.tune import rehearse_minimum
from applications.sparse_regression.criterion import SETTINGS
from applications.sparse_regression.data import Study, draw


@dataclass(frozen=True)
class Config(SolverKnobs):
    """Penalties of the lasso family by the hypergradient of the cross-validation loss, beside scikit-learn's grids."""

    data: tuple[str, ...] = ("diabetes", "synthetic")
    """Any of diabetes, synthetic, sparse-ho (the published example), files (.npz with features and targets, .svm)."""
    draws: int = 2
    """Splits of real data, or simulations, of which the tables have the means."""
    folds: int = 5
    """Folds of the cross-validation; 1: a third of the training examples is held out."""
    evaluations: int = 30
    """Evaluations of the criterion and its hypergradient in each descent, at most; each is a fit of every fold."""
    test_size: float = 0.3
    """Part of real data that is kept for the test."""
    noise_features: int = 100
    """Columns of pure noise that are appended to real data: good penalties do not select them."""
    block_size: int = 20
    """Consecutive features that share a block, in the synthetic data and in files."""

    solver_settings = ("hypergrad",)

    length = "evaluations"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        rehearse_minimum({"solver": bl.ProximalGradient(bl.prox.L1(0.1)), **SETTINGS, **settings})

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        given = set(self.data) - {"sparse-ho"}
        return {
            "real data": (bool(given - {"synthetic"}), ("test_size", "noise_features")),
            "synthetic data and files": (bool(given - {"diabetes"}), ("block_size",)),
        }

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return ("draws",)

    def check(self) -> None:
        require(len(self.data) > 0, "--data names no data set: give diabetes, synthetic, sparse-ho or a file.")
        require(len(set(self.data)) == len(self.data), f"--data names one twice: {' '.join(self.data)}.")
        require_at_least_one(self, "draws", "folds", "block_size")
        require(self.evaluations >= 2, f"--evaluations is {self.evaluations}: at least 2 are needed.")
        require(0 < self.test_size < 1, f"--test-size is {self.test_size}: a part between 0 and 1 is needed.")
        require(self.noise_features >= 0, f"--noise-features is {self.noise_features}: it cannot be negative.")


def study(knobs: Config, name: str, seed: int) -> Study:
    """One draw, large enough for its folds.

    Raises:
        UserError: bad data, or too few examples.
    """
    one = draw(name, seed, knobs.test_size, knobs.noise_features, knobs.block_size)
    count, smallest = len(one.targets), max(4 * knobs.folds, 12)
    require(
        count >= smallest,
        f"{name} has {count} training examples for {knobs.folds} folds: at least {smallest} are needed. "
        "Take a smaller --test-size or fewer --folds.",
    )
    return one
