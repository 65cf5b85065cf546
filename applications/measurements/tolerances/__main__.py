"""``python -m applications.measurements.tolerances``: solves without a tolerance, in other units and from far starts.

Takes about a minute. Writes ``tolerances.md`` and ``tolerances.json`` into ``--out``; exit code 1 where a hypergradient
is less accurate than a solve without a tolerance promises, and nothing says so.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl
from applications.frame import measurement
from applications.measurements import cells
from bilevel.problems import BilevelTestProblem, Known, LassoPath, Scaled, Singular, collection, hard, in_double

COMMAND = "python -m applications.measurements.tolerances --out docs"
PROMISED = {"float64": 1e-6, "float32": 1e-3}
UNITS = (1e-6, 1e-3, 1e3, 1e6)
AWAY = (1.0, 10.0, 100.0, 1e3, 1e4)
FARTHEST = {"exponential": 30.0, "poisson": 3.0, "logarithm": 30.0}
"""Where a start farther away overflows."""
TARGETS, FEATURES = ("b_train", "b_val"), ("a_train", "a_val")


@dataclass(frozen=True)
class Config(cells.Config):
    """What to measure, and where to write it."""

    out: Path = Path("runs/tolerances")


@dataclass(frozen=True)
class Cell(cells.Cell):
    """One problem in one variation, by all defaults.

    Attributes:
        error: of the hypergradient, relative; None where the solve raised. told: a warning or an error says that it is
            not accurate. evaluations: of the inner function until the solution, with that which is differentiated.
    """

    problem: str
    variation: str
    error: float | None
    told: bool
    evaluations: int

    @property
    def kept(self) -> bool:
        """Whether it is as accurate as is promised, or says that it is not."""
        return self.told or (self.error is not None and self.error <= PROMISED[self.precision])


class ScaledLasso(Scaled):
    """The lasso path in other units, by proximal gradient descent without a tolerance."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.solve_inner = self._solve_inner

    def _solve_inner(self, hparams: Tensor, *, solver: Any = None, **settings: Any) -> bl.Solution:
        """The penalty is in the units of the loss."""
        strength = self.loss / self.params * hparams.exp()
        proximal = bl.ProximalGradient(bl.prox.L1(strength))
        return bl.argmin(self.inner, self.init, hparams, solver=proximal, **settings)


class ScaledSingular(Scaled):
    """A singular problem from starts that have no part in its null space: solvers leave it as it is."""

    def __init__(self, problem: Singular, *arguments: Any, **settings: Any):
        super().__init__(problem, *arguments, **settings)
        self.init = problem.projector @ self.init


def raw_medical_data(dtype: torch.dtype) -> Known:
    """Logistic regression on 30 features whose sizes differ by 1e6, as they are in the file."""
    features, labels = (torch.tensor(part, dtype=torch.float32) for part in load_breast_cancer(return_X_y=True))

    def loss(w: Tensor, rows: slice) -> Tensor:
        return binary_cross_entropy_with_logits(features[rows].to(w.dtype) @ w, labels[rows].to(w.dtype))

    return Known(
        "argmin",
        lambda w, x: loss(w, slice(300)) + x.exp() / 2 * w.square().sum(),
        lambda w, x: loss(w, slice(300, None)),
        torch.zeros(30, dtype=dtype),
        torch.tensor(-2.0, dtype=dtype),
    )


def variations(name: str, problem: BilevelTestProblem) -> Iterator[tuple[str, BilevelTestProblem, Scaled]]:
    """The name of each, the problem whose hypergradient is the exact one, and the problem to solve."""
    if problem.kind == "qp":
        yield "as it is", problem, Scaled(problem, 1.0, 1.0, 0.0, seed=0)
        return
    kind: Any = {LassoPath: ScaledLasso, Singular: ScaledSingular}.get(type(problem), Scaled)
    yield "as it is", problem, kind(problem, 1.0, 1.0, 0.0, seed=0)
    for unit in UNITS:
        yield f"loss {unit:g}", problem, kind(problem, unit, 1.0, 0.0, seed=0)
    for unit in UNITS:
        yield f"params {unit:g}", problem, kind(problem, 1.0, unit, 0.0, seed=0)
    for data, attributes in (("targets", TARGETS), ("features", FEATURES)):
        for unit in UNITS if all(hasattr(problem, attribute) for attribute in attributes) else ():
            if data == "targets" and name == "logistic":
                continue  # labels
            scaled = copy.copy(problem)
            for attribute in attributes:
                setattr(scaled, attribute, unit * getattr(problem, attribute))
            yield f"{data} {unit:g}", scaled, kind(scaled, 1.0, 1.0, 0.0, seed=0)
    for away in AWAY:
        if away <= FARTHEST.get(name, away):
            yield f"away {away:g}", problem, kind(problem, 1.0, 1.0, away, seed=0)


def measure(precision: str) -> list[Cell]:
    """All cells of one precision."""
    dtype = getattr(torch, precision)
    problems = {**collection(dtype), **hard(dtype)}
    cells = [
        _cell(precision, name, variation, truth, problem)
        for name, base in problems.items()
        for variation, truth, problem in variations(name, base)
    ]
    medical = raw_medical_data(dtype)
    return [*cells, _cell(precision, "raw medical data", "as it is", medical, Scaled(medical, 1.0, 1.0, 0.0, seed=0))]


def _cell(precision: str, name: str, variation: str, truth: BilevelTestProblem, problem: Scaled) -> Cell:
    exact = in_double(truth).hypergradient(truth.hparams.double())
    x, evaluations, function = problem.hparams.clone().requires_grad_(), 0, problem.inner

    def inner(params: Tensor, hparams: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return function(params, hparams)

    problem.inner = inner  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            fit = bl.diagnostics.solve(problem, x)
            solved = evaluations
            (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
        except (bl.SolveError, bl.NonFiniteError):
            return Cell(precision, name, variation, None, True, evaluations)
    told = any(issubclass(warning.category, bl.SolveWarning) for warning in heard)
    error = float((grad.double() - exact).norm() / (exact.norm() if bool(exact.any()) else 1.0))
    return Cell(precision, name, variation, error, told, solved)


def table(cells: list[Cell]) -> str:
    """Markdown: a row for each variation, a column for each problem."""
    problems = list(dict.fromkeys(cell.problem for cell in cells))
    by_place = {(cell.variation, cell.problem): cell for cell in cells}
    lines = [f"| | {' | '.join(problems)} |", f"| --- |{' ---: |' * len(problems)}"]
    for variation in dict.fromkeys(cell.variation for cell in cells):
        row = [_shown(by_place.get((variation, problem))) for problem in problems]
        lines.append(f"| {variation} | {' | '.join(row)} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    error = "raised" if cell.error is None else f"{cell.error:.0e}"
    return f"{error}{' *told*' if cell.told else ''}, {cell.evaluations}{'' if cell.kept else ' **wrong**'}"


def page(measured: list[Cell]) -> str:
    """The whole page."""
    wrong, told = sum(not cell.kept for cell in measured), sum(cell.told for cell in measured)
    false = sum(cell.told and cell.error is not None and cell.error <= PROMISED[cell.precision] for cell in measured)
    head = [
        "# Solves without a tolerance",
        "How accurate the hypergradient is where nothing is chosen: default inner solver, default linear solver, no "
        "tolerance. Each problem as it is, with the loss, the params, the targets or the features in units of 1e-6 to "
        "1e6, and from starts 1 to 1e4 away. Written by",
        f"    {COMMAND}",
        "A cell: the relative error against the exact hypergradient, and how often the inner function was evaluated. "
        f"Promised are {PROMISED['float64']:.0e} in float64 and {PROMISED['float32']:.0e} in float32, or a warning: "
        "*told*. Lasso and the quadratic program are solved by their own solvers, the latter as it is only. Starts of "
        "the singular problem have no part in its null space, which every solver leaves as it is.",
        f"**{len(measured)} cells, {wrong} wrong and not told; {told} told, of which {false} were accurate all the "
        "same.**",
    ]
    return cells.page(head, measured, table)


def run(config: Config) -> int:
    """Measure, print and write."""
    measured = cells.main(config, "tolerances", measure, page)
    return 1 if any(not cell.kept for cell in measured) else 0


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("measurements.tolerances", arguments, Config, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
