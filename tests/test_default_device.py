"""Tensors lie where the params do, or on the host: a default device, set by whoever calls, changes nothing.

The default is ``meta`` here, whose tensors have no numbers: one that was made on it by mistake ends every computation.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import bilevel as bl
from bilevel import diagnostics, testing
from bilevel.diagnostics.methods import accurate_solver, all_methods
from bilevel.problems import Quadratics, Ridge, collection, finite_sums
from tests.stochastic.cases import CASES, small_settings

PACKAGE = Path(bl.__file__).parent
FACTORIES = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "empty", "full", "eye", "arange", "linspace"),
    *("logspace", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "sparse_coo_tensor"),
}
F64 = torch.float64


@pytest.fixture
def nowhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def calls_without_device(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            keywords = {keyword.arg for keyword in node.keywords}
            if "device" not in keywords:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_every_tensor_that_is_made_has_its_device_named():
    """But for the estimators, which set the default for their own work (`sklearn.folds.on_cpu`)."""
    files = [path for path in PACKAGE.rglob("*.py") if "sklearn" not in path.parts]
    assert len(files) > 100
    assert [call for path in files for call in calls_without_device(path)] == []


def in_both(compute: Callable[[], object]) -> tuple[object, object]:
    there = compute()
    torch.set_default_device(None)
    return there, compute()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("quadratics", marks=pytest.mark.slow),
        "linear fixed point",
        "non-symmetric root",
        "quadratic program",
    ],
)
def test_every_method_ends_as_it_does_without(name, nowhere):
    def results() -> dict[str, str]:
        problem = Quadratics((2.0, 5.0), size=3) if name == "quadratics" else collection()[name]
        methods = {
            method.name: (method.solver or accurate_solver(problem), method.hypergrad)
            for method in all_methods(max_steps=20)
            if method.suits(problem)
        }
        return {row.method: row.result for row in diagnostics.compare_methods(problem, methods, repeats=1).rows}

    there, here = in_both(results)
    assert there
    assert there == here


@pytest.mark.parametrize("name", CASES)
def test_stochastic_methods(name, nowhere):
    def steps() -> torch.Tensor:
        problem = finite_sums.Quadratics(size=4, outer_size=3, num_samples=8)
        y, x = problem.start()
        method = CASES[name].method(y, x, problem.inner_loss, problem.outer_loss, **small_settings(name))
        for _ in range(3):
            method.step()
        other = copy.deepcopy(method.state_dict())
        method.load_state_dict(other)
        method.step()
        return torch.cat([y, x]).detach()

    assert torch.equal(*in_both(steps))


def test_diagnostics(nowhere):
    def said() -> str:
        problem = Quadratics((2.0, 5.0), size=3)
        check = diagnostics.check_hypergradient(problem, problem.hparams, throw="ignore")
        advice = diagnostics.advise(Ridge(), Ridge().hparams)
        return f"{check} {advice.hypergrad} {advice.solver}"

    there, here = in_both(said)
    assert there == here


def test_constraints_programs_and_residuals(nowhere):
    x = torch.tensor(0.7, dtype=F64, device="cpu", requires_grad=True)
    start = torch.ones(2, dtype=F64, device="cpu")
    solves = {
        "bounds": lambda: bl.argmin(
            lambda y: (y - x).square().sum(), start, solver=bl.ProximalGradient(bl.prox.Box(0.0, 0.5))
        ),
        "equalities": lambda: bl.constrained(
            lambda y: (y - x).square().sum(), lambda y: y.sum(0, keepdim=True) - 1, start
        ),
        "robust": lambda: bl.least_squares(lambda y: y - x, start, loss="huber"),
        "external": lambda: bl.argmin(
            lambda y: (y - x).square().sum(), start, solver=bl.External(lambda loss, y: torch.full_like(y, 0.7))
        ),
        "bisection": lambda: bl.root(lambda y: y**3 - x, start, solver=bl.Bisection(0.0, 2.0)),
        "powell": lambda: bl.argmin(lambda y: (y - x).square().sum(), start, solver=bl.ScipyMinimize("Powell")),
    }
    for name, solve in solves.items():
        x.grad = None
        fit = solve()
        value = fit.value.params if name == "equalities" else fit.value
        (value * torch.arange(1.0, 3.0, device="cpu")).sum().backward()
        assert value.device.type == x.grad.device.type == "cpu", name
        assert torch.isfinite(x.grad), name


@pytest.mark.parametrize(
    "suite",
    [
        type("Linear", (testing.LinearSolverTests,), {"make": lambda self: bl.MINRES(rtol=1e-10), "tolerance": 1e-6}),
        type("Prox", (testing.ProxTests,), {"make": lambda self: bl.prox.L1(0.3)}),
        type("Rule", (testing.RuleTests,), {"make": lambda self: bl.Adam(0.1)}),
        type("Hypergrad", (testing.HypergradTests,), {"make": lambda self: bl.Implicit()}),
    ],
    ids=lambda suite: suite.__name__,
)
def test_suites(suite, nowhere):
    testing.run(suite)
