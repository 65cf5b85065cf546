"""The picture: suboptimality against gradient evaluations and against seconds, one labelled curve a method."""

from __future__ import annotations

from math import log
from typing import Any

from matplotlib import pyplot as plt

from applications.frame.figures import COLOURS, label_ends, png, style_of


def curves(found: dict[str, list[dict[str, Any]]], title: str) -> bytes:
    """Both panels as a PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 6.2), sharey=True)
    figure.subplots_adjust(left=0.06, right=0.93, bottom=0.09, top=0.92, wspace=0.2)
    for axes, quantity, label in zip(
        panels,
        ("passes", "seconds"),
        ("gradients and products, in passes over a data set", "seconds"),
        strict=True,
    ):
        ends = {}
        for name, points in found.items():
            x, y = ([point[key] for point in points[1:]] for key in (quantity, "suboptimality"))
            axes.loglog(x, y, style_of(name), color=COLOURS[name], linewidth=1.6)
            ends[name] = leave(x, y)
        axes.set(xlabel=label, ylim=(BOTTOM, 2), xlim=(left_of(found, quantity), None))
        axes.grid(True, which="major", color="0.92")
        label_ends(axes, ends)
    panels[0].set_ylabel("outer suboptimality, relative to the start")
    figure.suptitle(title)
    return png(figure)


BOTTOM = 1e-7
"""Lower end of the picture: most curves end far above; what goes lower is in curves.json."""


def leave(x: list[float], y: list[float]) -> tuple[float, float]:
    """Where a curve ends, or where it leaves the picture for good."""
    below = next((index for index in range(len(y)) if max(y[index:]) < BOTTOM), None)
    if not below:
        return x[-1], max(y[-1], BOTTOM)
    part = log(y[below - 1] / BOTTOM) / log(y[below - 1] / y[below])
    return x[below - 1] * (x[below] / x[below - 1]) ** part, BOTTOM


def left_of(found: dict[str, list[dict[str, Any]]], quantity: str) -> float:
    """Where the first curve has come down by a tenth: before that there is nothing to see."""
    reached = [
        point[quantity]
        for points in found.values()
        for point in points
        if point["suboptimality"] < 0.9 and point["step"]
    ]
    first = [points[1][quantity] for points in found.values()]
    return 0.6 * min(reached, default=min(first))
