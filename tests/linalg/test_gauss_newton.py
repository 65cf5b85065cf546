"""Gauss-Newton products against dense Jacobians and Hessians."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.linalg.gauss_newton import GaussNewton
from bilevel.linalg.jacobian import GraphJacobian
from bilevel.problem import Problem
from bilevel.tree import Raveler
from tests.conformance import check_operator, randn, relative_error

TASKS, EXAMPLES = 3, 7
DATA, LABELS = randn(TASKS, EXAMPLES, 4, seed=1), torch.arange(TASKS * EXAMPLES).reshape(TASKS, EXAMPLES) % 3


def one_task():
    return {"w": randn(4, 5, seed=4), "v": randn(5, 3, seed=5)}


def predict(params, x, y):
    return torch.tanh(x @ params["w"]) @ params["v"]


def mean_loss(outputs, x, y):
    return cross_entropy(outputs, y)


def penalty(params, x, y):
    return sum((0.1 * p.square() + 0.01 * p**4).sum() for p in params.values())


def objective(params, x, y):
    return mean_loss(predict(params, x, y), x, y) + penalty(params, x, y)


def dense_truth(params, x, y, with_rest=True):
    """``J^T H J + H_rest`` of one task, formed by `torch.func`."""
    raveler = Raveler(params)
    flat = raveler.ravel(list(params.values()))

    def unflatten(v):
        return raveler.unflatten(raveler.unravel(v))

    jacobian = torch.func.jacrev(lambda v: predict(unflatten(v), x, y).reshape(-1))(flat)
    outputs = predict(params, x, y)
    middle = torch.func.hessian(lambda z: mean_loss(z.view_as(outputs), x, y))(outputs.reshape(-1))
    product = jacobian.mT @ middle @ jacobian
    return product + torch.func.hessian(lambda v: penalty(unflatten(v), x, y))(flat) if with_rest else product


def batched():
    params = {name: torch.stack([leaf, 2 * leaf, -leaf]) for name, leaf in one_task().items()}
    problem = Problem(torch.vmap(objective), params, (DATA, LABELS))
    return problem, problem.linearize(problem.start.y), params


@pytest.mark.parametrize("with_rest", [True, False])
def test_one_problem_conforms_to_the_dense_matrix(with_rest):
    params, args = one_task(), (DATA[0], LABELS[0])
    problem = Problem(objective, params, args)
    operator = GaussNewton(predict, mean_loss, penalty if with_rest else None)(
        problem, problem.linearize(problem.start.y)
    )
    check_operator(operator, dense_truth(params, *args, with_rest))


def test_many_problems_conform_to_their_own_dense_matrices():
    problem, at, params = batched()
    operator = GaussNewton(torch.vmap(predict), torch.vmap(mean_loss), torch.vmap(penalty))(problem, at)
    truth = torch.stack([dense_truth({k: p[t] for k, p in params.items()}, DATA[t], LABELS[t]) for t in range(TASKS)])
    check_operator(operator, truth)


def test_it_is_semi_definite_where_the_hessian_is_not():
    problem, at, _ = batched()
    operator = GaussNewton(torch.vmap(predict), torch.vmap(mean_loss))(problem, at)
    assert torch.linalg.eigvalsh(operator.to_dense()).min() >= -1e-12
    assert torch.linalg.eigvalsh(GraphJacobian(problem.raveler, at, symmetric=True).to_dense()).min() < -1e-3


def test_it_is_the_hessian_of_a_model_that_is_linear_in_its_params():
    x, y = randn(9, 4), randn(9)

    def linear(params, x, y):
        return x @ params

    def squares(outputs, x, y):
        return (outputs - y).square().mean()

    problem = Problem(lambda p, x, y: squares(linear(p, x, y), x, y), randn(4), (x, y))
    at = problem.linearize(problem.start.y)
    assert relative_error(GaussNewton(linear, squares)(problem, at).to_dense(), 2 * x.mT @ x / 9) <= 1e-12


def test_linear_parts_have_no_curvature():
    problem = Problem(lambda p: p.square().sum(), randn(4))
    at = problem.linearize(problem.start.y)
    operator = GaussNewton(lambda p: 2 * p, lambda z: z.sum(), rest=lambda p: p.sum())(problem, at)
    assert not (operator @ randn(4)).any()


def test_a_hypergradient_through_it_is_exact_where_the_model_fits():
    """With residual zero at the solution the term that Gauss-Newton leaves out vanishes."""
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x = randn(12, 3)
    target = torch.tanh(x @ randn(3, seed=8))

    def outputs(params):
        return torch.tanh(x @ params)

    def loss(z):
        return (z - scale * target / 1.3).square().sum()

    def solve(operator):
        method = bl.Implicit(bl.CG(rtol=1e-12), operator=operator)
        fit = bl.argmin(
            lambda p: loss(outputs(p)), randn(3, seed=8), solver=bl.LBFGS(gtol=1e-12), hypergrad=method, throw="ignore"
        )
        return torch.autograd.grad(fit.value.sum(), scale)[0]

    assert relative_error(solve(GaussNewton(outputs, loss)), solve("graph")) <= 1e-9


def test_wrong_shapes_name_the_argument():
    problem, at, _ = batched()
    with pytest.raises(ValueError, match=r"outputs returned .* 3 problems"):
        GaussNewton(lambda p, x, y: p["w"].sum(0), torch.vmap(mean_loss))(problem, at)
    with pytest.raises(ValueError, match="loss returned"):
        GaussNewton(torch.vmap(predict), lambda z, x, y: z.sum())(problem, at)
    with pytest.raises(ValueError, match="outputs does not depend on the params"):
        GaussNewton(lambda p, x, y: x, torch.vmap(mean_loss))(problem, at)
