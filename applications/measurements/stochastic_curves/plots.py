"""The picture: suboptimality against gradient evaluations and against seconds, one labelled curve a method."""

from __future__ import annotations

from math import log
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from applications.frame.figures import png

STYLES = ("-", "--", ":", "-.")
"""By family; colours tell the members of a family apart."""
FAMILIES = {
    "one loop": ("SOBA", "SABA", "SRBA", "FSLA"),
    "two loops": ("AmIGO", "stocBiO", "BSA", "TTSA"),
    "momentum, recursion": ("MRBO", "SUSTAIN", "VRBO"),
    "first order": ("F2SA", "BOME"),
}
COLOURS = {
    **dict(zip(FAMILIES["one loop"], ("#08519c", "#1f78e0", "#17becf", "#7b9fd4"), strict=True)),
    **dict(zip(FAMILIES["two loops"], ("#00441b", "#238b45", "#66c164", "#9aa800"), strict=True)),
    **dict(zip(FAMILIES["momentum, recursion"], ("#a50f15", "#ef3b2c", "#fb7b50"), strict=True)),
    **dict(zip(FAMILIES["first order"], ("#6a3d9a", "#c51b8a"), strict=True)),
}


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
"""Of the picture: most curves end far above; what goes lower is in curves.json."""


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


def style_of(name: str) -> str:
    return next(style for style, members in zip(STYLES, FAMILIES.values(), strict=True) if name in members)


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str] = COLOURS) -> None:
    """Each name in a column at the right of its panel, at its curve's end, or as near as there is room.

    The axes are logarithmic, and their limits set.
    """
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([position(ends[name][1], low, high) for name in order], gap=0.036)
    for name, height in zip(order, heights, strict=True):
        axes.annotate(
            name,
            xy=ends[name],
            xycoords="data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colours[name],
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "alpha": 0.6},
        )


def position(value: float, low: float, high: float) -> float:
    """Of a value on a logarithmic axis, 0 at the bottom and 1 at the top."""
    return log(value / low) / log(high / low)


def spread(heights: list[float], gap: float) -> list[float]:
    """Sorted heights moved apart to at least ``gap``, groups staying centred where they were; kept inside 0 and 1."""
    groups = [[height, 1] for height in heights]  # centre and size of each run of labels
    merged: list[list[float]] = []
    for centre, size in groups:
        merged.append([centre, size])
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            (a, n), (b, m) = merged[-2:]
            merged[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    placed = []
    for centre, size in merged:
        half = gap * (size - 1) / 2
        centre = min(max(centre, half), 1 - half)
        placed += [centre - half + gap * index for index in range(int(size))]
    return placed
