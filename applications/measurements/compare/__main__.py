"""``python -m applications.measurements.compare``: hypergradients beside TPE, Gaussian process and random search."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial

import optuna
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from applications.frame.command import Knobs, main, require
from applications.frame.figures import BLUE, GREY, ORANGE, PURPLE, png
from applications.frame.run import Row, Run
from applications.measurements.compare.methods import METHODS, trace
from applications.measurements.compare.problem import make

FEATURES = 1_000


@dataclass(frozen=True)
class Config(Knobs):
    """One bilevel problem with 1 to 1,000 hyperparameters, by hypergradients and by black-box search, equal seconds."""

    sizes: tuple[int, ...] = (1, 10, 100, 1_000)
    """Numbers of penalties for 1,000 features."""
    seconds: float = 5.0
    """For each method at each size."""

    def check(self) -> None:
        require(bool(self.sizes), "--sizes is empty.")
        for size in self.sizes:
            require(1 <= size <= FEATURES, f"--sizes has {size}: {FEATURES} features have 1 to {FEATURES} penalties.")
        require(self.seconds > 0, f"--seconds is {self.seconds}: it must be positive.")


def story(knobs: Config, run: Run) -> None:
    """Each method at each size is a part; then the table and the picture."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[Row] = []
    found: dict[int, dict[str, Row]] = {}
    for size in knobs.sizes:
        problem = make(size, knobs.seed, FEATURES)
        next(METHODS["hypergradient"](problem, 0))  # what torch sets up at its first use is nobody's time
        found[size] = {}
        for name, method in METHODS.items():
            points = method(problem, knobs.seed)
            measure = partial(trace, points, knobs.seconds, problem.test.loss, time.perf_counter)
            result = run.part(f"{name}, {size}", measure)
            found[size][name] = result
            rows.append(
                {
                    "hyperparameters": str(size),
                    "method": name,
                    "validation loss": result["curve"][-1][1],
                    "test loss": result["test"],
                    "evaluations": result["evaluations"],
                }
            )
            run.say(f"{size} hyperparameters, {name}: {result['curve'][-1][1]:.4f}")
    run.table(f"Best validation loss after {knobs.seconds:g} s", rows)
    run.picture("curves.png", curves(found, knobs.seconds))


STYLES = {
    "hypergradient": (BLUE, "-"),
    "TPE": (ORANGE, "-"),
    "Gaussian process": (PURPLE, "-"),
    "random": (GREY, "--"),
}


def curves(found: dict[int, dict[str, Row]], seconds: float) -> bytes:
    """A panel for each size: best validation loss so far against seconds."""
    figure, panels = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.6), layout="constrained", squeeze=False)
    for axes, (size, results) in zip(panels[0], found.items(), strict=True):
        last = {name: result["curve"][-1][1] for name, result in results.items()}
        best = min(last, key=last.__getitem__)
        verdict = f"best: {best}" if max(last.values()) > 1.01 * last[best] else "all within 1 %"
        for name, result in results.items():
            times, losses = zip(*result["curve"], strict=True)
            colour, style = STYLES[name]
            axes.step([*times, seconds], [*losses, losses[-1]], style, where="post", color=colour, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="seconds", xlim=(seconds / 250, seconds))
        axes.set_title(f"{size} hyperparameter{'s' if size > 1 else ''}\n{verdict}", fontsize=10)
    panels[0][0].set_ylabel("best validation loss so far")
    panels[0][-1].legend(frameon=False, fontsize=8)
    return png(figure)


if __name__ == "__main__":
    sys.exit(main("measurements.compare", sys.argv[1:], Config, story))
