"""What the pictures of the applications share: curves smoothed, images framed, a figure as bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import log

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from applications.frame.names import legible

OURS = "bilevel"
"""What names of our own contestants begin with."""
BLUE, ORANGE, PURPLE, GREY = "#1f6feb", "#e07b00", "#8a4fbf", "0.6"
"""Ours, what it is compared with most closely, another of those, and the rest."""
RIGHT, WRONG = "#2a9d5c", "#d1495b"

STYLES = ("-", "--", ":", "-.")
"""By family; colours tell the members of a family apart."""
FAMILIES = {
    "one loop": ("SOBA", "SABA", "SRBA", "FSLA", "MA-SOBA", "SPABA"),
    "two loops": ("AmIGO", "stocBiO", "BSA", "TTSA"),
    "momentum, recursion": ("MRBO", "SUSTAIN", "VRBO"),
    "first order": ("F2SA", "BOME"),
}
COLOURS = {
    **dict(zip(FAMILIES["one loop"], ("#08519c", "#1f78e0", "#17becf", "#7b9fd4", "#3d4f73", "#00838f"), strict=True)),
    **dict(zip(FAMILIES["two loops"], ("#00441b", "#238b45", "#66c164", "#9aa800"), strict=True)),
    **dict(zip(FAMILIES["momentum, recursion"], ("#a50f15", "#ef3b2c", "#fb7b50"), strict=True)),
    **dict(zip(FAMILIES["first order"], ("#6a3d9a", "#c51b8a"), strict=True)),
}


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG; it is closed."""
    for text in figure.findobj(Text):
        text.set_text(legible(text.get_text()))
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
    """Height of a value on a logarithmic axis, 0 at the bottom and 1 at the top."""
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
