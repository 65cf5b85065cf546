"""The Jacobian of a system by its graph, against the matrix."""

from __future__ import annotations

import torch

from bilevel.linalg.jacobian import GraphJacobian
from bilevel.problem import RootProblem
from tests.conformance import check_operator, randn


def jacobian(residual, init, **settings):
    problem = RootProblem(residual, init, (), **settings)
    return GraphJacobian(problem.raveler, problem.linearize(problem.y))


def test_it_is_not_taken_for_symmetric():
    matrix = randn(5, 5)
    check_operator(jacobian(lambda y: matrix @ y, torch.zeros(5, dtype=torch.float64)), matrix)


def test_one_jacobian_for_each_problem_and_over_several_leaves():
    a, b = randn(2, 3, 3, seed=1), randn(2, 3, 4, seed=2)

    def residual(y):
        above = (a @ y["u"].unsqueeze(-1) + b @ y["v"].unsqueeze(-1)).squeeze(-1)
        return {"u": above, "v": y["v"].sin()}

    init = {"u": randn(2, 3, seed=3), "v": randn(2, 4, seed=4)}
    lower = torch.cat([torch.zeros(2, 4, 3, dtype=torch.float64), init["v"].cos().diag_embed()], -1)
    check_operator(jacobian(residual, init, batch_dims=1), torch.cat([torch.cat([a, b], -1), lower], -2))


def test_a_residual_without_the_unknowns_has_the_jacobian_zero():
    constant = randn(4)
    operator = jacobian(lambda y: constant, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(operator.to_dense(), torch.zeros(4, 4, dtype=torch.float64))
    assert torch.equal(operator.T.to_dense(), torch.zeros(4, 4, dtype=torch.float64))
