from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Damped, Dense, Operator
from tests.conformance import check_operator, nonsymmetric, randn, spd


@pytest.mark.parametrize("batch", [(), (3,)])
def test_dense_conforms(batch):
    matrix = spd(6, batch=batch)
    check_operator(Dense(matrix), matrix)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_damped_conforms(batch):
    matrix = spd(6, batch=batch)
    check_operator(Damped(Dense(matrix), 0.5), matrix + 0.5 * torch.eye(6, dtype=torch.float64))


def test_dense_refuses_rectangles():
    with pytest.raises(ValueError, match="square matrices"):
        Dense(torch.ones(3, 2))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_nonsymmetric_matrices_conform(batch):
    matrix = nonsymmetric(6, batch)
    check_operator(Dense(matrix, symmetric=False), matrix)
    check_operator(Dense(matrix, symmetric=False).T, matrix.mT)
    shifted = matrix + 0.5 * torch.eye(6, dtype=torch.float64)
    check_operator(Damped(Dense(matrix, symmetric=False), 0.5), shifted)
    check_operator(Damped(Dense(matrix, symmetric=False), 0.5).T, shifted.mT)


def test_a_symmetric_operator_is_its_own_transpose():
    operator = Dense(spd(4))
    assert operator.T is operator


def test_a_missing_transposed_product_says_what_to_do():
    class OneSided(Operator):
        def matvec(self, v):
            return v

    operator = OneSided((), 3, torch.float64, torch.device("cpu"), symmetric=False)
    with pytest.raises(NotImplementedError, match=r"OneSided .* Write rmatvec, or take GMRES"):
        operator.T @ randn(3)


def test_scipy_may_write_into_a_product_that_is_its_own_vector():
    """A product with the identity is the vector itself: GMRES, which normalises in place, then gave zero."""
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = bl.root(lambda y: y - 2 * x, torch.zeros(2, dtype=torch.float64), hypergrad=bl.Implicit(bl.GMRES()))
    assert torch.autograd.grad(found.value.sum(), x)[0].item() == pytest.approx(4.0)
