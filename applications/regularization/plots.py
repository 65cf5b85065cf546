"""The pictures: overfitting by the number of penalties and over time, strengths on their way, images in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from applications.frame.figures import BLUE, GREY, ORANGE, RIGHT, WRONG, image_grid, png
from applications.frame.run import Row


def penalties(counts: Sequence[int], records: Sequence[Sequence[Row]], title: str) -> bytes:
    """Losses at the end by the number of penalties, and on the way with the most of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for key, colour, text in LOSSES:
        left.plot(counts, [found[-1][key] for found in records], "o-", color=colour, label=text)
        right.plot([row["step"] for row in records[-1]], [row[key] for row in records[-1]], color=colour, label=text)
    left.set(xscale="log", xlabel="penalties that are learned", ylabel="cross-entropy", ylim=(0, None))
    left.set_xticks(counts, [f"{count:,}" for count in counts])
    left.minorticks_off()
    left.set_title("at the end", fontsize=10)
    right.set(xlabel="outer step")
    right.set_title(f"{counts[-1]:,} penalties, on the way", fontsize=10)
    for axes in (left, right):
        axes.grid(color="0.93")
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return png(figure)


LOSSES = (
    ("test_loss", ORANGE, "test"),
    ("validation_loss", BLUE, "validation"),
    ("training_loss", GREY, "training"),
)


def memorised(records: Mapping[str, Sequence[Row]], baseline: float, baseline_name: str, title: str) -> bytes:
    """Accuracy on the validation and the test examples over the outer steps, a colour a sharing of decays."""
    lowest = min(baseline, *(found[-1]["test_accuracy"] for found in records.values()))
    figure, axes = plt.subplots(figsize=(8.5, 4.6))
    for (name, found), colour in zip(records.items(), (WRONG, ORANGE, BLUE, RIGHT), strict=False):
        steps = [row["step"] for row in found]
        axes.plot(steps, [row["validation_accuracy"] for row in found], "--", color=colour, linewidth=1.2)
        axes.plot(steps, [row["test_accuracy"] for row in found], color=colour, label=name)
    axes.axhline(baseline, color=GREY, linewidth=1, label=baseline_name)
    axes.plot([], [], "--", color="0.3", linewidth=1.2, label="dashed: validation; solid: test")
    axes.set(xlabel="outer step", ylabel="accuracy in %", ylim=(lowest - 15, 101))
    axes.grid(color="0.93")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=1.0)
    axes.set_title(title, fontsize=11)
    figure.tight_layout()
    return png(figure)


def strengths(records: Sequence[Row], in_use: dict[str, float], title: str) -> bytes:
    """The strengths on their way, dashed what the validation images really have, and the accuracy."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    steps = [row["step"] for row in records]
    for (name, truth), colour in zip(in_use.items(), (BLUE, ORANGE, RIGHT, WRONG), strict=True):
        axes[0].plot(steps, [row[name] for row in records], color=colour, label=name)
        if truth:
            axes[0].axhline(truth, color=colour, linestyle="--", linewidth=1)
    axes[0].plot([], [], "--", color="0.3", linewidth=1, label="in use (the others: none)")
    axes[0].set(xlabel="outer step", ylabel="strength", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8.5)
    for key, colour, text in (("validation_accuracy", BLUE, "validation"), ("test_accuracy", ORANGE, "test")):
        axes[1].plot(steps, [row[key] for row in records], color=colour, label=text)
    axes[1].set(xlabel="outer step", ylabel="accuracy in %")
    axes[1].legend(frameon=False, loc="lower right")
    for place in axes:
        place.grid(color="0.93")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return png(figure)


def augmented_images(plain: Tensor, learned: Tensor, used: Tensor) -> bytes:
    """A row each of training images, the same augmented, and images in use."""
    rows = [("training", plain), ("augmented", learned), ("in use", used)]
    images = torch.cat([row[:10] for _, row in rows]).clamp(0, 1)
    captions = [name for name, row in rows for _ in row[:10]]
    colours = [c for (_, row), c in zip(rows, ("0.4", BLUE, ORANGE), strict=True) for _ in row[:10]]
    return image_grid(images, captions, "Training images, augmented as learned, and images in use", colours=colours)
