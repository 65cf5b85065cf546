"""``python -m applications.measurements.method_table``: every method on every problem, its error beside what it states.

Takes about a minute. Writes ``method_table.md`` and ``method_table.json`` into ``--out``; exit code 1 where a method is
less accurate than it states and its own record does not say so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import bilevel as bl
from applications.frame import measurement
from applications.measurements import cells

COMMAND = "python -m applications.measurements.method_table --out docs"
SLOW = {"logistic": (1.0, 600)}
"""Step size and steps of unrolled gradient descent, where the defaults do not make it converge."""
TOO_SLOW = ("ill-conditioned", "kernel ridge")
"""Where no step size makes it converge in hundreds of steps."""
ILL_CONDITIONED = {"ill-conditioned": 1e4}
"""An iterative solver stops at a residual, and its error may exceed that by the condition number."""


@dataclass(frozen=True)
class Config(cells.Config):
    """What to measure, and where to write it."""

    out: Path = Path("runs/method_table")


@dataclass(frozen=True)
class Cell(cells.Cell):
    """One method on one problem. ``error``: relative; ``told``: its record says that a solve failed."""

    method: str
    problem: str
    error: float
    tolerance: float | None
    told: bool

    @property
    def kept(self) -> bool:
        """Whether it is as accurate as it states, or says that it is not."""
        return self.tolerance is None or self.error <= self.tolerance or self.told


def measure(precision: str) -> list[Cell]:
    """All cells of one precision."""
    dtype = getattr(torch, precision)
    cells = []
    for name, problem in bl.problems.collection(dtype).items():
        truth = bl.problems.collection()[name]
        exact = truth.hypergradient(truth.hparams)
        rtol = 1e-8 if dtype is torch.float64 else 1e-6
        for method in bl.diagnostics.all_methods(rtol, *SLOW.get(name, ())):
            if not method.suits(problem) or (method.solver is not None and name in TOO_SLOW):
                continue
            if dtype is torch.float32 and name in ILL_CONDITIONED:
                continue  # a condition number of 1e6 leaves float32 no digit
            cells.append(_cell(precision, name, problem, method, exact))
    return cells


def _cell(
    precision: str, name: str, problem: bl.diagnostics.Bilevel, method: bl.diagnostics.Method, exact: torch.Tensor
) -> Cell:
    x = problem.hparams.clone().requires_grad_()
    solver = method.solver or bl.diagnostics.accurate_solver(problem)
    fit = bl.diagnostics.solve(problem, x, solver=solver, hypergrad=method.hypergrad, throw="ignore")
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x, allow_unused=True)
    found = torch.zeros_like(x) if grad is None else grad
    error = float((found.double() - exact).norm() / exact.norm())
    stated = method.tolerance
    if stated is not None:
        stated = ILL_CONDITIONED.get(name, 1.0) * (stated if precision == "float64" else method.single)
    told = fit.adjoint is not None and not fit.adjoint.result.ok
    return Cell(precision, method.name, name, error, stated, told)


def table(cells: list[Cell]) -> str:
    """Markdown: a row for each method, a column for each problem."""
    problems = list(dict.fromkeys(cell.problem for cell in cells))
    by_place = {(cell.method, cell.problem): cell for cell in cells}
    lines = [f"| method | states | {' | '.join(problems)} |", f"| --- | ---: |{' ---: |' * len(problems)}"]
    for method in dict.fromkeys(cell.method for cell in cells):
        row = [by_place.get((method, problem)) for problem in problems]
        plain = [cell.tolerance for cell in row if cell and cell.tolerance and cell.problem not in ILL_CONDITIONED]
        states = f"{plain[0]:.0e}" if plain else "none"
        lines.append(f"| {method} | {states} | {' | '.join(_shown(cell) for cell in row)} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.error:.0e}{' (told)' if cell.told else ''}{'' if cell.kept else ' **above**'}"


def page(measured: list[Cell]) -> str:
    """The whole page."""
    head = [
        "# Every method on every problem",
        "Relative error of the hypergradient against the exact one, the inner problem solved as accurately as the "
        "precision allows (unrolled methods: gradient descent to convergence). Written by",
        f"    {COMMAND}",
        "An empty cell: the method is not for that matrix, or gradient descent would not converge. *none*: an "
        "approximation that is asked for by name, biased or (evolution strategies, forward gradient) random. *(told)*: "
        "the solver did not reach its tolerance, and `fit.adjoint` says so. Iterative solvers run at `rtol=1e-8` "
        "(float32: 1e-6); on the ill-conditioned quadratic, of condition "
        "1e6, their error may exceed that by a factor of 1e4.",
    ]
    return cells.page(head, measured, table)


def run(config: Config) -> int:
    """Measure, print and write."""
    measured = cells.main(config, "method_table", measure, page)
    broken = [cell for cell in measured if not cell.kept]
    for cell in broken:
        print(f"{cell.method} on {cell.problem} ({cell.precision}): {cell.error:.1e} > {cell.tolerance:.1e}")
    return 1 if broken else 0


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("measurements.method_table", arguments, Config, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
