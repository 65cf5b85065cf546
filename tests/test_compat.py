"""The names of JAXopt, with the semantics of JAXopt; and what goes wrong in TorchOpt goes right here."""

from __future__ import annotations

import functools

import pytest
import torch

import bilevel as bl
from bilevel import compat
from tests.conformance import randn, relative_error

A, B = randn(20, 5, seed=1), randn(20, seed=2)


def ridge_objective(params, l2reg, data):
    features, targets = data
    return (features @ params - targets).square().mean() / 2 + l2reg * params.square().sum() / 2


def ridge_solver(init_params, l2reg, data):
    features, targets = data
    m, d = features.shape
    return torch.linalg.solve(
        features.mT @ features / m + l2reg * torch.eye(d, dtype=features.dtype), features.mT @ targets / m
    )


optimality = torch.func.grad(ridge_objective)
INIT = torch.zeros(5, dtype=torch.float64)


def exact(l2reg):
    return torch.func.jacrev(lambda l2reg: ridge_solver(None, l2reg, (A, B)))(torch.tensor(l2reg, dtype=torch.float64))


SOLVES = [
    None,
    bl.CG(rtol=1e-12),
    functools.partial(compat.solve_cg, tol=1e-12),
    functools.partial(compat.solve_normal_cg, tol=1e-12),
    functools.partial(compat.solve_gmres, tol=1e-12),
    functools.partial(compat.solve_bicgstab, tol=1e-12),
    compat.solve_lu,
    compat.solve_cholesky,
]


@pytest.mark.parametrize("solve", SOLVES)
def test_custom_root_as_in_jaxopts_documentation(solve):
    solve = compat_symmetric(solve)
    solver = bl.custom_root(optimality, solve=solve)(ridge_solver)
    jacobian = torch.func.jacrev(lambda l2reg: solver(INIT, l2reg, (A, B)))(torch.tensor(0.3, dtype=torch.float64))
    assert relative_error(jacobian, exact(0.3)) <= 1e-7
    l2reg = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(solver(INIT, l2reg, data=(A, B)).sum(), l2reg)
    assert grad.item() == pytest.approx(exact(0.3).sum().item(), rel=1e-7)


def compat_symmetric(solve):
    """A residual that is a gradient is symmetric, but only its author knows: CG is told through `solve_cg`."""
    return None if isinstance(solve, bl.CG) else solve


def test_linear_solvers_for_symmetric_matrices_refuse_a_general_root():
    solver = bl.custom_root(optimality, solve=bl.CG())(ridge_solver)
    l2reg = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="CG needs a symmetric matrix"):
        solver(INIT, l2reg, (A, B)).sum().backward()


def test_aux_and_vmap():
    @bl.custom_root(optimality, has_aux=True)
    def solver(init_params, l2reg, data):
        return ridge_solver(init_params, l2reg, data), {"steps": 7}

    value, aux = solver(INIT, torch.tensor(0.3, dtype=torch.float64), (A, B))
    assert aux == {"steps": 7}
    penalties = torch.tensor([0.1, 0.3], dtype=torch.float64)
    many = torch.vmap(torch.func.jacrev(lambda p: solver(INIT, p, (A, B))[0]))(penalties)
    assert relative_error(many, torch.stack([exact(0.1), exact(0.3)])) <= 1e-7
    assert relative_error(value, ridge_solver(None, 0.3, (A, B))) <= 1e-12


def test_captured_hyperparameters_get_their_gradient():
    """TorchOpt: None."""
    l2reg = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    solver = bl.custom_root(lambda w: torch.func.grad(ridge_objective)(w, l2reg, (A, B)))(
        lambda init: ridge_solver(init, l2reg, (A, B))
    )
    (grad,) = torch.autograd.grad(solver(INIT).sum(), l2reg)
    assert grad.item() == pytest.approx(exact(0.3).sum().item(), rel=1e-7)


def test_second_derivative():
    """TorchOpt: 0.0227 for 0.1173."""

    @bl.custom_root(lambda w, h: w**3 + h * w - 1)
    def solver(init, h):
        w = init.clone()
        for _ in range(60):
            w = w - (w**3 + h * w - 1) / (3 * w**2 + h)
        return w

    h = torch.tensor(1.0, dtype=torch.float64)
    second = torch.func.hessian(lambda h: solver(torch.ones((), dtype=torch.float64), h))(h)
    w = solver(torch.ones((), dtype=torch.float64), h)
    slope = -w / (3 * w**2 + 1)
    assert second.item() == pytest.approx((-slope * (6 * w * slope + 2) / (3 * w**2 + 1)).item(), rel=1e-8)


def test_custom_fixed_point():
    weight = 0.2 * randn(4, 4, seed=3)

    @bl.custom_fixed_point(lambda z, x: torch.tanh(weight @ z + x))
    def solver(init, x):
        z = init
        for _ in range(200):
            z = torch.tanh(weight @ z + x)
        return z

    x = randn(4, seed=4).requires_grad_()
    start = torch.zeros(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: solver(start, x), (x,), rtol=1e-6, atol=1e-8)


def test_a_solver_that_did_not_solve_is_heard():
    solver = bl.custom_root(optimality, tol=1e-8)(lambda init, l2reg, data: init)
    with pytest.warns(bl.SolveWarning, match="solve of the system"):
        solver(INIT, torch.tensor(0.3, dtype=torch.float64), (A, B))
    unchecked = bl.custom_root(optimality)(lambda init, l2reg, data: init)
    assert torch.equal(unchecked(INIT, torch.tensor(0.3, dtype=torch.float64), (A, B)), INIT)


def test_a_linear_solve_that_fails_is_heard():
    solver = bl.custom_root(optimality, solve=lambda matvec, b: torch.zeros_like(b))(ridge_solver)
    l2reg = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(bl.SolveWarning, match="adjoint solve"):
        solver(INIT, l2reg, (A, B)).sum().backward()


@pytest.mark.parametrize("solve", [compat.solve_cg, compat.solve_normal_cg, compat.solve_gmres, compat.solve_bicgstab])
def test_solve_functions_take_trees_and_jaxopts_keywords(solve):
    matrix = A.mT @ A / 20
    truth = torch.linalg.solve(matrix + 0.5 * torch.eye(5, dtype=torch.float64), B[:5])

    def matvec(tree):
        product = matrix @ torch.cat([tree["a"], tree["b"]])
        return {"a": product[:2], "b": product[2:]}

    b = {"a": B[:2], "b": B[2:5]}
    found = solve(matvec, b, ridge=0.5, init=b, tol=1e-10, maxiter=500)
    assert relative_error(torch.cat([found["a"], found["b"]]), truth) <= 1e-8
