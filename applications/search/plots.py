"""Held-out loss against seconds, a panel for each contest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from applications.frame.figures import BLUE, GREY, ORANGE, RIGHT, png
from applications.frame.run import Row
from applications.search.contests import Contest

COLOURS = {"grid": GREY, "random": RIGHT, "Optuna": ORANGE, "hypergradient": BLUE}


def curves(contests: Sequence[Contest], records: Sequence[Row]) -> bytes:
    """A PNG: for each method the held-out loss of its best candidate so far (by cross-validation), a line a repeat."""
    columns = min(4, len(contests))
    rows = -(-len(contests) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.1 * rows + 0.5), squeeze=False)
    for panel in panels.flat[len(contests) :]:
        panel.axis("off")
    for panel, contest in zip(panels.flat, contests, strict=False):
        own = [record for record in records if record["contest"] == contest.name]
        draw(panel, own)
        count = contest.num_hyperparameters
        panel.set_title(f"{contest.name}\n{count:,} hyperparameter{'s' if count > 1 else ''}", fontsize=9)
        panel.set_ylabel("log loss" if contest.examples.num_classes else "squared error", fontsize=8)
        panel.set_xlabel("seconds (CPU, one thread)", fontsize=8)
        panel.tick_params(labelsize=7, which="both")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.1 * rows + 0.5)))
    return png(figure)


def draw(panel: Axes, records: Sequence[Row]) -> None:
    """One contest."""
    untuned = [record["test_loss"] for record in records if record["method"] == "untuned"]
    panel.axhline(float(np.mean(untuned)), color="0.3", linestyle=":", linewidth=1, label="untuned")
    ends = [record["search_seconds"] for record in records if record["method"] != "untuned"]
    losses = [*untuned]
    thin = 1.0 if len(untuned) == 1 else 0.5
    for method, colour in COLOURS.items():
        label: str | None = method
        for record in records:
            if record["method"] != method:
                continue
            points = np.array(record["curve"])
            seconds = np.append(points[:, 0], record["search_seconds"])
            held_out = np.append(points[:, 2], points[-1, 2])
            losses += list(held_out)
            width = thin * (2.0 if method == "hypergradient" else 1.4)
            panel.plot(seconds, held_out, color=colour, drawstyle="steps-post", linewidth=width, alpha=0.8, label=label)
            panel.plot(seconds[-1], held_out[-1], "o", color=colour, markersize=3 + thin)
            label = None
    panel.set_xscale("log")
    panel.set_xlim(right=1.5 * max(ends))
    if max(losses) > 3 * min(losses):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_minor_formatter("{x:g}" if max(losses) < 30 * min(losses) else NullFormatter())
    panel.grid(alpha=0.25, which="major")
