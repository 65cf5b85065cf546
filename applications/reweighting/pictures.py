"""The pictures: weights over losses, accuracy of each class, validation accuracy on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from applications.frame.figures import BLUE, GREY, ORANGE, PURPLE, RIGHT, WRONG, plt, png
from applications.reweighting.measure import BINS, LARGEST_LOSS, loss_grid

Row = dict[str, Any]
TITLES = {"long-tail": "Long tail", "noise": "Wrong labels"}
KINDS = {"every class": BLUE, "largest class": ORANGE, "middle class": GREY, "smallest class": BLUE}


def weight_functions(learned: Mapping[Any, Row]) -> bytes:
    """For each problem the weight as a function of the loss, a line for each repeat, over the losses at the end."""
    figure, axes = plt.subplots(
        2, len(learned), figsize=(5.2 * len(learned), 5.4), sharex=True, squeeze=False, height_ratios=(3, 1),
        layout="constrained",
    )  # fmt: skip
    for (problem, row), (upper, lower) in zip(learned.items(), axes.T, strict=True):
        for kind, curves in row["curves"].items():
            for index, curve in enumerate(curves):
                upper.plot(loss_grid(), curve, color=KINDS[kind], lw=1, label=kind if index == 0 else None)
        upper.set(title=TITLES[problem], ylabel="weight, relative to the mean", ylim=(0, None))
        upper.axhline(1, color="0.8", lw=0.8, zorder=0)
        upper.legend(frameon=False, title="one line a repeat", title_fontsize=8, fontsize=8)
        edges = np.linspace(0, LARGEST_LOSS, BINS + 1)
        kinds = [("true", RIGHT), ("wrong", WRONG)] if any(row["histograms"]["wrong"]) else [("true", RIGHT)]
        for kind, colour in kinds:
            lower.stairs(row["histograms"][kind], edges, fill=True, alpha=0.55, color=colour, label=f"{kind} label")
        lower.set(xlabel="loss of a training example (the last bin holds larger ones too)", ylabel="examples")
        lower.set_yscale("symlog", linthresh=10)
        lower.set_ylim(0, None)
        lower.legend(frameon=False, fontsize=8)
    return png(figure)


def class_bars(rows: dict[str, Row], sizes: list[int], orders: list[list[int]]) -> bytes:
    """Recall of each class, largest class first, as means over the repeats; ``orders``: the classes by size."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    places, width = np.arange(len(sizes)), 0.8 / len(rows)
    colours = {"unweighted": GREY, "class frequency": ORANGE}
    for index, (name, row) in enumerate(rows.items()):
        sorted_recalls = [np.array(recalls)[order] for recalls, order in zip(row["recalls"], orders, strict=True)]
        axes.bar(places + (index - (len(rows) - 1) / 2) * width, np.mean(sorted_recalls, 0), width, label=name,
                 color=colours.get(name, BLUE))  # fmt: skip
    axes.set_xticks(places, [str(size) for size in sizes])
    axes.set(xlabel="training examples of the class", ylabel="test accuracy on the class (%)", ylim=(0, 100))
    axes.set_title("Long tail: accuracy of each class")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return png(figure)


def validation_curves(curves: Mapping[Any, dict[str, list[Row]]]) -> bytes:
    """Validation accuracy along the training, mean over the repeats: ``curves[problem][name]`` are its records."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 5), squeeze=False, layout="constrained")
    colours = {"unweighted": GREY, "focal loss": PURPLE, "class frequency": ORANGE, "meta set alone": RIGHT}
    lines: dict[str, Line2D] = {}
    for (problem, named), place in zip(curves.items(), axes[0], strict=True):
        late = []
        for name, records in named.items():
            points = [(r["step"], 100 * float(np.mean(r["validation"]))) for r in records if "validation" in r]
            late += [value for _, value in points[len(points) // 3 :]]
            base = name.removesuffix(", + meta set")
            style: dict[str, Any] = {"color": colours.get(base, BLUE), "ls": "-" if base == name else "--"}
            lines[name], *_ = place.plot(*zip(*points, strict=True), label=name, lw=1.5, **style)
        place.set(title=TITLES[problem], xlabel="step", ylabel="validation accuracy (%)")
        place.set_ylim(min(late) - 2, max(late) + 2)
        place.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return png(figure)
