"""What the pictures of the applications share: curves smoothed, images framed, a figure as bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#e07b00", "0.6"
"""Ours, what it is compared with most closely, and the rest."""
RIGHT, WRONG = "#2a9d5c", "#d1495b"


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at its start."""
    total, norm, smoothed = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def show_image(axes: Axes, image: Tensor, text: str = "", colour: str = "0.2") -> None:
    """One image ``[1, h, w]`` (1 is ink) or ``[3, h, w]``, values in [0, 1], in a coloured frame under a caption."""
    pixels = image.detach().float().cpu().numpy()
    picture = 1 - pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(text, fontsize=7, color=colour, pad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def image_grid(
    images: Tensor, captions: Sequence[str], title: str, columns: int = 10, colours: Sequence[str] | None = None
) -> bytes:
    """Images ``[n, c, h, w]`` with a caption each, row by row: a PNG."""
    rows = -(-len(images) // columns)
    height = 0.95 * rows + 0.6
    figure, axes = plt.subplots(rows, columns, figsize=(0.85 * columns, height), squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.6 / height, bottom=0.02, wspace=0.25, hspace=0.3)
    for index, place in enumerate(axes.flat):
        if index < len(images):
            show_image(place, images[index], captions[index], colours[index] if colours else "0.2")
        else:
            place.axis("off")
    figure.suptitle(title, fontsize=10)
    return png(figure)
