"""``python -m applications.search``: hypergradients beside grid, random and model-based search, on the same folds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from statistics import fmean, stdev

from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from applications.frame.command import main
from applications.frame.run import Row, Run
from applications.search import plots
from applications.search.comparison import Comparison
from applications.search.contests import Contest, contests_of
from applications.search.knobs import Config
from applications.search.methods import METHODS, check_settings
from applications.search.tuning import tunable

OURS = "hypergradient"


def story(knobs: Config, run: Run) -> None:
    """Compare, tabulate, draw."""
    check_settings(run.settings)
    contests = contests_of(knobs, knobs.seed)
    comparison = Comparison(contests, knobs.repeats, knobs.candidates, knobs.seed, run.settings)
    run.say(f"{len(contests)} contests, {knobs.repeats} splits, 5 folds each; seconds are CPU time of one thread.")
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        run.train("comparison", comparison, show=("cv_loss", "test_loss"))
    records = run.metrics("comparison")
    run.table("All methods", [row for contest in contests for row in means(contest, records)])
    run.table(
        "Hypergradient beside the best of the others", [against_the_best(contest, records) for contest in contests]
    )
    run.picture("curves.png", plots.curves(contests, records))


def of(contest: Contest, method: str, records: Iterable[Row]) -> list[Row]:
    """One record for each repeat."""
    return [record for record in records if record["contest"] == contest.name and record["method"] == method]


def mean(records: list[Row], column: str) -> float:
    return fmean(record[column] for record in records)


def means(contest: Contest, records: list[Row]) -> list[Row]:
    """A row for each method: means over the repeats, and the standard error of the held-out loss."""
    rows = []
    for method in METHODS:
        own = of(contest, method, records)
        losses = [record["test_loss"] for record in own]
        rows.append(
            {
                "contest": contest.name,
                "hyperparameters": contest.num_hyperparameters,
                "method": method,
                "candidates": round(mean(own, "candidates")),
                "seconds": mean(own, "search_seconds"),
                "CV loss": mean(own, "cv_loss"),
                "held-out loss": fmean(losses),
                "±": stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
            }
        )
    return rows


def against_the_best(contest: Contest, records: list[Row]) -> Row:
    """Beside the other method that has the least cross-validation loss (the held-out loss chooses nothing)."""
    others = {method: of(contest, method, records) for method in METHODS if method != OURS}
    best = min(others, key=lambda method: mean(others[method], "cv_loss"))
    own, theirs = of(contest, OURS, records), others[best]
    return {
        "contest": contest.name,
        "hyperparameters": contest.num_hyperparameters,
        "best other": best,
        "its CV loss": mean(theirs, "cv_loss"),
        "our CV loss": mean(own, "cv_loss"),
        "its held-out": mean(theirs, "test_loss"),
        "our held-out": mean(own, "test_loss"),
        "its seconds": mean(theirs, "search_seconds"),
        "our seconds": mean(own, "search_seconds"),
        "seconds to its CV loss": seconds_to_match(own, theirs),
    }


def seconds_to_match(own: list[Row], theirs: list[Row]) -> float | None:
    """Until our cross-validation loss was theirs, to a thousandth; None where it never was, in some repeat."""
    seconds = []
    for ours, other in zip(own, theirs, strict=True):
        reached = [point[0] for point in ours["curve"] if point[1] <= 1.001 * other["cv_loss"]]
        if not reached:
            return None
        seconds.append(reached[0])
    return fmean(seconds)


if __name__ == "__main__":
    sys.exit(main("search", sys.argv[1:], Config, story, tunable))
