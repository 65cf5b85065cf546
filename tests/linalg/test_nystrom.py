"""Low-rank sketches as an approximate inverse and as a preconditioner, against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.cg import CG
from bilevel.linalg.minres import MINRES
from bilevel.linalg.noise import normal, uniform
from bilevel.linalg.nystrom import Nystrom, NystromPreconditioner, sketch
from bilevel.linalg.operator import Dense
from bilevel.linalg.solve import LinearState
from bilevel.solution import Result
from tests.conformance import randn, relative_error, spd
from tests.linalg.operators import Counted

SADDLE = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
KINDS = ["gaussian", "columns"]


def low_rank(size=40, rank=5):
    """Rank ``rank`` exactly, eigenvalues 1 ... rank."""
    basis = torch.linalg.qr(randn(size, rank))[0]
    return basis @ torch.diag(torch.arange(1.0, rank + 1, dtype=torch.float64)) @ basis.mT


def few_large(size=100):
    """Fifteen eigenvalues from 10 to 1e4, the others in [1, 2]."""
    large = torch.logspace(4, 1, 15, dtype=torch.float64)
    rest = torch.linspace(1, 2, size - 15, dtype=torch.float64)
    basis = torch.linalg.qr(randn(size, size))[0]
    return basis @ torch.diag(torch.cat([large, rest])) @ basis.mT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-12])
def test_rank_n_is_exact(kind, damping):
    """FACTS 18: rank n solves (A + damping I) x = b to 1e-8."""
    matrix, b = spd(12, batch=(3,)), randn(3, 12)
    truth = torch.linalg.solve(matrix + damping * torch.eye(12, dtype=torch.float64), b)
    found = Nystrom(rank=12, damping=damping, sketch=kind).solve(Dense(matrix), b)
    assert found.result is Result.STEPS_DONE
    assert relative_error(found.value, truth) <= 1e-8
    residual = (b - (matrix @ found.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)
    torch.testing.assert_close(found.stats["residual_norm"], residual, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_rank_k_needs_k_products(kind):
    matrix, b = low_rank(rank=5), randn(40)
    truth = torch.linalg.solve(matrix + 0.1 * torch.eye(40, dtype=torch.float64), b)
    counted = Counted(matrix)
    found = Nystrom(rank=5, damping=0.1, sketch=kind).solve(counted, b)
    assert counted.products == 6  # five, and the true residual
    assert found.stats["num_steps"] == 5
    assert relative_error(found.value, truth) <= 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_the_paper_s_formula(kind):
    """Woodbury's formula as Hataya and Yamada (2023) write it, from the same sketch."""
    matrix, b, damping = spd(15, 1e2), randn(15), 0.05
    host = torch.device("cpu")
    if kind == "columns":
        probes = torch.eye(15, dtype=torch.float64)[:, uniform((15,), 0, host).argsort()[:6]]
    else:
        probes = torch.linalg.qr(normal((15, 6), 0, host))[0]
    y = matrix @ probes
    core = probes.mT @ y + y.mT @ y / damping
    expected = b / damping - y @ torch.linalg.solve(core, y.mT @ b) / damping**2
    found = Nystrom(rank=6, damping=damping, sketch=kind).solve(Dense(matrix), b)
    assert relative_error(found.value, expected) <= 1e-10


def test_sketch_never_exceeds_the_matrix():
    """Nystrom approximations lie below A in the semi-definite order."""
    matrix = spd(20, 1e3)
    basis, eigenvalues, usable = sketch(Dense(matrix), 8, 0, "gaussian")
    assert usable
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    gap = matrix - basis @ torch.diag(eigenvalues) @ basis.mT
    assert torch.linalg.eigvalsh(gap).min() >= -1e-12


def test_the_sketch_is_reused_from_the_state():
    matrix, b = spd(12), randn(12)
    counted = Counted(matrix)
    first = Nystrom(rank=4).solve(counted, b)
    again = Nystrom(rank=4).solve(counted, b, first.state)
    assert counted.products == 4 + 1 + 1
    assert torch.equal(again.value, first.value)
    foreign = Nystrom(rank=4).solve(counted, b, LinearState(precondition=lambda r: 0 * r))
    assert torch.equal(foreign.value, first.value)


def test_zero_nonfinite_and_indefinite_problems():
    matrices, b = torch.stack([spd(3), SADDLE, spd(3), spd(3)]), randn(4, 3)
    b[2], b[3, 0] = 0, torch.nan
    found = Nystrom(rank=3).solve(Dense(matrices), b)
    expected = [Result.STEPS_DONE, Result.NEGATIVE_CURVATURE, Result.CONVERGED, Result.NONFINITE]
    assert found.stats["result"].tolist() == [int(result) for result in expected]
    assert not found.value[1:3].any()
    alone = Nystrom(rank=3).solve(Dense(matrices[0]), b[0])
    assert relative_error(found.value[0], alone.value) <= 1e-12


def test_nan_products_are_nonfinite():
    broken = torch.full((2, 3, 3), torch.nan, dtype=torch.float64)
    broken[0] = spd(3)
    found = Nystrom(rank=2).solve(Dense(broken), randn(2, 3))
    assert found.stats["result"].tolist() == [int(Result.STEPS_DONE), int(Result.NONFINITE)]


def test_tiny_right_hand_sides_do_not_underflow():
    matrix, b = spd(6), randn(6)
    truth = torch.linalg.solve(matrix + 0.1 * torch.eye(6, dtype=torch.float64), b)
    found = Nystrom(rank=6, damping=0.1).solve(Dense(matrix.float()), (1e-25 * b).float())
    assert relative_error(found.value.double() * 1e25, truth) <= 1e-4


@pytest.mark.parametrize("solver", [CG, MINRES])
@pytest.mark.parametrize("kind", KINDS)
def test_preconditioner_halves_the_steps_and_not_the_answer(solver, kind):
    """FACTS 17."""
    matrix, b = few_large(), randn(100)
    truth = torch.linalg.solve(matrix, b)
    plain = solver(rtol=1e-10).solve(Dense(matrix), b)
    helped = solver(rtol=1e-10, preconditioner=NystromPreconditioner(25, sketch=kind)).solve(Dense(matrix), b)
    assert helped.result is Result.CONVERGED
    assert relative_error(helped.value, truth) <= 1e-8
    assert helped.stats["num_steps"] <= 0.5 * plain.stats["num_steps"]


def test_preconditioner_of_full_rank_is_the_inverse():
    matrix, b = spd(10, 1e3), randn(10)
    found = CG(rtol=1e-8, preconditioner=NystromPreconditioner(10)).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    assert found.stats["num_steps"] <= 2


def test_preconditioner_steps_aside_where_the_matrix_is_indefinite():
    r = randn(3)
    assert torch.equal(NystromPreconditioner(2)(Dense(SADDLE))(r), r)
    found = MINRES(rtol=1e-10, preconditioner=NystromPreconditioner(2)).solve(Dense(SADDLE), r)
    assert relative_error(found.value, torch.linalg.solve(SADDLE, r)) <= 1e-8


def test_nonsymmetric_matrices_are_refused():
    with pytest.raises(ValueError, match="Nystrom needs a symmetric matrix"):
        Nystrom().solve(Dense(randn(3, 3), symmetric=False), randn(3))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"damping": 0.0}, {"sketch": "rows"}])
def test_bad_settings_name_the_argument(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        Nystrom(**settings)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"damping": -1.0}, {"sketch": "rows"}])
def test_bad_settings_of_the_preconditioner_name_the_argument(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        NystromPreconditioner(**settings)


@pytest.mark.parametrize("size", [1e200, 1e300])
def test_curvature_whose_square_overflows_is_a_result_and_no_crash(size):
    matrix = size * torch.diag(torch.arange(1.0, 4.0, dtype=torch.float64))
    assert not Nystrom(3, 1e-12).solve(Dense(matrix, symmetric=True), torch.ones(3).double()).result.ok


def test_sketches_are_compared_by_identity():
    """A `LinearState` that holds one may be compared without a look at its tensors."""
    one, other = (NystromPreconditioner(rank=3, damping=0.1)(Dense(spd(6))) for _ in range(2))
    assert one == one
    assert one != other


def test_a_sketch_of_another_matrix_is_made_anew():
    """The residual tells; that of the same matrix, moved a little, is kept."""
    solver, b = Nystrom(rank=12, damping=1e-3), randn(12)
    first = solver.solve(Dense(spd(12)), b)
    for matrix, products in ((spd(12) + 1e-9 * torch.eye(12), 1), (spd(12, seed=5), 1 + 12 + 1)):
        counted = Counted(matrix.double())
        found = solver.solve(counted, b, first.state)
        assert counted.products == products
        truth = torch.linalg.solve(matrix.double() + 1e-3 * torch.eye(12, dtype=torch.float64), b)
        assert relative_error(found.value, truth) <= 1e-5
