"""``python -m applications.measurements.stochastic_curves``: every stochastic bilevel method side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from applications.frame.errors import UserError, exit_code
from applications.frame.mini_batches import Batches
from applications.frame.trace import trace
from applications.measurements.stochastic_curves import plots
from applications.measurements.stochastic_curves.methods import Problem, methods
from bilevel import files, problems, stochastic


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
    """Run all methods; the exit code is 2 for bad input, which is told in one message."""
    config = tyro.cli(Config, args=arguments, prog="python -m applications.measurements.stochastic_curves")
    return exit_code(lambda: run(config))


def run(config: Config) -> None:
    """Trace each method, print its last point, write the curves and their picture."""
    check(config)
    problem = PROBLEMS[config.problem]()
    if config.batches > problem.num_samples:
        raise UserError(f"--batches is {config.batches}: there are {problem.num_samples} samples to cut up.")
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
    try:
        files.write_atomically(
            config.out / "curves.json", lambda file: file.write(json.dumps(written, indent=1).encode())
        )
        files.write_atomically(config.out / "curves.png", lambda file: file.write(picture))
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be written: {error}. Choose another folder.") from error
    print(f"Wrote {config.out / 'curves.json'} and {config.out / 'curves.png'}.")


titles = {
    "simulated": "Simulated quadratics, dimensions 100/100, condition number 10, {} mini-batches",
    "logistic": "Logistic regression with one penalty a feature, {} mini-batches",
}


def check(config: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    if not 0 < config.seconds < math.inf:
        raise UserError(f"--seconds is {config.seconds}: a positive number is needed, the time for each method.")
    if config.batches < 1:
        raise UserError(f"--batches is {config.batches}: at least one is needed.")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file: give a folder.")


def gap(problem: Problem, method: stochastic.Stochastic) -> dict[str, float]:
    """The suboptimality of the hyperparameters where the method stands."""
    return {"suboptimality": max(problem.suboptimality(method.state_dict()["outer_params"][0]), FLOOR)}


FLOOR = 1e-14
"""Below it, differences of outer losses are rounding."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
