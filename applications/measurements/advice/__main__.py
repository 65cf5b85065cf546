"""``python -m applications.measurements.advice``: `advise` beside all methods, in seconds to a solution.

Every contestant makes outer steps of Adam on the hyperparameters, warm from one to the next, for some seconds: 8 on the
network, 1.5 on the other problems, or ``--limit``.
Its time is that until the validation loss has made 95 % of the way from the common start to the best one that any
contestant found. Seconds are those of the processor, which other processes change little: set ``OMP_NUM_THREADS=1``.
Takes some minutes; writes ``advice.md`` into ``--out``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from applications.frame import measurement
from applications.frame.command import require, require_each_once, require_positive
from applications.frame.run_folder import RunFolder
from applications.measurements.advice.problems import PROBLEMS, Problem
from bilevel._torch import pytree
from bilevel.diagnostics import advise, methods_for, solve

PART, RTOL = 0.95, 1e-2
LARGEST_FACTORISED = 600


@dataclass(frozen=True)
class Config:
    """What to race, for how long, and where to write the table."""

    out: Path = Path("runs/advice")
    """Folder of the table."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which of the problems."""
    limit: float | None = None
    """Seconds of the processor for each contestant; None: those of the problem."""


Curve = list[tuple[float, float]]
"""Seconds since the start, and the validation loss there."""


def contestants(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What each takes: a dict of solver and hypergradient, or a tolerance that follows the outer loss."""
    found: dict[str, Callable[[], Any]] = {"advised": partial(_advised, problem), "defaults": dict}
    if problem.kind == "argmin":
        found["Adaptive"] = bl.Adaptive
    size = sum(leaf.numel() for leaf in pytree.tree_leaves(problem.init))
    for method in methods_for(problem):
        linear = getattr(method.hypergrad, "linear_solver", None)
        if not isinstance(linear, bl.LU | bl.Cholesky) or size <= LARGEST_FACTORISED:
            settings = {"hypergrad": method.hypergrad} | ({"solver": method.solver} if method.solver else {})
            found[method.name] = partial(dict, settings)
    return found


def _advised(problem: Problem) -> Any:
    advice = advise(problem, accuracy=RTOL)
    return advice.tolerance or {"solver": advice.solver, "hypergrad": advice.hypergrad}


def race(problem: Problem, taken: Any, lr: float, limit: float) -> Curve:
    """Outer steps for some seconds of the processor."""
    hparams = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), problem.hparams)
    outer, params, fit, curve = torch.optim.Adam(pytree.tree_leaves(hparams), lr=lr), problem.init, None, []
    begin = time.process_time()
    while time.process_time() - begin < limit:
        settings = taken.settings() if isinstance(taken, bl.Adaptive) else taken
        fit = solve(problem, hparams, init=params, throw="ignore", warm_start=fit, **settings)
        loss = problem.outer(fit.value, hparams)
        curve.append((time.process_time() - begin, float(loss.detach())))
        if not math.isfinite(curve[-1][1]):
            break
        outer.zero_grad()
        loss.backward()
        outer.step()
        params = pytree.tree_map(torch.Tensor.detach, fit.value)
        taken = taken.after(loss) if isinstance(taken, bl.Adaptive) else taken
    return curve


def seconds_to(curve: Curve, target: float) -> float:
    """When the loss was there first; infinite where it never was."""
    return next((seconds for seconds, loss in curve if loss <= target), math.inf)


def table(name: str, limit: float | None) -> list[str]:
    """One problem: its contestants with their seconds, the fastest first."""
    build, lr, usual = PROBLEMS[name]
    problem, curves, limit = build(), {}, usual if limit is None else limit
    for label, prepare in contestants(problem).items():
        try:
            curves[label] = race(problem, prepare(), lr, limit)
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as refusal:
            print(f"{name}, {label}: {type(refusal).__name__}: {str(refusal)[:100]}", flush=True)
    finite = {label: [point for point in curve if math.isfinite(point[1])] for label, curve in curves.items()}
    start = max(curve[0][1] for curve in finite.values() if curve)
    best = min(loss for curve in finite.values() for _, loss in curve)
    target = start - PART * (start - best)
    seconds = {label: seconds_to(curve, target) for label, curve in finite.items()}
    least = min(seconds.values())
    lines = [
        f"## {name}",
        "",
        f"{build.__doc__} Validation loss from {start:.4g} to {best:.4g}; the time to {target:.4g}.",
        "",
        "| method | seconds | of the fastest | outer steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label in sorted(seconds, key=lambda label: seconds[label]):
        took = seconds[label]
        shown = f"{took:.2f} | {took / least:.2f}" if math.isfinite(took) else f"not in {limit:g} |"
        lines.append(f"| {label} | {shown} | {len(curves[label])} |")
    return [*lines, ""]


def check(settings: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    require_positive(settings, "limit")
    require_each_once(settings, "problems")
    unknown = [name for name in settings.problems if name not in PROBLEMS]
    require(not unknown, f"--problems has {', '.join(unknown)}: there are {', '.join(PROBLEMS)}.")


def run(settings: Config) -> None:
    """Race on each problem, print its table and write all."""
    lines = ["# advise beside all methods", "", "Seconds of the processor, without those of `advise` itself.", ""]
    for name in settings.problems:
        found = table(name, settings.limit)
        print("\n".join(found), flush=True)
        lines += found
    RunFolder(settings.out).write_text("advice.md", "\n".join(lines))


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("measurements.advice", arguments, Config, run, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
