"""Pictures: the schedules, what each search saw, and training with the settings that were found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from applications.frame.figures import BLUE, ORANGE, RIGHT, WRONG, png

COLOURS = {"start": "0.75", "constant": "0.45", "cosine": RIGHT, "TPE": WRONG, "learned": BLUE}
WINDOWS = (ORANGE, "#f2b366", "#8f4e00", "#c9a37a")


def colours(names: Iterable[str]) -> dict[str, str]:
    """One for each way of finding settings, in every picture; windows are shades of orange."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: WINDOWS[place % len(WINDOWS)] for place, name in enumerate(others)}


def effective_rates(one: dict[str, Any]) -> list[float]:
    """``lr / (1 - momentum)`` of each step; infinite where a learning that diverged has brought the momentum to 1."""
    return [rate / (1 - one["momentum"]) if one["momentum"] < 1 else math.inf for rate in one["lr"]]


def least(values: Iterable[float]) -> float:
    """The lowest of those that are positive and finite, where a logarithmic axis can begin; 1 where there is none."""
    return min((value for value in values if 0 < value < math.inf), default=1.0)


def schedules(found: dict[str, dict[str, Any]], history: Sequence[dict[str, Any]], title: str) -> bytes:
    """Left: effective learning rates ``lr / (1 - momentum)`` against the step. Right: the learned one as it came about.

    Args:
        found: by name, ``lr`` of each step and ``momentum``.
        history: of the learning: ``lr`` of each step, ``momentum`` and the outer ``step``.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for name, one in found.items():
        effective = effective_rates(one)
        label = f"{name} (momentum {one['momentum']:.2f})"
        width = 2.5 if name == "learned" else 1.5
        left.semilogy(range(1, len(effective) + 1), effective, color=colours(found)[name], label=label, linewidth=width)
    lowest = least(rate for name, one in found.items() if name != "cosine" for rate in effective_rates(one))
    left.set(
        xlabel="step of the training run",
        ylabel="learning rate / (1 - momentum)",
        title="what was found",
        ylim=(lowest / 2, None),
    )
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    for one in history:
        shade = colormaps["viridis_r"](0.1 + 0.9 * one["step"] / history[-1]["step"])
        effective = effective_rates(one)
        right.semilogy(range(1, len(effective) + 1), effective, color=shade, label=f"{one['step']} outer steps")
    right.set(xlabel="step of the training run", title="how it was learned")
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    figure.suptitle(title)
    return png(figure)


def search(seen: dict[str, list[float]], runs: int, title: str) -> bytes:
    """Validation loss against training runs: the best so far of a search, every loss of the learning.

    Args:
        seen: by name, the loss of each trial or outer step.
        runs: training runs of a trial or outer step.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in seen.items():
        ours = name == "learned"
        values = losses if ours else [min(losses[: place + 1]) for place in range(len(losses))]
        label = f"{name}, each outer step on fresh networks" if ours else f"{name}, best so far"
        places = [runs * (place + 1) for place in range(len(values))]
        axes.plot(places, values, color=colours(seen)[name], label=label, linewidth=2.5 if ours else 1.5)
    lowest = least(loss for losses in seen.values() for loss in losses)
    axes.set(xlabel="training runs", ylabel="validation loss", title=title, ylim=(0.9 * lowest, 3 * lowest))
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def training(curves: dict[str, list[tuple[int, float]]], title: str) -> bytes:
    """Validation loss along the run, mean over the fresh networks."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.semilogy(
            steps, values, color=colours(curves)[name], label=name, linewidth=2.5 if name == "learned" else 1.5
        )
    axes.set(xlabel="step of the training run", ylabel="validation loss", title=title)
    plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def plain(axes: Axes) -> None:
    """Numbers instead of powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_locator(NullLocator())
