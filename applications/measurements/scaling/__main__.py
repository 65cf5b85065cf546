"""``python -m applications.measurements.scaling``: seconds and memory against each thing that can grow."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from applications.few_shot import benchmark
from applications.few_shot.config import Config as FewShot
from applications.frame import memory
from applications.frame.command import Knobs, main, require, require_at_least_one
from applications.frame.errors import UserError
from applications.frame.figures import BLUE, ORANGE, png
from applications.frame.run import Row, Run
from applications.measurements.scaling import penalized
from applications.measurements.scaling.penalized import Size


@dataclass(frozen=True)
class Config(Knobs):
    """Grow tasks, parameters, inner steps, hyperparameters and ranks one by one: seconds and peak memory of each."""

    tasks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Tasks of a few-shot meta-gradient, in the default settings of `applications.few_shot`."""
    widths: tuple[int, ...] = (16, 64, 256, 1_000, 3_000)
    """Hidden units of a network on digits: its parameters grow by their square."""
    inner_steps: tuple[int, ...] = (1, 10, 100, 1_000)
    """Steps of gradient descent, with the network of 256 hidden units."""
    penalties: tuple[int, ...] = (1, 100, 10_000, 1_000_000)
    """Hyperparameters, with the network of 1,000 hidden units; at most one for each of its parameters."""
    ranks: tuple[int, ...] = (1, 2)
    """Processes of one thread each, under torchrun; more than there are cores only get in each other's way."""
    floats: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    """Numbers of an all-reduce alone."""
    examples: int = 20_000
    """Examples of the softmax regression whose data are shared out among ranks."""
    features: int = 1_000
    """Features of that; as many penalties."""
    repeats: int = 5
    """Runs of each, of which the median counts; memory is the largest."""

    def check(self) -> None:
        for name in ("tasks", "widths", "inner_steps", "penalties", "ranks", "floats"):
            values = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(len(values) > 0 and min(values, default=0) >= 1, f"{option}: give numbers of at least 1.")
        most = Size(PENALIZED).num_params
        require(
            max(self.penalties) <= most, f"--penalties: the network has {most:,} parameters, and no more penalties."
        )
        require_at_least_one(self, "examples", "features", "repeats")
        require(self.examples >= max(self.ranks), "--examples: each rank needs one.")


STEPPED, PENALIZED = 256, 1_000
"""Hidden units where the width does not grow."""


def story(knobs: Config, run: Run) -> None:
    """An axis after the other; each point is a part, so that an interrupted run goes on."""
    curves: dict[str, tuple[str, list[Row]]] = {}

    def axis(title: str, column: str, rows: list[Row]) -> None:
        run.table(title, rows)
        curves[title] = (column, rows)

    few_shot = FewShot(threads=knobs.threads)
    axis(
        "A few-shot meta-gradient against its tasks",
        "tasks",
        [
            {
                "tasks": n,
                **point(
                    run,
                    f"{n} tasks",
                    partial(memory.peak_and_seconds, benchmark.measure, replace(few_shot, tasks=n), {}, "wall"),
                    knobs.repeats,
                ),
            }
            for n in knobs.tasks
        ],
    )

    def hypergradient(size: Size) -> Row:
        name = f"{size.width} wide, {size.penalties} penalties, {size.inner_steps} steps, {size.method}"
        return point(run, name, partial(memory.peak_and_seconds, penalized.measure, size, knobs.threads), knobs.repeats)

    axis(
        "A hypergradient against its parameters",
        "parameters",
        [{"parameters": Size(width).num_params, **hypergradient(Size(width))} for width in knobs.widths],
    )
    steps: list[Row] = []
    for count in knobs.inner_steps:
        implicit = hypergradient(Size(STEPPED, inner_steps=count))
        unrolled = hypergradient(Size(STEPPED, inner_steps=count, method="unrolled"))
        steps.append({"inner steps": count, **implicit, **{f"unrolled, {key}": v for key, v in unrolled.items()}})
    axis("A hypergradient against its inner steps", "inner steps", steps)
    axis(
        "A hypergradient against its hyperparameters",
        "hyperparameters",
        [{"hyperparameters": count, **hypergradient(Size(PENALIZED, count))} for count in knobs.penalties],
    )
    shared, reduces = over_ranks(knobs, run)
    axis("Ranks of one thread", "ranks", shared)
    if reduces:
        axis(f"An all-reduce over {max(knobs.ranks)} ranks", "floats", reduces)
    run.picture("scaling.png", picture(curves))


def point(run: Run, name: str, measure: Callable[..., tuple[float, float]], repeats: int) -> Row:
    """Seconds and peak MiB; None where the process ran out of memory."""

    def both() -> Row:
        try:
            peak, seconds = measure(repeats=repeats)
            return {"seconds": seconds, "MiB": peak}
        except BrokenProcessPool:
            return {"seconds": None, "MiB": None}

    return run.part(name, both)


def over_ranks(knobs: Config, run: Run) -> tuple[list[Row], list[Row]]:
    """The same work on more processes: a few-shot meta-step, and a hypergradient whose data are in shards."""
    rows: list[Row] = []
    reduces: list[Row] = []
    for count in knobs.ranks:
        meta_step = run.part(f"few-shot, {count} ranks", partial(meta_step_seconds, knobs, run, count))
        numbers = [knobs.examples, knobs.features, knobs.repeats, *(knobs.floats if count > 1 else ())]
        found = run.part(
            f"shards, {count} ranks", partial(launch, "applications.measurements.scaling.sharded", numbers, count)
        )
        rows.append({"ranks": count, "seconds, 16 tasks": meta_step, "seconds, shards": found["hypergradient"]})
        if count == max(knobs.ranks) > 1:
            reduces = [{"floats": n, "seconds": found["all_reduce"][str(n)]} for n in knobs.floats]
    return rows, reduces


def meta_step_seconds(knobs: Config, run: Run, count: int) -> float:
    """Mean seconds of the meta-steps of a training that is done under torchrun, without the first."""
    out = run.folder.path / f"few-shot-{count}"
    shutil.rmtree(out, ignore_errors=True)  # of an interrupted call
    steps = 2 * knobs.repeats + 1
    arguments = ["train", "--steps", steps, "--validate-every", 0, "--eval-tasks", 1, "--out", out]
    launch("applications.few_shot", arguments, count, parse=False)
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (seconds[-1] - seconds[0]) / (steps - 1)


def launch(module: str, arguments: list[Any], count: int, parse: bool = True) -> Any:
    """Run a module under torchrun with one thread a rank; the JSON of its last line.

    Raises:
        UserError: it failed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", module]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"{module} failed on {count} ranks:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if parse else None


def picture(curves: dict[str, tuple[str, list[Row]]]) -> bytes:
    """A panel for each axis, both scales logarithmic; memory on a second scale of its own."""
    columns = 3
    figure, panels = plt.subplots(math.ceil(len(curves) / columns), columns, figsize=(13, 7), squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.axis("off")
    for panel, (title, (column, rows)) in zip(panels.flat, curves.items(), strict=False):
        units = {"seconds": panel}
        if any("MiB" in key for key in rows[0]):
            units["peak MiB"] = panel.twinx()
        for key in [key for key in rows[0] if key != column]:
            kept = [(row[column], row[key]) for row in rows if (row[key] or 0) > 0]
            on, colour = (units["peak MiB"], ORANGE) if "MiB" in key else (panel, BLUE)
            style = "--" if "unrolled" in key or "shards" in key else "-"
            if kept:
                on.plot(*zip(*kept, strict=True), color=colour, marker="o", ms=4, ls=style, label=key)
        panel.set(xscale="log", xlabel=column)
        panel.set_title(title, fontsize=9)
        for unit, axes in units.items():
            axes.set(yscale="log", ylabel=unit)
            low, high = axes.get_ylim()
            if low > 0:  # something is drawn; what hardly grows is to look so
                axes.set_ylim(low / 2, max(high * 2, 100 * low))
            for one in (axes.xaxis, axes.yaxis):
                one.set_minor_formatter(NullFormatter())
        if column == "ranks":
            panel.set_xticks([row[column] for row in rows], [str(row[column]) for row in rows])
        handles = [pair for axes in units.values() for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        panel.legend(*zip(*handles, strict=True), fontsize=7)
    figure.tight_layout()
    return png(figure)


if __name__ == "__main__":
    sys.exit(main("measurements.scaling", sys.argv[1:], Config, story))
