"""Operators from and to SciPy and curvlinops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

import bilevel as bl
from bilevel.linalg.foreign import CurvlinopsOperator, ScipyOperator
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import InversePreconditioner
from tests.conformance import check_operator, nonsymmetric, randn, relative_error, spd


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix, scipy.sparse.linalg.aslinearoperator])
def test_scipy_operators_conform(form):
    for matrix, symmetric in ((spd(6), True), (nonsymmetric(6), False)):
        check_operator(ScipyOperator(form(matrix.numpy()), symmetric=symmetric), matrix)


def test_there_and_back_again():
    matrix = nonsymmetric(4, (3,))
    exported = Dense(matrix, symmetric=False).to_scipy()
    check_operator(ScipyOperator(exported, symmetric=False, batch_shape=(3,)), matrix)


def test_rectangles_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="has to be square"):
        ScipyOperator(np.ones((3, 2)), symmetric=False)
    with pytest.raises(ValueError, match="share its rows evenly"):
        ScipyOperator(np.eye(5), symmetric=True, batch_shape=(2,))


class Like:
    """What is used of an operator of curvlinops."""

    def __init__(self, matrix, symmetric):
        self.matrix, self.SELF_ADJOINT = matrix, symmetric
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def __matmul__(self, v):
        return self.matrix @ v

    def adjoint(self):
        return Like(self.matrix.mT, self.SELF_ADJOINT)


def test_operators_like_those_of_curvlinops_conform():
    check_operator(CurvlinopsOperator(Like(spd(6), True)), spd(6))
    check_operator(CurvlinopsOperator(Like(nonsymmetric(6), False)), nonsymmetric(6))
    with pytest.raises(ValueError, match="a square one"):
        CurvlinopsOperator(Like(torch.ones(3, 2), False))


def test_an_exact_inverse_is_one_step():
    matrix, b = spd(30, 1e6), randn(30)
    for inverse in (torch.linalg.inv(matrix), Dense(torch.linalg.inv(matrix)), Like(torch.linalg.inv(matrix), True)):
        found = bl.CG(rtol=1e-6, preconditioner=InversePreconditioner(inverse)).solve(Dense(matrix), b)
        assert int(found.stats["num_steps"]) <= 3
        assert relative_error(found.value, torch.linalg.solve(matrix, b)) <= 1e-4
    many = torch.stack([b, 2 * b, randn(30, seed=9)])
    both = Dense(matrix.expand(3, 30, 30))
    for inverse in (torch.linalg.inv(matrix), Dense(torch.linalg.inv(matrix)), Dense(torch.linalg.inv(both.matrix))):
        found = bl.CG(rtol=1e-6, preconditioner=InversePreconditioner(inverse)).solve(both, many)
        assert int(found.stats["num_steps"].max()) <= 3  # one inverse for all right-hand sides
        assert relative_error(found.value, torch.linalg.solve(matrix, many.T).T) <= 1e-4
    with pytest.raises(ValueError, match="one of other parameters"):
        bl.CG(preconditioner=InversePreconditioner(torch.eye(4).double())).solve(Dense(matrix), b)


def test_without_curvlinops_the_export_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "curvlinops._torch_base", None)
    with pytest.raises(ImportError, match="pip install curvlinops-for-pytorch"):
        Dense(spd(3)).to_curvlinops()


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x = torch.randn(64, 5, dtype=torch.float64) * torch.logspace(-1.5, 1, 5, dtype=torch.float64)
    return net, x, torch.randn(64, 1, dtype=torch.float64)


def test_curvlinops_operators_are_what_they_say():
    curvlinops = pytest.importorskip("curvlinops")
    net, x, y = network()
    params = [p for p in net.parameters()]
    ggn = curvlinops.GGNLinearOperator(net, torch.nn.MSELoss(), params, [(x, y)])
    operator = CurvlinopsOperator(ggn)
    assert operator.symmetric
    dense = ggn @ torch.eye(operator.size, dtype=torch.float64)
    check_operator(operator, dense, 1e-9)
    matrix = nonsymmetric(6)
    exported = Dense(matrix, symmetric=False).to_curvlinops([(2, 2), (2,)])
    v = randn(6)
    assert relative_error(exported @ v, matrix @ v) <= 1e-12
    assert relative_error(exported.adjoint() @ v, matrix.mT @ v) <= 1e-12
    top, bottom = exported @ [v[:4].view(2, 2), v[4:]]
    assert relative_error(torch.cat([top.reshape(-1), bottom]), matrix @ v) <= 1e-12


def test_a_kfac_inverse_preconditions_cg():
    """KFAC of a linear model without bias is the Hessian of the fit, and with the penalty as damping that of all."""
    curvlinops = pytest.importorskip("curvlinops")
    net, x = torch.nn.Linear(20, 3, bias=False).double(), randn(64, 20) * torch.logspace(-1.5, 1, 20).double()
    y, params = randn(64, 3, seed=2), dict(net.named_parameters())
    decay = torch.tensor(1e-2, dtype=torch.float64, requires_grad=True)

    def inner(p):
        fit = torch.nn.functional.mse_loss(torch.func.functional_call(net, p, (x,)), y)
        return fit + decay / 2 * sum(v.square().sum() for v in p.values())

    kfac = curvlinops.KFACLinearOperator(
        net, torch.nn.MSELoss(), list(params.values()), [(x, y)], fisher_type=curvlinops.FisherType.TYPE2
    )
    inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=1e-2, use_exact_damping=True)
    steps, grads = [], []
    for preconditioner in (None, InversePreconditioner(inverse)):
        linear = bl.CG(rtol=1e-8, preconditioner=preconditioner)
        fit = bl.argmin(inner, params, solver=bl.NewtonCG(gtol=1e-9), hypergrad=bl.Implicit(linear))
        grads += torch.autograd.grad(sum(v.sum() for v in fit.value.values()), decay)
        steps.append(int(fit.adjoint.stats["num_steps"]))
    assert relative_error(grads[1], grads[0]) <= 1e-6
    assert steps[1] <= 2 < 10 < steps[0]
