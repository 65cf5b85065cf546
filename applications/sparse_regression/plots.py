"""The pictures: a descent on the curve of the grid, what each feature's penalty became, and how criteria overfit."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from applications.figures import BLUE, GREY, ORANGE, RIGHT, WRONG, plt, png
from applications.run import Row
from applications.sparse_regression import models
from applications.sparse_regression.compare import (
    BLOCKS,
    BLOCKS_PULLED,
    COARSE,
    FEATURES,
    FEATURES_PULLED,
    GRID,
    LASSO,
    Comparison,
)


def one_penalty(comparison: Comparison) -> bytes:
    """Left: the criterion against the penalty, our evaluations on the curve of the grid. Right: against fits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    fine, coarse, records = comparison.rows[GRID], comparison.rows[COARSE], comparison.records(LASSO)
    folds = len(comparison.folds)
    left.semilogx(fine["grid"], fine["curve"], "-", color=GREY, label="LassoCV, 100 penalties")
    left.semilogx(coarse["grid"], coarse["curve"], "s", color=ORANGE, markersize=5, label="LassoCV, 10 penalties")
    at, values = [record["largest"] for record in records], [record["criterion"] for record in records]
    left.semilogx(at, values, "o", color=BLUE, markersize=5, label="hypergradient descent")
    for number in range(min(3, len(at))):
        left.annotate(str(number + 1), (at[number], values[number]), (0, 7), textcoords="offset points", color=BLUE)
    left.set(xlabel="penalty of all features", ylabel="cross-validation loss")
    left.legend(frameon=False)
    best = min(fine["criterion"], *values)
    for row, colour, style in ((fine, GREY, "-"), (coarse, ORANGE, "s-")):
        gaps = np.minimum.accumulate(row["curve"]) / best - 1
        right.plot(folds * np.arange(1, len(gaps) + 1), gaps + FLOOR, style, color=colour, markersize=4)
    gaps = np.minimum.accumulate(values) / best - 1
    right.plot(folds * np.arange(1, len(gaps) + 1), gaps + FLOOR, "o-", color=BLUE, markersize=5)
    right.set(xscale="log", yscale="log", xlabel="fits", ylabel="best loss so far, above the best of all")
    right.set_yticks([1, 1e-2, 1e-4, FLOOR], ["100 %", "1 %", "0.01 %", "best"])
    figure.suptitle(f"{comparison.study.name}: one penalty, {folds} folds")
    return png(figure)


FLOOR = 1e-6
"""Relative differences of criteria below it are that of two solvers."""


def penalties(comparison: Comparison) -> bytes:
    """The penalty of each feature, and of its block, over that of the lasso: learned freely, and pulled together."""
    study, lasso = comparison.study, comparison.descents[LASSO].point
    figure, axes = plt.subplots(2, 1, figsize=(10, 5.6), sharex=True, layout="constrained")
    rows = (
        (axes[0], FEATURES, BLOCKS, "learned freely"),
        (axes[1], FEATURES_PULLED, BLOCKS_PULLED, "pulled towards a common one"),
    )
    for place, features, blocks, title in rows:
        ratios = (comparison.descents[features].point - lasso).exp().numpy()
        _features(place, study.noise, ratios, study.support_known)
        steps = (comparison.descents[blocks].point - lasso).exp().numpy()[study.blocks]
        edges = np.arange(len(steps) + 1) - 0.5
        place.stairs(steps, edges, baseline=None, color=ORANGE, linewidth=1.4, label="one for each block")
        place.axhline(1, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
        place.set(yscale="log", ylabel="penalty / that of the lasso", title=title)
    axes[1].set(xlabel="feature")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    figure.suptitle(f"{study.name}: learned penalties")
    return png(figure)


def _features(place: Axes, noise: np.ndarray, ratios: np.ndarray, support_known: bool) -> None:
    index = np.arange(len(ratios))
    useful = "useful features" if support_known else "measured features"
    place.plot(index[noise], ratios[noise], ".", color=GREY, markersize=4, label="noise")
    place.plot(index[~noise], ratios[~noise], "o", color=RIGHT, markersize=5, label=useful)


def test_errors(comparison: Comparison) -> dict[str, list[float]]:
    """Of every evaluation of the two descents with a penalty for each feature; nothing is chosen by them."""
    study = comparison.study
    return {
        name: [
            models.of_penalties(study, comparison.descents[name].criterion.penalty, point)["test error"]
            for point in comparison.descents[name].path
        ]
        for name in (FEATURES, FEATURES_PULLED)
    }


def overfitting(comparison: Comparison, along: Row) -> bytes:
    """Criterion and test error of the descents on a penalty for each feature, with and without the pull."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True, layout="constrained")
    pull = comparison.descents[FEATURES_PULLED].criterion.pull
    titles = {FEATURES: "learned freely", FEATURES_PULLED: f"pulled together, by {pull:g}"}
    lasso = comparison.rows[GRID]["test error"]
    for place, (name, title) in zip(axes, titles.items(), strict=True):
        records = comparison.records(name)
        steps, criteria = [record["step"] for record in records], [record["criterion"] for record in records]
        place.plot(steps, criteria, "o-", color=BLUE, markersize=3, label="criterion")
        place.plot(steps, along[name], "o-", color=WRONG, markersize=3, label="test error")
        place.axhline(lasso, color=GREY, linestyle="--", label="test error of LassoCV", zorder=0)
        place.set(xlabel="evaluation", title=title)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(ylabel="part of the variance")
    axes[1].legend(frameon=False)
    figure.suptitle(f"{comparison.study.name}: {len(comparison.study.noise)} penalties learned on one criterion")
    return png(figure)
