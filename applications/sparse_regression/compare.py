"""One draw of a data set by every method: scikit-learn's grids, and descents on one penalty, two, many."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from applications.frame.figures import OURS
from applications.frame.run import Row, Run
from applications.sparse_regression import models
from applications.sparse_regression.criterion import Criterion
from applications.sparse_regression.data import Study
from applications.sparse_regression.descent import Descent
from applications.sparse_regression.folds import Folds
from applications.sparse_regression.penalties import Penalty

GRID, COARSE = "LassoCV, 100 penalties", "LassoCV, 10 penalties"
ADAPTIVE = "adaptive lasso, 2 x 100 penalties"
LASSO, NET = f"{OURS}: lasso", f"{OURS}: elastic net"
BLOCKS, BLOCKS_PULLED = f"{OURS}: one a block", f"{OURS}: one a block, pulled"
FEATURES, FEATURES_PULLED = f"{OURS}: one a feature", f"{OURS}: one a feature, pulled"


@dataclass
class Comparison:
    """What each method found in one study, in the order of the story.

    Attributes:
        label: of the study, in the run folder.
        rows: of the table, by method. descents: ours, by method.
    """

    run: Run
    label: str
    study: Study
    folds: Folds
    evaluations: int
    rows: dict[str, Row] = field(default_factory=dict)
    descents: dict[str, Descent] = field(default_factory=dict)

    def baseline(self, name: str, penalties: int, compute: Callable[[], Row]) -> Row:
        found = self.run.part(f"{self.label}, {name}", compute)
        self.rows[name] = {"penalties": penalties, **found, "seconds": self.run.seconds(f"{self.label}, {name}")}
        return found

    def descend(self, name: str, penalty: Penalty, start: Tensor, pull: float = 0.0, before: Row | None = None) -> None:
        """Minimise the criterion from the log-strengths ``start``, which cost the fits and seconds of ``before``."""
        before = before or {"fits": 0, "seconds": 0.0}
        descent = Descent(Criterion(self.folds, penalty, pull, **self.run.settings), start, self.evaluations)
        seconds = self.run.train(f"{self.label}, {name}", descent, show=("criterion", "best"))
        assert descent.at is not None
        self.descents[name] = descent
        self.rows[name] = {
            "penalties": penalty.size,
            "fits": before["fits"] + descent.step * len(self.folds),
            "criterion": descent.at.criterion,
            **models.of_penalties(self.study, penalty, descent.point),
            "seconds": before["seconds"] + seconds,
        }

    def descend_with_many(self, free: str, pulled: str, penalty: Penalty) -> None:
        """From the lasso's penalty for all, without a pull and with the one that a part of the data chooses."""
        start, cost = self.descents[LASSO].point.repeat(penalty.size), self.rows[LASSO]
        self.descend(free, penalty, start, before=cost)
        part = f"{self.label}, choice of the pull, {pulled}"
        count, settings = len(self.folds), self.run.settings
        choice = self.run.part(
            part, lambda: models.choose_pull(self.study, penalty, start, count, self.evaluations, settings)
        )
        more = {"fits": cost["fits"] + choice["fits"], "seconds": cost["seconds"] + self.run.seconds(part)}
        self.descend(pulled, penalty, start, choice["pull"], before=more)

    def history(self, name: str) -> list[Row]:
        """The rows of a descent."""
        return self.run.metrics(f"{self.label}, {name}")


def compare(run: Run, label: str, study: Study, folds: int, evaluations: int) -> Comparison:
    """Every method on one study."""
    cv = Folds.make(study.features, study.targets, folds, study.shuffle, study.intercept)
    this = Comparison(run, label, study, cv, evaluations)
    grid = this.baseline(GRID, 1, lambda: models.lasso_grid(study, cv, 100))
    this.baseline(COARSE, 1, lambda: models.lasso_grid(study, cv, 10))
    this.baseline("ElasticNetCV, 3 x 100 penalties", 2, lambda: models.elastic_net_grid(study, cv, 100))
    this.baseline(ADAPTIVE, 1, lambda: models.adaptive_lasso(study, cv, grid))
    this.rows[ADAPTIVE]["seconds"] += this.rows[GRID]["seconds"]  # its fits are in its row too

    num_features, begin = len(study.noise), math.log(cv.largest_penalty() / 10)
    for_all = torch.zeros(num_features, dtype=torch.int64)
    this.descend(LASSO, Penalty(for_all), torch.tensor([begin], dtype=torch.float64))
    ridge = torch.tensor([math.log(1e-3 * study.features.var())], dtype=torch.float64)
    start = torch.cat([this.descents[LASSO].point, ridge])
    this.descend(NET, Penalty(for_all, ridge=True), start, before=this.rows[LASSO])
    this.descend_with_many(BLOCKS, BLOCKS_PULLED, Penalty(torch.from_numpy(study.blocks)))
    this.descend_with_many(FEATURES, FEATURES_PULLED, Penalty(torch.arange(num_features)))
    if study.support_known:
        this.baseline("least squares on the true support", 0, lambda: models.least_squares_on_support(study))
    return this


COLUMNS = ("penalties", "fits", "criterion", "test error", "selected", "noise selected", "F1", "seconds")


def means(comparisons: list[Comparison]) -> list[Row]:
    """The table: each method's means over the draws, and in how many its test error is below that of the fine grid."""
    draws = [comparison.rows for comparison in comparisons]
    rows = []
    for name in draws[0]:
        row: Row = {"method": name}
        for column in COLUMNS:
            values = [draw[name].get(column) for draw in draws]
            if all(draw[GRID].get(column) is None for draw in draws):
                continue
            if None in values:
                row[column] = None
            else:
                mean = float(np.mean(np.array(values, float)))
                row[column] = round(mean) if column in ("penalties", "fits") else mean
            if column == "test error":
                better = sum(draw[name]["test error"] < draw[GRID]["test error"] for draw in draws)
                row["below LassoCV"] = "" if name == GRID else f"{better} of {len(draws)}"
        rows.append(row)
    return rows
