"""``python -m applications.sparse_regression``: one penalty, two, one for each block, one for each feature."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from applications.command import Knobs, main, require, require_at_least_one
from applications.run import Run, slug
from applications.sparse_regression import plots
from applications.sparse_regression.compare import Comparison, compare, means
from applications.sparse_regression.data import Study, draw


@dataclass(frozen=True)
class Config(Knobs):
    """Penalties of the lasso family by the hypergradient of the cross-validation loss, beside scikit-learn's grids."""

    data: tuple[str, ...] = ("diabetes", "synthetic")
    """Any of diabetes, synthetic, sparse-ho (the published example), files (.npz with features and targets, .svm)."""
    draws: int = 2
    """Splits of real data, or simulations, of which the tables have the means."""
    folds: int = 5
    """Of the cross-validation; 1: a third of the training examples is held out."""
    evaluations: int = 30
    """Of the criterion and its hypergradient in each descent, at most; each is a fit of every fold."""
    test_size: float = 0.3
    """Part of real data that is kept for the test."""
    noise_features: int = 100
    """Columns of pure noise that are appended to real data: good penalties do not select them."""
    block_size: int = 20
    """Consecutive features that share a block, in the synthetic data and in files."""

    def check(self) -> None:
        require(len(self.data) > 0, "--data names no data set: give diabetes, synthetic, sparse-ho or a file.")
        require(len(set(self.data)) == len(self.data), f"--data names one twice: {' '.join(self.data)}.")
        require_at_least_one(self, "draws", "folds", "block_size")
        require(self.evaluations >= 2, f"--evaluations is {self.evaluations}: at least 2 are needed.")
        require(0 < self.test_size < 1, f"--test-size is {self.test_size}: a part between 0 and 1 is needed.")
        require(self.noise_features >= 0, f"--noise-features is {self.noise_features}: it cannot be negative.")


def story(knobs: Config, run: Run) -> None:
    """For each data set: every draw by every method, the table of their means, and pictures of the first."""
    studies = {name: [study(knobs, name, index) for index in range(knobs.draws)] for name in knobs.data}
    for name, draws in studies.items():
        examples, features = draws[0].features.shape
        run.say(f"{name}: {examples} training examples, {features} features, {knobs.draws} draws")
        comparisons = [
            compare(run, f"{name} {index + 1}", one, knobs.folds, knobs.evaluations) for index, one in enumerate(draws)
        ]
        run.table(f"{name}: means of {knobs.draws}", means(comparisons))
        pictures(run, comparisons[0])


def study(knobs: Config, name: str, index: int) -> Study:
    """One draw, large enough for its folds."""
    one = draw(name, knobs.seed + index, knobs.test_size, knobs.noise_features, knobs.block_size)
    count, smallest = len(one.targets), max(4 * knobs.folds, 12)
    require(
        count >= smallest,
        f"{name} has {count} training examples for {knobs.folds} folds: at least {smallest} are needed. "
        "Take a smaller --test-size or fewer --folds.",
    )
    return one


def pictures(run: Run, comparison: Comparison) -> None:
    name = slug(comparison.study.name)
    run.picture(f"{name}-one-penalty.png", plots.one_penalty(comparison))
    run.picture(f"{name}-penalties.png", plots.penalties(comparison))
    along = run.part(f"{comparison.label}, test errors of the descents", lambda: plots.test_errors(comparison))
    run.picture(f"{name}-overfitting.png", plots.overfitting(comparison, along))


if __name__ == "__main__":
    sys.exit(main("sparse_regression", sys.argv[1:], Config, story))
