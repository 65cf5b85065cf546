"""``python -m applications.measurements.stochastic_curves``: every stochastic bilevel method side by side."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from applications.frame import measurement
from applications.frame.command import require, require_at_least_one, require_positive
from applications.frame.mini_batches import Batches
from applications.frame.run_folder import RunFolder
from applications.frame.trace import trace
from applications.measurements.stochastic_curves import plots
from applications.measurements.stochastic_curves.methods import Problem, methods
from bilevel import problems, stochastic


@dataclasses.dataclass(frozen=True)
class Config:
    """Outer suboptimality of every method against gradient evaluations and seconds; curves.json and curves.png."""

    problem: Literal["simulated", "logistic"] = "simulated"
    """Quadratics of dimension 100/100 and condition number 10, or logistic regression with a penalty a feature."""
    out: Path = Path("runs/stochastic_curves")
    """Folder for curves.json and curves.png; files of these names are replaced."""
    seconds: float = 6.0
    """Time for each method, without that of the measurements."""
    batches: int = 4
    """Mini-batches that each data set of 256 samples is cut into."""
    seed: int = 0
    """Seed of the order of the batches."""


PROBLEMS: dict[str, type[Problem]] = {
    "simulated": problems.finite_sums.Quadratics,
    "logistic": problems.finite_sums.Logistic,
}


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("measurements.stochastic_curves", arguments, Config, run, check)


def run(config: Config) -> None:
    """Trace each method, print its last point, write the curves and their picture."""
    problem = PROBLEMS[config.problem]()
    enough = config.batches <= problem.num_samples
    require(enough, f"--batches is {config.batches}: there are {problem.num_samples} samples to cut up.")
    torch.set_num_threads(1)  # Vectors of a few hundred numbers: more threads only wait for each other.
    # Before any clock runs: the exact solution, and what torch sets up at the first use of an operation.
    problem.suboptimality(problem.start()[1])
    for method in methods(problem, config.batches).values():
        Batches(problem.num_samples, config.batches).step(method)
    curves = {}
    print(f"{'method':8s} {'steps':>6s} {'passes':>7s} {'suboptimality':>14s}")
    for name, method in methods(problem, config.batches).items():
        batches = Batches(problem.num_samples, config.batches, config.seed)
        points = trace(
            partial(batches.step, method),
            partial(gap, problem, method),
            config.seconds,
            finished=lambda point: point["suboptimality"] <= FLOOR,
        )
        curves[name] = points
        last = points[-1]
        if "stopped" in last:
            print(f"{name} stopped: {last['stopped']}", file=sys.stderr)
        print(f"{name:8s} {last['step']:6d} {last['passes']:7.0f} {last['suboptimality']:14.2e}", flush=True)
    settings = {**dataclasses.asdict(config), "out": str(config.out)}
    written = {"settings": settings, "torch": torch.__version__, "curves": curves}
    picture = plots.curves(curves, titles[config.problem].format(config.batches))
    folder = RunFolder(config.out)
    folder.write_bytes("curves.json", json.dumps(written, indent=1).encode())
    folder.write_bytes("curves.png", picture)
    print(f"Wrote {config.out / 'curves.json'} and {config.out / 'curves.png'}.")


titles = {
    "simulated": "Simulated quadratics, dimensions 100/100, condition number 10, {} mini-batches",
    "logistic": "Logistic regression with one penalty a feature, {} mini-batches",
}


def check(config: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    require_positive(config, "seconds")
    require_at_least_one(config, "batches")


def gap(problem: Problem, method: stochastic.Stochastic) -> dict[str, float]:
    """The suboptimality of the hyperparameters where the method stands."""
    return {"suboptimality": max(problem.suboptimality(method.state_dict()["outer_params"][0]), FLOOR)}


FLOOR = 1e-14
"""Below it, differences of outer losses are rounding."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
