"""The pictures: a descent on the curve of the grid, what each feature's penalty became, and how criteria overfit."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from applications.frame.figures import BLUE, GREY, ORANGE, RIGHT, WRONG, plt, png
from applications.frame.run import Row
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    fine, coarse, records = comparison.rows[GRID], comparison.rows[COARSE], comparison.history(LASSO)
    folds = len(comparison.folds)
    at, values = [record["largest"] for record in records], [record["criterion"] for record in records]
    close = left.inset_axes((0.37, 0.53, 0.34, 0.42))
    for place in (left, close):
        place.semilogx(fine["grid"], fine["curve"], "-", color=GREY, label="LassoCV, 100 penalties")
        place.semilogx(coarse["grid"], coarse["curve"], "s", color=ORANGE, markersize=5, label="LassoCV, 10 penalties")
        place.semilogx(at, values, "o", color=BLUE, markersize=5, label="hypergradient descent")
    low = min(values)
    high = max(*values, 1.001 * low)
    close.set(xlim=(min(at) / 1.4, max(at) * 1.4), ylim=(low - 0.2 * (high - low), high + 0.8 * (high - low)))
    close.minorticks_off()
    close.set_xticks([], labels=[])
    close.tick_params(labelsize=7)
    left.indicate_inset_zoom(close, edgecolor="0.3")
    left.set(xlabel="penalty of all features", ylabel="cross-validation loss")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
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


WIDE_TICKS, NARROW_TICKS = (1e-3, 1e-2, 1e-1, 1, 10), (0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.4, 2, 3)


def penalties(comparison: Comparison) -> bytes:
    """The penalty of each feature, and of its block, over that of the lasso: learned freely, and pulled together."""
    study, lasso = comparison.study, comparison.descents[LASSO].point
    order = np.argsort(study.blocks, kind="stable")
    blocks, noise, index = study.blocks[order], study.noise[order], np.arange(len(order))
    figure, axes = plt.subplots(2, 1, figsize=(10, 5.8), sharex=True, layout="constrained")
    rows = (
        (axes[0], FEATURES, BLOCKS, "learned freely"),
        (axes[1], FEATURES_PULLED, BLOCKS_PULLED, "pulled towards a common one"),
    )
    for place, each, shared, title in rows:
        ratios = (comparison.descents[each].point - lasso).exp().numpy()[order]
        place.plot(index[noise], ratios[noise], ".", color=GREY, markersize=4, label="noise")
        useful = "useful features" if study.support_known else "measured features"
        place.plot(index[~noise], ratios[~noise], "o", color=RIGHT, markersize=5, label=useful)
        steps = (comparison.descents[shared].point - lasso).exp().numpy()[blocks]
        edges = np.arange(len(steps) + 1) - 0.5
        place.stairs(steps, edges, baseline=None, color=ORANGE, linewidth=1.4, label="one for each block")
        place.axhline(1, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
        place.set(yscale="log", ylabel="penalty / that of the lasso", title=title)
        wide = place.get_ylim()[1] > 10 * place.get_ylim()[0]
        ticks = [t for t in (WIDE_TICKS if wide else NARROW_TICKS) if place.get_ylim()[0] < t < place.get_ylim()[1]]
        place.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        place.minorticks_off()
    names = ", ".join(study.block_names) if len(study.block_names) <= 6 else "block by block"
    axes[1].set(xlabel=f"features: {names}")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    figure.suptitle(f"{study.name}: learned penalties")
    return png(figure)


def test_errors(comparison: Comparison) -> dict[str, list[float]]:
    """Errors of every evaluation of the two descents with a penalty for each feature; nothing is chosen by them."""
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
    without = comparison.descents[FEATURES].criterion.without_features()
    for place, (name, title) in zip(axes, titles.items(), strict=True):
        records = comparison.history(name)
        steps, criteria = [record["step"] for record in records], [record["criterion"] / without for record in records]
        place.plot(steps, criteria, "o-", color=BLUE, markersize=3, label="criterion")
        place.plot(steps, along[name], "o-", color=WRONG, markersize=3, label="test error")
        place.axhline(lasso, color=GREY, linestyle="--", label="test error of LassoCV", zorder=0)
        place.set(xlabel="evaluation", title=title)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(ylabel="part of the variance")
    axes[1].legend(frameon=False)
    figure.suptitle(f"{comparison.study.name}: {len(comparison.study.noise)} penalties learned on one criterion")
    return png(figure)
