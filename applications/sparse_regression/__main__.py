"""``python -m applications.sparse_regression``: one penalty, two, one for each block, one for each feature."""

from __future__ import annotations

import sys

from applications.frame.command import main
from applications.frame.run import Run, slug
from applications.sparse_regression import plots
from applications.sparse_regression.compare import Comparison, compare, means
from applications.sparse_regression.knobs import Config, study
from applications.sparse_regression.tuning import tunable


def story(knobs: Config, run: Run) -> None:
    """For each data set: every draw by every method, the table of their means, and pictures of the first."""
    studies = {name: [study(knobs, name, knobs.seed + index) for index in range(knobs.draws)] for name in knobs.data}
    for name, draws in studies.items():
        examples, features = draws[0].features.shape
        run.say(f"{name}: {examples} training examples, {features} features, {knobs.draws} draws")
        comparisons = [
            compare(run, f"{name} {index + 1}", one, knobs.folds, knobs.evaluations) for index, one in enumerate(draws)
        ]
        run.table(f"{name}: means of {knobs.draws}", means(comparisons))
        pictures(run, comparisons[0])


def pictures(run: Run, comparison: Comparison) -> None:
    name = slug(comparison.study.name)
    run.picture(f"{name}-one-penalty.png", plots.one_penalty(comparison))
    run.picture(f"{name}-penalties.png", plots.penalties(comparison))
    along = run.part(f"{comparison.label}, test errors of the descents", lambda: plots.test_errors(comparison))
    run.picture(f"{name}-overfitting.png", plots.overfitting(comparison, along))


if __name__ == "__main__":
    sys.exit(main("sparse_regression", sys.argv[1:], Config, story, tunable))
