"""Linear solves differentiated by themselves: by the adjoint system, towards b and what the operator captured."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Dense, Operator
from tests.conformance import randn, relative_error

SOLVERS = [
    bl.CG(),
    bl.MINRES(),
    bl.NormalCG(),
    bl.GMRES(),
    bl.BiCGSTAB(),
    bl.LSMR(rtol=1e-10),
    bl.Neumann(rtol=1e-10, max_steps=10**5),
    bl.LU(),
    bl.Cholesky(),
]
SYMMETRIC_ONLY = (bl.CG, bl.MINRES, bl.Cholesky, bl.Neumann)


def system(solver, batch=()):
    symmetric = isinstance(solver, SYMMETRIC_ONLY)
    noise = randn(*batch, 6, 6, seed=1)
    matrix = torch.eye(6, dtype=torch.float64) + (noise @ noise.mT if symmetric else 0.3 * noise)
    return matrix, randn(*batch, 6, seed=2), symmetric


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_first_derivatives(solver, batch):
    matrix, b, symmetric = system(solver, batch)
    t, b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), b.requires_grad_()
    moved = matrix + t.exp() * torch.eye(6, dtype=torch.float64)
    found = solver.solve(Dense(moved, symmetric=symmetric), b)
    truth = torch.linalg.solve(moved, b)
    assert found.value.requires_grad
    assert not any(stat.requires_grad for stat in found.stats.values()) or isinstance(solver, (bl.LU, bl.Cholesky))
    grads = torch.autograd.grad(found.value.sin().sum(), (b, t), retain_graph=True)
    expected = torch.autograd.grad(truth.sin().sum(), (b, t), retain_graph=True)
    again = torch.autograd.grad(found.value.sin().sum(), (b, t))
    for one, other, second in zip(grads, expected, again, strict=True):
        assert relative_error(one, other) <= 1e-7
        assert torch.equal(one, second)
    only_operator = solver.solve(Dense(matrix + t.exp() * torch.eye(6, dtype=t.dtype), symmetric=symmetric), b.detach())
    (grad,) = torch.autograd.grad(only_operator.value.sin().sum(), t)
    assert relative_error(grad, expected[1]) <= 1e-7


@pytest.mark.parametrize("solver", [bl.CG(), bl.GMRES()], ids=repr)
def test_what_it_cannot_give_is_refused(solver):
    matrix, b, symmetric = system(solver)
    operator = Dense(matrix, symmetric=symmetric)
    b.requires_grad_()
    value = solver.solve(operator, b).value
    with pytest.raises(NotImplementedError, match=r"second derivative.*bilevel\.root"):
        torch.autograd.grad(value.sum(), b, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"under torch\.func or in forward mode.*compat"):
        torch.func.grad(lambda b: solver.solve(operator, b).value.sum())(b.detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(b.detach(), torch.ones_like(b))
        with pytest.raises(NotImplementedError, match="forward mode"):
            solver.solve(operator, dual)


def test_an_operator_without_a_transposed_product_says_so():
    class Shifted(Operator):
        def matvec(self, v):
            return 2 * v + v.roll(1)

    b = randn(6, seed=0).requires_grad_()
    value = bl.GMRES().solve(Shifted((), 6, torch.float64, b.device, symmetric=False), b).value
    with pytest.raises(NotImplementedError, match="no transposed product"):
        value.sum().backward()


def test_an_adjoint_solve_that_fails_is_heard():
    matrix, b, _ = system(bl.GMRES())
    value = bl.GMRES(rtol=1e-10, max_steps=2).solve(Dense(matrix, symmetric=False), b.requires_grad_()).value
    with pytest.warns(bl.SolveWarning, match="adjoint solve of a linear solve"):
        value.sum().backward()


def test_without_grad_nothing_is_kept():
    matrix, b, _ = system(bl.GMRES())
    with torch.no_grad():
        assert not bl.GMRES().solve(Dense(matrix, symmetric=False), b.requires_grad_()).value.requires_grad
