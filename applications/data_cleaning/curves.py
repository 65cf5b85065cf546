"""The stochastic setting: tuned methods beside implicit differentiation, as a table and as error against time."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

from applications.data_cleaning.model import Model
from applications.data_cleaning.stochastic import (
    IMPLICIT,
    INNER_FACTORS,
    OUTER_FACTORS,
    MiniBatches,
    implicit_curve,
    stochastic_curve,
    tune,
)
from applications.data_cleaning.task import Task
from applications.frame.figures import COLOURS, label_ends, png, style_of
from applications.frame.mini_batches import STOCHASTIC
from applications.frame.run import Row, Run
from applications.frame.trace import Point


class Curve(TypedDict):
    """The multiples that were chosen, and the points."""

    chosen: dict[str, float]
    points: list[Point]


def compare(run: Run, model: Model, task: Task, lr: float, seconds: float) -> None:
    """Each method as a part of the run; what is interrupted begins with the method where it stood.

    Args:
        model: with the penalty of the inner problem, which all fits here share.
        lr: of Adam in implicit differentiation.
        seconds: of processor time for each curve, and again as many for the step sizes of each stochastic method.
    """
    torch.set_num_threads(1)  # so that processor time is what a single process waits for
    problem = MiniBatches(model, task)
    known = run.part("baselines", lambda: baselines(model, task))
    curves: dict[str, list[Point]] = {
        IMPLICIT: run.part(IMPLICIT, lambda: implicit_curve(problem, lr, seconds)),
    }
    rows = [row(IMPLICIT, curves[IMPLICIT], {})]
    for name in STOCHASTIC:
        curve = run.part(name, lambda name=name: tuned_curve(problem, name, seconds))  # type: ignore[misc]
        curves[name] = curve["points"]
        rows.append(row(name, curve["points"], curve["chosen"]))
        run.say(f"  {name}: validation loss {rows[-1]['validation loss']:.4f}, error {rows[-1]['test error']:.2f} %")
        if "stopped" in curves[name][-1]:
            run.say(f"    it stopped there: {curves[name][-1]['stopped']}")
    run.table("Test error (%) of fits", [{"fitted to": name, "test error": error} for name, error in known.items()])
    rows.sort(key=lambda found: found["validation loss"])
    run.table(f"After {seconds:g} seconds of processor time each, by validation loss", rows)
    run.picture("curves.png", picture(curves, known, task))


def baselines(model: Model, task: Task) -> dict[str, float]:
    """Test errors of what needs no weights; the curves start at the noisy labels, all of one weight."""
    fits = {"validation data only": task.val, "right labels": task.clean[~task.wrong]}
    return {name: 100 - model.accuracy(model.fit(data), task.test) for name, data in fits.items()}


def tuned_curve(problem: MiniBatches, name: str, seconds: float) -> Curve:
    candidate = tune(problem, name, seconds / (len(INNER_FACTORS) * len(OUTER_FACTORS)))
    return {"chosen": asdict(candidate), "points": stochastic_curve(problem, name, candidate, seconds)}


def row(name: str, points: list[Point], chosen: dict[str, float]) -> Row:
    last: dict[str, Any] = points[-1]
    return {
        "method": name,
        "validation loss": last["validation loss"],
        "test error": last["test error"],
        "F1": last["F1"],
        "steps": last["step"],
        "inner step": chosen.get("inner"),
        "outer step": chosen.get("outer"),
    }


def picture(curves: dict[str, list[Point]], known: dict[str, float], task: Task) -> bytes:
    """Validation loss and test error against seconds, one labelled curve a method; baselines as horizontal lines."""
    colours = {**COLOURS, IMPLICIT: "black"}
    figure, panels = plt.subplots(1, 2, figsize=(14, 6.2))
    figure.subplots_adjust(left=0.06, right=0.92, bottom=0.09, top=0.92, wspace=0.3)
    for axes, quantity, label in zip(
        panels, ("validation loss", "test error"), ("validation loss", "test error (%)"), strict=True
    ):
        ends = {}
        for name, points in curves.items():
            if len(points) == 1:  # it diverged at once
                continue
            x, y = ([point[key] for point in points[1:]] for key in ("seconds", quantity))
            dashes, width = ("-", 2.4) if name == IMPLICIT else (style_of(name), 1.5)
            axes.loglog(x, y, dashes, color=colours[name], linewidth=width)
            ends[name] = (x[-1], y[-1])
        values = [point[quantity] for points in curves.values() for point in points if math.isfinite(point[quantity])]
        low, high = min(values), max(values)
        if quantity == "test error":
            for name, error in known.items():
                axes.axhline(error, color="0.5", linewidth=0.8, zorder=0)
                axes.annotate(
                    name, (0.01, error), xycoords=("axes fraction", "data"), fontsize=8, color="0.35", va="bottom"
                )
            low = min(low, *known.values())
        axes.set(xlabel="seconds of processor time on one thread", ylabel=label, ylim=(0.93 * low, 1.05 * high))
        # Less than a decade is seen: even steps read better than powers of ten.
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="major", color="0.92")
        label_ends(axes, ends, colours)
    figure.suptitle(
        f"Cleaning {len(task.train):,} examples by {len(task.val):,}: step sizes tuned on the validation loss"
    )
    return png(figure)
