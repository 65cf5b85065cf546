"""What a person would look at: the images found wrong, the weights learned, and the way there."""

from __future__ import annotations

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from applications.data_cleaning.scores import THRESHOLD
from applications.data_cleaning.task import Task
from applications.frame.figures import BLUE, GREY, ORANGE, RIGHT, WRONG, image_grid, png
from applications.frame.run import Row


def found_wrong(task: Task, weights: Tensor, count: int = 60) -> bytes | None:
    """The images found wrong, most certain first, under the label that they were given; None without images."""
    order = weights.argsort(stable=True)
    order = order[weights[order] < THRESHOLD][:count]
    if task.image is None or not len(order):
        return None
    images = task.train.features[order].view(-1, *task.image)
    captions = [f"“{given}”" for given in task.train.labels[order].tolist()]
    wrong = task.wrong[order]
    colours = [RIGHT if hit else WRONG for hit in wrong.tolist()]
    title = (
        f"Labels found wrong, most certain first: {int(wrong.sum())} of these {len(order)} are (green), "
        f"{int((~wrong).sum())} are not (red)"
    )
    return image_grid(images, captions, title, columns=12, colours=colours)


def progress(rows: list[Row], weights: Tensor, wrong: Tensor, accuracy: dict[str, float]) -> bytes:
    """Validation loss and detection against outer steps, the weights of right and wrong labels, accuracies."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.9))
    # Each leaves the room that its labels need: numbers on both sides of the first, names before the last.
    for axes, start, width in ((left, 0.045, 0.23), (middle, 0.37, 0.225), (right, 0.8, 0.17)):
        axes.set_position((start, 0.14, width, 0.76))

    steps = [row["step"] for row in rows]
    left.plot(steps, [row["val_loss"] for row in rows], color=BLUE)
    left.set(xlabel="outer step", title="On the way")
    left.set_ylabel("validation loss", color=BLUE)
    left.set_ylim(bottom=0)
    twin = left.twinx()
    twin.set_position(left.get_position())
    twin.plot(steps, [row["f1"] for row in rows], color=ORANGE)
    twin.set_ylabel("F1 of wrong labels found", color=ORANGE)

    groups = [weights[~wrong].tolist(), weights[wrong].tolist()]
    middle.hist(groups, torch.linspace(0, 1, 11).tolist(), color=[RIGHT, WRONG], label=["right labels", "wrong labels"])
    middle.axvline(THRESHOLD, color="0.3", linewidth=1, linestyle=":")
    middle.set(xlabel="weight learned", ylabel="training examples", yscale="log", title="What it learned")
    middle.legend(frameon=False, loc="upper center", fontsize=8)

    names = list(accuracy)[::-1]
    values = [accuracy[name] for name in names]
    right.barh(names, values, color=[BLUE if name.startswith("hyper") else GREY for name in names])
    right.set(xlim=(max(0.0, 10 * (min(values) // 10) - 10), 100), xlabel="test accuracy (%)", title="What it is worth")
    right.tick_params(axis="y", labelsize=8, length=0)
    for name, value in zip(names, values, strict=True):
        right.annotate(f"{value:.1f}", (value, name), (3, 0), textcoords="offset points", va="center", fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    return png(figure)
