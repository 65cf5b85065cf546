from __future__ import annotations

import json

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, compare_methods, methods_for
from bilevel.problems import Ridge


def test_every_row_is_measured(tmp_path):
    problem = Ridge(per_feature=True)
    names = ("implicit, CG", "implicit, 2 CG steps", "implicit, LU", "implicit, identity (T1-T2)", "penalty, symmetric")
    assert {m.name for m in methods_for(problem)} > set(names)
    chosen = {m.name: m.hypergrad for m in methods_for(problem) if m.name in names}
    comparison = compare_methods(problem, chosen, repeats=1)
    rows = {row.method: row for row in comparison.rows}
    assert rows["implicit, CG"].error < 1e-7 < rows["implicit, 2 CG steps"].error
    assert rows["implicit, LU"].error < 1e-10
    assert rows["implicit, LU"].products == 10
    assert rows["implicit, 2 CG steps"].products == 2
    assert rows["implicit, identity (T1-T2)"].products == 0
    assert all(row.evaluations > 0 and row.seconds > 0 and row.peak_mib > 0 for row in comparison.rows)
    comparison.save(tmp_path)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| implicit, 2 CG steps |" in (tmp_path / "comparison.md").read_text()
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["method"] for row in saved["rows"]] == [row.method for row in comparison.rows]


def test_a_method_that_refuses_is_told_not_hidden(tmp_path):
    problem = Ridge()
    comparison = compare_methods(problem, {"Unroll": (bl.LBFGS(), bl.Unroll()), "CG": bl.Implicit()}, repeats=1)
    assert "TypeError" in comparison.rows[0].note
    assert "null" in comparison.to_json()
    assert comparison.rows[1].error < 1e-7
    comparison.save(tmp_path)


def test_memory_of_unrolling_grows_with_the_steps():
    problem = Ridge(400, 50, per_feature=True)
    methods = {
        f"{name} {steps}": (bl.GradientDescent(0.01, steps), method)
        for steps in (10, 100)
        for name, method in (("implicit", bl.Implicit(bl.CG(max_steps=3))), ("unrolled", bl.Unroll()))
    }
    peak = {row.method: row.peak_mib for row in compare_methods(problem, methods, repeats=1).rows}
    assert peak["implicit 100"] < 1.2 * peak["implicit 10"]
    assert peak["unrolled 100"] > 5 * peak["unrolled 10"]


def test_without_a_closed_form():
    problem = BilevelProblem(
        inner=lambda y, x: (y.exp() - y + x.exp() * y.square()).sum(),
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(4, dtype=torch.float64),
        hparams=torch.zeros(4, dtype=torch.float64),
    )
    comparison = compare_methods(problem, {"implicit, CG": bl.Implicit(bl.CG(rtol=1e-8))}, repeats=1)
    assert comparison.reference == "an accurate solve of both systems"
    assert {row.method: row for row in comparison.rows}["implicit, CG"].error < 1e-7


def test_a_reference_that_was_not_solved_is_told():
    """Of a loss without a minimum every method agrees with the accurate solve, and all of them are wrong."""
    problem = BilevelProblem(
        inner=lambda y, x: -(x * y).sum(),
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.full((3,), 0.3, dtype=torch.float64),
    )
    with pytest.warns(bl.SolveWarning, match="compared with an accurate solve of both systems, which ended"):
        comparison = compare_methods(problem, {"implicit, CG": bl.Implicit(bl.CG())}, repeats=1)
    assert "the errors may be its own" in str(comparison)


def test_a_decay_inside_of_the_solver_is_a_part_of_what_is_compared():
    """The reference of a method is the solution of the loss that its solver lowers."""
    ridge = Ridge(per_feature=True)
    problem = BilevelProblem(ridge.inner, ridge.outer, ridge.init, ridge.hparams)
    decayed, plain = (bl.Steps(bl.SGD(lr=0.2, weight_decay=decay), max_steps=500) for decay in (0.5, 0.0))
    exact = bl.Implicit(bl.Cholesky())
    methods = {"solver's": exact, "its own": (decayed, exact), "without": (plain, exact)}
    rows = compare_methods(problem, methods, solver=decayed, repeats=1).rows
    assert all(row.error < 1e-9 for row in rows), rows
