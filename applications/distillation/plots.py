"""The learned images beside real ones and class means, and how the accuracy grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from applications.frame.figures import BLUE, ORANGE, RIGHT, WRONG, plt, png, show_image
from applications.frame.run import Row

COLOURS = (BLUE, ORANGE, RIGHT, WRONG)


def image_rows(rows: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], title: str) -> bytes:
    """One row for each set of images, one column a class (the first image of each), each scaled to its own range.

    Learned pixels leave [0, 1]: a row is drawn between its own smallest (white) and largest (black) value.
    """
    columns = len(next(iter(rows.values())))
    height = 0.9 * len(rows) + 0.5
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns + 1.7, height), squeeze=False)
    figure.subplots_adjust(
        left=1.6 / (0.8 * columns + 1.7), right=0.99, top=1 - 0.5 / height, bottom=0.01, wspace=0.1, hspace=0.1
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        low, high = images.min(), images.max()
        for place, image in zip(line, images, strict=True):
            show_image(place, (image - low) / (high - low), colour="0.7")
        text = "\n".join([name, *captions[name], f"pixels {low:.1f} to {high:.1f}"])
        line[0].text(-0.12, 0.5, text, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return png(figure)


def curves(trainings: Mapping[str, Sequence[Row]], title: str) -> bytes:
    """Validation accuracy against outer steps, one curve a training."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for colour, (name, records) in zip(COLOURS, trainings.items(), strict=False):
        measured = [record for record in records if "validation" in record]
        axes.plot([r["step"] for r in measured], [r["validation"] for r in measured], color=colour, label=name)
    axes.set(xlabel="outer steps", ylabel="validation accuracy (%)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(title)
    return png(figure)
