"""Every method on one problem: error, Hessian products, evaluations, time and memory, side by side."""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..context import differentiates
from ..extras import require
from ..files import write_atomically
from ..hypergrad.implicit import Implicit
from ..linalg.cg import CG
from ..linalg.direct import LU
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..linalg.solve import LinearSolver, LinearState
from ..notices import tell
from ..solution import Result, Solution, SolveWarning
from ..tree import Tree, leaves, tree_map
from .checked import distance
from .cost import median_seconds, peak_mib
from .methods import accurate_solver, methods_for
from .problem import AnyHypergrad, Bilevel, CompositeProblem, Method, Solver, as_solved, leaf_copies, solve

LARGEST_DENSE = 2048


@dataclass(frozen=True)
class Row:
    """One method. ``error``: relative, from the reference; NaN where it has no answer, and ``note`` says why.

    Attributes:
        products: products with the Hessian or Jacobian in the backward pass (methods with a linear solve only).
        evaluations: calls of the inner function, forward and backward pass together.
        seconds: median, forward and backward. peak_mib: live tensor memory above the start.
    """

    method: str
    error: float
    products: int | None
    evaluations: int
    seconds: float
    peak_mib: float
    result: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare_methods` measured; ``str()`` is a Markdown table."""

    rows: list[Row]
    reference: str
    machine: str

    def __str__(self) -> str:
        lines = [
            "| method | relative error | products | evaluations | ms | peak MiB | result |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in self.rows:
            products = "" if row.products is None else str(row.products)
            error = "" if math.isnan(row.error) else f"{row.error:.1e}"
            lines.append(
                f"| {row.method} | {error} | {products} | {row.evaluations} | {1e3 * row.seconds:.2f} | "
                f"{row.peak_mib:.2g} | {row.note or row.result} |"
            )
        return "\n".join([*lines, "", f"Relative to {self.reference}. {self.machine}."])

    def to_json(self) -> str:
        """Everything, for other programs; NaN becomes null."""
        rows = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}
            for row in self.rows
        ]
        return json.dumps({"reference": self.reference, "machine": self.machine, "rows": rows}, indent=2)

    def to_png(self) -> bytes:
        """Error against time, each method by its name."""
        require("matplotlib", "applications")
        from matplotlib.figure import Figure

        shown = [row for row in self.rows if not math.isnan(row.error)]
        figure = Figure(figsize=(8, 0.32 * len(shown) + 1.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        order = sorted(shown, key=lambda row: -row.error)
        names = [row.method for row in order]
        floor = 1e-17
        for axes, values, label in (
            (left, [max(row.error, floor) for row in order], "relative error"),
            (right, [1e3 * row.seconds for row in order], "milliseconds"),
        ):
            axes.hlines(range(len(order)), min(values) / 3, values, color="0.8")
            axes.plot(values, range(len(order)), "o", color="tab:blue")
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.grid(axis="x", alpha=0.3)
        left.set_yticks(range(len(order)), names)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write ``comparison.md``, ``comparison.json`` and ``comparison.png``, each as a whole or not at all."""
        contents = {"md": f"{self}\n".encode(), "json": self.to_json().encode(), "png": self.to_png()}
        for suffix, content in contents.items():
            write_atomically(Path(folder) / f"comparison.{suffix}", partial(_put, content))


@differentiates
def compare_methods(
    problem: Bilevel,
    methods: Mapping[str, Method] | None = None,
    *,
    solver: Solver | None = None,
    repeats: int = 3,
) -> Comparison:
    """Run every method on one problem.

    Args:
        problem: with both levels; see `Bilevel`. Its own ``hypergradient`` is the reference where it has one, else an
            accurate solve.
        methods: from a name to a hypergradient method, or to a pair of inner solver and method; None: all that suit
            the problem.
        solver: the inner solver of those that do not bring their own; None: an accurate one.
        repeats: runs for the median time; memory is measured in one more.

    A weight decay, bounds or a prox of a solver are a part of the inner problem, so that methods with such a solver are
    compared with the solution of that problem. Where the accurate solve fails, a `SolveWarning` and the name of the
    reference say so.
    """
    solver = accurate_solver(problem) if solver is None else solver
    if methods is None:
        suited = methods_for(as_solved(problem, solver)[0])
        methods = {method.name: (method.solver or solver, method.hypergrad) for method in suited}
    truth, name = _reference(problem)
    rows = []
    for label, method in methods.items():
        given, hypergrad = method if isinstance(method, tuple) else (solver, method)
        lowered, plain = as_solved(problem, given)
        own = truth if lowered is problem else _reference(lowered)[0]
        rows.append(_measure(lowered, label, plain, hypergrad, own, repeats))
    where = leaves(problem.init)[0].device
    machine = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return Comparison(rows, name, f"{machine}, torch {torch.__version__}")


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _reference(problem: Bilevel) -> tuple[list[Tensor], str]:
    if hasattr(problem, "hypergradient"):
        return leaves(problem.hypergradient(tree_map(torch.detach, problem.hparams))), "the closed form"
    small = sum(leaf.numel() for leaf in leaves(problem.init)) <= LARGEST_DENSE
    symmetric = problem.kind == "argmin"
    linear: LinearSolver = LU() if small else MINRES(rtol=1e-12) if symmetric else GMRES(rtol=1e-12)
    grads, fit = _gradient(problem, accurate_solver(problem), Implicit(linear))
    name, worst = "an accurate solve of both systems", _worst(fit)
    if not worst.ok:
        name += f", which ended {worst} ({worst.help}): the errors may be its own"
        tell(f"The methods are compared with {name}.", SolveWarning, kind=("reference", worst))
    return grads, name


def _worst(fit: Solution) -> Result:
    return fit.result if fit.adjoint is None else max(fit.result, fit.adjoint.result)


def _gradient(problem: Bilevel, solver: Solver | None, hypergrad: AnyHypergrad | None) -> tuple[list[Tensor], Solution]:
    x = leaf_copies(problem.hparams)
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw="ignore")
    grads = torch.autograd.grad(problem.outer(fit.value, x), leaves(x), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves(x), strict=True)], fit


def _measure(
    problem: Bilevel,
    name: str,
    solver: Solver | None,
    hypergrad: AnyHypergrad | None,
    truth: list[Tensor],
    repeats: int,
) -> Row:
    counted = _Counted(problem.problem if isinstance(problem, CompositeProblem) else problem)
    counter: _CountingSolver | None = None
    if isinstance(hypergrad, Implicit):
        symmetric = problem.kind in ("argmin", "composite")
        counter = _CountingSolver(hypergrad.linear_solver or (CG() if symmetric else GMRES()))
        hypergrad = replace(hypergrad, linear_solver=counter)
    try:
        counting = replace(problem, problem=counted) if isinstance(problem, CompositeProblem) else counted
        grads, fit = _gradient(counting, solver, hypergrad)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as refusal:
        return Row(
            name, math.nan, None, counted.calls, math.nan, math.nan, "", f"{type(refusal).__name__}: {refusal}"[:90]
        )
    evaluations, products = counted.calls, counter.products if counter else None
    size = float(torch.cat([t.reshape(-1) for t in truth]).double().norm())
    error = float(distance(grads, truth)) / size if size else float(distance(grads, truth))
    run = partial(_gradient, problem, solver, hypergrad)
    return Row(name, error, products, evaluations, median_seconds(run, repeats), peak_mib(run), _worst(fit).name)


class _Counted:
    """The problem, counting calls of its inner function."""

    def __init__(self, problem: Bilevel):
        self.problem, self.calls = problem, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.problem, name)

    def inner(self, params: Tree, hparams: Tree) -> Tree:
        self.calls += 1
        return self.problem.inner(params, hparams)


class _CountingSolver:
    """A linear solver, counting products."""

    def __init__(self, solver: LinearSolver):
        self.solver, self.products = solver, 0

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution:
        counting = _CountingOperator(operator)
        found = self.solver.solve(counting, b, state)
        self.products += counting.products
        return found


class _CountingOperator(Operator):
    def __init__(self, operator: Operator):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator, self.products = operator, 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.operator.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.operator.rmatvec(v)
