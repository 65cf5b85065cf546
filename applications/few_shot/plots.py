"""Pictures of a run: its learning curve, and one test episode with its predictions."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from torch import Tensor

from applications.frame.figures import BLUE, ORANGE, RIGHT, WRONG, png, show_image, smooth


def learning_curve(records: list[dict[str, Any]], title: str) -> bytes:
    """Query loss, and accuracy on training and validation classes, against meta-steps: a PNG."""
    training = [record for record in records if "loss" in record]
    steps = [record["step"] for record in training]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, [record["loss"] for record in training], color="0.8", linewidth=0.8)
    left.plot(steps, smooth([record["loss"] for record in training]), color=BLUE)
    left.set(xlabel="meta-step", ylabel="query loss", ylim=(0, None))
    right.plot(steps, smooth([100 * record["accuracy"] for record in training]), color=BLUE, label="training")
    validated = [record for record in records if "validation_accuracy" in record]
    if validated:
        points = [record["validation_accuracy"] for record in validated]
        right.plot([record["step"] for record in validated], points, "o-", color=ORANGE, label="validation classes")
    right.set(xlabel="meta-step", ylabel="accuracy (%)")
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    return png(figure)


def episode(support_x: Tensor, query_x: Tensor, query_y: Tensor, predicted: Tensor, title: str) -> bytes:
    """One task: a row for each class, its support image, then queries framed by right (green) or wrong (red).

    Args:
        support_x: ``[ways * shots, c, h, w]``, sorted by class. query_x: ``[ways * n, c, h, w]``, likewise.
        query_y, predicted: labels ``[ways * n]``.
    """
    ways = int(query_y.max()) + 1
    queries = query_x.unflatten(0, (ways, -1))[:, :10]
    labels = predicted.unflatten(0, (ways, -1))[:, :10]
    columns = 1 + queries.shape[1]
    figure, axes = plt.subplots(ways, columns, figsize=(0.75 * columns, 0.85 * ways + 0.7), squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.6 / (0.85 * ways + 0.7), bottom=0.03, wspace=0.25)
    supports = support_x.unflatten(0, (ways, -1))[:, 0]
    for way in range(ways):
        show_image(axes[way, 0], supports[way], f"class {way + 1}")
        for column in range(1, columns):
            guess = int(labels[way, column - 1])
            colour = RIGHT if guess == way else WRONG
            caption = "" if guess == way else f"says {guess + 1}"
            show_image(axes[way, column], queries[way, column - 1], caption, colour)
    figure.suptitle(title, fontsize=9)
    return png(figure)


def memory(rows: list[dict[str, Any]], names: dict[str, str], machine: str) -> bytes:
    """Peak memory and seconds of a meta-gradient against inner steps, one curve a method: a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained")
    ticks = sorted({row["inner_steps"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        measured = [row for row in rows if row["method"] == method and row["peak_mib"] is not None]
        steps = [row["inner_steps"] for row in measured]
        left.loglog(steps, [row["peak_mib"] for row in measured], "o-", label=names[method])
        right.loglog(steps, [row["seconds"] for row in measured], "o-", label=names[method])
    left.set(xlabel="inner steps", ylabel="peak memory of a meta-gradient (MiB)", ylim=(10, None))
    right.set(xlabel="inner steps", ylabel="seconds for a meta-gradient")
    for axes in (left, right):
        axes.set_xticks(ticks, [str(steps) for steps in ticks])
        axes.xaxis.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(f"Memory and time against inner steps ({machine})")
    return png(figure)
