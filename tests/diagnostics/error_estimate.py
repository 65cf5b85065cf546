"""How often the error estimate of a hypergradient is within a factor of three of the true error.

    python -m tests.diagnostics.error_estimate [--count 2000] [--seed 0] [--verbose]

Every problem of `bilevel.problems` and those of `Known`, in float32 and float64, with loss, params and data scaled by
1e-6 to 1e6, from starts 1 to 1e4 away, by the default solvers and by some that stop early. The truth is the problem's
own hypergradient in float64, from the data as the problem has them. An error that is smaller than float64 resolves,
as far as the truth itself tells (it is computed at neighbouring hyperparameters as well), counts as right where the
estimate is below that as well. Where no solution is near, the estimate is infinite, and has to be: "unknown".
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.diagnostics import hypergradient
from bilevel.problems import BilevelTestProblem, NewtonProblem, collection

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


class Known(NewtonProblem):
    """A smooth problem given by its functions; ``near`` is a start from which dense Newton finds the solution."""

    def __init__(
        self, kind: str, inner: Callable[..., Tensor], outer: Callable[..., Tensor], near: Tensor, hparams: Tensor
    ):
        self.kind = kind  # type: ignore[misc, assignment]
        self.functions = inner, outer
        self.init, self.hparams = near, hparams

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.functions[0](params, hparams)

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.functions[1](params, hparams)


def known(dtype: torch.dtype) -> dict[str, BilevelTestProblem]:
    """Problems on which tolerances go wrong: exponentials, features of different units, small targets, far starts."""
    generator = torch.Generator().manual_seed(0)

    def data(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def number(value: float) -> Tensor:
        return torch.tensor([value], dtype=dtype)

    def square(y: Tensor, x: Tensor) -> Tensor:
        return y.square().sum()

    def regression(features: Tensor, targets: Tensor) -> Known:
        a, b = features.to(dtype), targets.to(dtype)

        def inner(y: Tensor, x: Tensor) -> Tensor:
            return (a.to(y.dtype) @ y - b.to(y.dtype)).square().mean() + (x * y.square()).sum()

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return (a.to(y.dtype) @ y - 2 * b.to(y.dtype)).square().mean()

        return Known("argmin", inner, outer, a.new_zeros(a.shape[1]), torch.full((a.shape[1],), 0.1, dtype=dtype))

    units, small = data(100, 2) * torch.tensor([3000.0, 1.0], dtype=torch.float64), data(30, 4)
    counts = torch.poisson((data(60, 3) @ torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)).exp(), generator)
    poisson = data(60, 3).to(dtype)
    return {
        "exponential": Known(
            "argmin", lambda y, x: (y.exp() - x * y + y.square() / 2).sum(), square, number(0.1), number(1.5)
        ),
        "units": regression(units, units @ torch.tensor([0.01, 1.0], dtype=torch.float64)),
        "small targets": regression(small, 1e-5 * small.sum(1)),
        "poisson": Known(
            "argmin",
            lambda w, x: (
                ((poisson.to(w.dtype) @ w).exp() - counts.to(w.dtype) * (poisson.to(w.dtype) @ w)).mean()
                + x * w.square().sum()
            ),
            square,
            torch.zeros(3, dtype=dtype),
            torch.tensor(0.1, dtype=dtype),
        ),
        "square root": Known("root", lambda y, x: y.square() - x, square, number(1.4), number(2.0)),
        "logarithm": Known("root", lambda y, x: y.exp() - x, square, number(0.7), number(2.0)),
        "Heron": Known("fixed_point", lambda y, x: 0.5 * (y + x / y), square, number(1.4), number(2.0)),
    }


class Scaled:
    """A problem in other units: ``loss`` times its inner function, ``params`` times its params, a start far away."""

    def __init__(self, problem: BilevelTestProblem, loss: float, params: float, away: float, seed: int):
        self.problem, self.kind, self.symmetric = problem, problem.kind, problem.symmetric
        self.loss, self.params, self.hparams = loss, params, problem.hparams
        generator = torch.Generator().manual_seed(seed)
        towards = torch.randn(problem.init.shape, generator=generator, dtype=torch.float64)
        towards = towards / towards.norm() * (1 + problem.init.double().norm())
        self.init = (params * (problem.init.double() + away * towards)).to(problem.init.dtype)
        if problem.kind in ("composite", "qp"):
            self.solve_inner, self.residual = problem.solve_inner, problem.residual  # type: ignore[attr-defined]

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        value = self.problem.inner(params / self.params, hparams)
        return (self.params if self.kind == "fixed_point" else self.loss) * value

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.problem.outer(params / self.params, hparams)


def in_double(problem: BilevelTestProblem) -> BilevelTestProblem:
    """The same problem, its data as they are, in float64."""
    twin = copy.copy(problem)
    for name, value in vars(problem).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.double())
    return twin


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
        problems = {**collection(dtype), **known(dtype)}
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
