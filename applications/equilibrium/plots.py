"""Pictures of a run: learning curves, memory, errors of the gradient, and how the equilibrium is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from applications.frame.figures import BLUE, GREY, ORANGE, RIGHT, WRONG, png, smooth

COLOURS = (BLUE, RIGHT, ORANGE, GREY)
"""Colours of the methods, in their order."""


def learning(records: dict[str, list[list[dict[str, Any]]]], title: str) -> bytes:
    """Training loss against steps and validation accuracy against epochs, means over the runs of each method: a PNG.

    Args:
        records: of each run of each method.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, runs), colour in zip(records.items(), COLOURS, strict=True):
        loss = np.mean([[record["loss"] for record in run] for run in runs], axis=0)
        left.semilogy(range(1, len(loss) + 1), smooth(loss.tolist()), color=colour, label=name)
        watched = [[record for record in run if "validation_accuracy" in record] for run in runs]
        accuracy = np.mean([[record["validation_accuracy"] for record in run] for run in watched], axis=0)
        right.plot(range(1, len(accuracy) + 1), accuracy, ".-", color=colour, label=name)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    return png(figure)


def memory(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """Peak memory of a training step against the iterations: a PNG."""
    figure, axes = plt.subplots(figsize=(5.6, 4), layout="constrained")
    curves = (("implicit, MiB", "equilibrium, implicit gradient", BLUE), ("unrolled, MiB", "unrolled", ORANGE))
    for column, label, colour in curves:
        measured = [row for row in rows if row[column] is not None]
        steps, sizes = [row["iterations"] for row in measured], [row[column] for row in measured]
        axes.loglog(steps, sizes, "o-", color=colour, label=label)
    axes.set(xlabel="iterations of the map", ylabel="peak memory of a training step (MiB)")
    axes.set_xticks([row["iterations"] for row in rows], [str(row["iterations"]) for row in rows])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=10)
    return png(figure)


def gradient_errors(counts: Sequence[int], curves: dict[str, list[float]], title: str) -> bytes:
    """Relative error of the gradient against the iterations k: a PNG."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours, marks = (ORANGE, GREY, BLUE, RIGHT, WRONG), ("s-", "v-", "o-", "D-", "x-")
    for (name, errors), colour, mark in zip(curves.items(), colours, marks, strict=True):
        axes.semilogy(counts, errors, mark, color=colour, label=name, markersize=4)
    axes.set(xlabel="k", ylabel="relative error of the gradient")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=10)
    return png(figure)


def residuals(counts: Sequence[int], curves: dict[str, dict[str, list[list[float]]]], title: str) -> bytes:
    """Residual against iteration, by solver: the median over examples in a band of 80 % of them; a panel a network."""
    figure, panels = plt.subplots(1, len(curves), figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, (network, solvers) in zip(panels, curves.items(), strict=True):
        for (solver, quantiles), colour in zip(solvers.items(), (ORANGE, BLUE), strict=True):
            _band(axes, counts, quantiles, colour, solver)
        axes.set(xlabel="iteration", title=network)
        axes.legend(frameon=False)
    panels[0].set(ylabel="||z − map(z)|| / ||z||", ylim=(1e-13, 2))
    figure.suptitle(title)
    return png(figure)


def _band(axes: Axes, counts: Sequence[int], quantiles: list[list[float]], colour: str, label: str) -> None:
    low, middle, high = (np.maximum([at[i] for at in quantiles], 1e-300) for i in range(3))
    axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.semilogy(counts, middle, color=colour, label=label)
