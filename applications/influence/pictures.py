"""What a person would look at: the training images that speak most for and against predictions."""

from __future__ import annotations

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from applications.frame.figures import BLUE, GREY, RIGHT, WRONG, png, show_image

EACH = 5
"""Images for, and against, in a row."""


def speaking(
    images: Tensor,
    labels: Tensor,
    wrong: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    guesses: Tensor,
    values: Tensor,
) -> bytes:
    """A row for each query: itself, the training images that lower its loss most, and those that raise it most.

    Args:
        images, queries: ``[n, c, h, w]`` and ``[q, c, h, w]``. labels: as they were given, ``wrong`` ones in red.
        guesses: the classes that were predicted. values: influences ``[q, n]``.
    """
    rows, columns = len(queries), 2 * EACH + 3
    figure, axes = plt.subplots(rows, columns, figsize=(0.85 * columns, 1.02 * rows + 0.75), squeeze=False)
    top = 1 - 0.75 / (1.02 * rows + 0.75)
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=0.01, wspace=0.25, hspace=0.35)
    for row, (query, line) in enumerate(zip(queries, axes, strict=True)):
        right = bool(guesses[row] == query_labels[row])
        caption = f"{int(query_labels[row])}, told {int(guesses[row])}"
        show_image(line[0], query, caption, BLUE if right else WRONG)
        order = values[row].argsort()
        for places, chosen in ((line[2 : 2 + EACH], order[:EACH]), (line[3 + EACH :], order.flip(0)[:EACH])):
            for place, index in zip(places, chosen.tolist(), strict=True):
                colour = WRONG if wrong[index] else RIGHT
                show_image(place, images[index], f"{int(labels[index])}: {values[row, index]:+.1f}", colour)
        for gap in (line[1], line[2 + EACH]):
            gap.axis("off")
    heights = axes[0][0].get_position().y1 + 0.24 / (1.02 * rows + 0.75)
    for column, text in (
        (0, "test image"),
        (2 + EACH // 2, "speak for its label"),
        (3 + EACH + EACH // 2, "against it"),
    ):
        box = axes[0][column].get_position()
        figure.text((box.x0 + box.x1) / 2, heights, text, ha="center", fontsize=9)
    figure.suptitle("Training images by influence; their given labels, wrong ones in red", fontsize=10, y=0.99)
    return png(figure)


def against_retraining(predicted: Tensor, truth: Tensor, score: float) -> bytes:
    """Predicted and true changes of the queries' losses, a dot for each subset and query."""
    figure, axes = plt.subplots(figsize=(4.4, 4.2))
    axes.scatter(predicted.flatten(), truth.flatten(), s=3, color=BLUE, alpha=0.3, linewidths=0)
    size = float(torch.quantile(torch.cat([predicted.flatten(), truth.flatten()]).abs(), 0.998))
    axes.plot([-size, size], [-size, size], color=GREY, linewidth=1)
    axes.set(xlim=(-size, size), ylim=(-size, size), title=f"Subsets left out: rank correlation {score:.2f}")
    axes.set(xlabel="predicted change of a test loss", ylabel="change after training again")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return png(figure)
