"""How often the error estimate of a hypergradient is within a factor of three of the true error.

    python -m tests.diagnostics.error_estimate [--count 2000] [--seed 0] [--verbose]

Every problem of `bilevel.problems` and the hard ones, in float32 and float64, with loss, params and data scaled by
1e-6 to 1e6, from starts 1 to 1e4 away, by the default solvers and by some that stop early. The truth is the problem's
own hypergradient in float64, from the data as the problem has them. An error that is smaller than float64 resolves,
as far as the truth itself tells (it is computed at neighbouring hyperparameters as well), counts as right where the
estimate is below that as well. Where no solution is near, the estimate is infinite, and has to be: "unknown".
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.diagnostics import hypergradient
from bilevel.problems import BilevelTestProblem, Scaled, collection, hard, in_double

FACTOR = 3.0
SCALED_DATA = {
    "Quadratics": ("c", "target", "hparams"),
    "Saddle": ("c", "target", "hparams"),
    "Singular": ("target", "hparams"),
    "Ridge": ("a_train", "a_val"),
    "WeightedRidge": ("b_train", "b_val"),
    "KernelRidge": ("b_train", "b_val"),
    "LinearFixedPoint": ("input", "bias", "target"),
}


def truth_of(problem: BilevelTestProblem) -> tuple[Tensor, float]:
    """The exact hypergradient, and how far it is from those at hyperparameters that differ in the last digit."""
    twin = in_double(problem)
    exact, spread = twin.hypergradient(twin.hparams), 0.0
    for sign in (1, -1):
        moved = twin.hparams * (1 + sign * torch.finfo(torch.float64).eps)
        spread = max(spread, float((twin.hypergradient(moved) - exact).norm()))
    return exact, max(spread, 4 * torch.finfo(torch.float64).eps * float(exact.norm()))


@dataclass
class Case:
    """One problem and its solvers, drawn at random; ``name`` says which."""

    name: str
    base: BilevelTestProblem
    problem: Scaled
    solver: Any
    hypergrad: bl.Implicit


def cases(count: int, seed: int) -> Iterator[Case]:
    """Problems, scales, starts and solvers, at random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for index in range(count):
        dtype = (torch.float64, torch.float32)[index % 2]
        problems = {**collection(dtype), **hard(dtype)}
        name = list(problems)[(index // 2) % len(problems)]
        base = problems[name]
        data = 10 ** uniform(-6, 6)
        for attribute in SCALED_DATA.get(type(base).__name__, ()):
            setattr(base, attribute, getattr(base, attribute) * data)
        loss, params = 10 ** uniform(-6, 6), 10 ** uniform(-6, 6)
        if base.kind in ("composite", "qp"):
            loss = params = 1.0
        away = 10 ** uniform(0, 4) if uniform(0, 1) < 0.5 else 0.0
        away = min(away, {"exponential": 30.0, "poisson": 3.0, "logarithm": 30.0}.get(name, math.inf))
        problem = Scaled(base, loss, params, away, index)
        solver: Any = None
        linear, how = None, int(uniform(0, 4))
        if how == 1 and base.kind == "argmin":
            steps = int(uniform(3, 30))
            solver = bl.LBFGS(gtol=0.0, max_steps=steps)
        elif how == 1 and base.kind in ("root", "fixed_point"):
            solver = bl.Newton(tol=0.0, max_steps=int(uniform(1, 6)))
        elif how >= 2:
            symmetric = base.kind in ("argmin", "composite") or base.symmetric
            linear = (bl.MINRES if symmetric else bl.GMRES)(rtol=10 ** uniform(-5, -1))
        label = f"{name} {dtype} loss {loss:.0e} params {params:.0e} data {data:.0e} away {away:.0e} "
        yield Case(f"{label}{solver} {linear}", base, problem, solver, bl.Implicit(linear))


def verdict(case: Case) -> tuple[str, str]:
    """Whether the estimate holds, and the numbers."""
    exact, resolution = truth_of(case.base)
    try:
        found = hypergradient(case.problem, solver=case.solver, hypergrad=case.hypergrad, throw="ignore")
    except (bl.SolveError, bl.NonFiniteError, ValueError) as refusal:
        return "refused", f"{type(refusal).__name__}: {refusal}"[:100]
    error, truth = float(found.stats["error"]), float((found.value.double() - exact).norm())
    size = float(exact.norm())
    numbers = f"true {truth / size:.1e}, estimated {error / size:.1e}, resolved {resolution / size:.0e}, {found.result}"
    if not math.isfinite(error):
        return ("unknown" if truth > 1e-3 * size or not found.result.ok else "fails"), numbers
    if max(truth, error) <= 30 * resolution:
        return "below float64", numbers
    return ("holds" if truth / FACTOR <= error <= truth * FACTOR else "fails"), numbers


def measure(count: int, seed: int, verbose: bool = False) -> Counter[str]:
    """The verdicts of so many cases."""
    verdicts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases(count, seed):
            outcome, numbers = verdict(case)
            verdicts[outcome] += 1
            if verbose and outcome in ("fails", "refused", "unknown"):
                print(f"{outcome}: {case.name}: {numbers}")
    return verdicts


def share(verdicts: Counter[str]) -> float:
    """The share of the finite estimates that hold."""
    return 1 - verdicts["fails"] / (verdicts["holds"] + verdicts["below float64"] + verdicts["fails"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    counted = measure(options.count, options.seed, options.verbose)
    print(f"{dict(counted)}: holds in {100 * share(counted):.1f} %")
