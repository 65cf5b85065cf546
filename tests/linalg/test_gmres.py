"""GMRES and BiCGSTAB on the device: what is particular to them beside what all linear solvers are held to."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.bicgstab import BiCGSTAB
from bilevel.linalg.gmres import GMRES
from bilevel.linalg.operator import Dense
from bilevel.linalg.scipy import ScipyBiCGSTAB, ScipyGMRES
from bilevel.solution import Result
from tests.conformance import nonsymmetric, randn, relative_error
from tests.linalg.operators import Counted, Rowwise

DEVICE = [GMRES, BiCGSTAB]


def general(size, batch=(), seed=0, spread=0.5):
    """Matrices ``I + spread N`` with eigenvalues in a disc around one."""
    noise = randn(*batch, size, size, seed=seed) / size**0.5
    return torch.eye(size, dtype=torch.float64) + spread * noise


@pytest.mark.parametrize(("ours", "scipy"), [(GMRES, ScipyGMRES), (BiCGSTAB, ScipyBiCGSTAB)])
def test_one_system_takes_the_steps_of_scipy(ours, scipy):
    matrix, b = general(40), randn(40)
    mine, theirs = (solver(rtol=1e-9).solve(Dense(matrix, symmetric=False), b) for solver in (ours, scipy))
    assert abs(int(mine.stats["num_steps"]) - int(theirs.stats["num_steps"])) <= 1
    truth = torch.linalg.solve(matrix, b)
    assert relative_error(mine.value, truth) <= 3 * max(relative_error(theirs.value, truth), 1e-10)


@pytest.mark.parametrize("solver", DEVICE)
def test_a_batch_is_what_its_problems_are_alone(solver):
    """Easy, hard, zero and not finite, each with its own steps, result and answer."""
    matrices = torch.stack([general(12, spread=0.01), general(12, spread=0.9), general(12), general(12)])
    b = randn(4, 12)
    b[2], b[3, 5] = 0.0, torch.nan
    together = solver(rtol=1e-9).solve(Rowwise(matrices, symmetric=False), b)
    for index in range(4):
        alone = solver(rtol=1e-9).solve(Rowwise(matrices[index], symmetric=False), b[index])
        for name in ("num_steps", "result"):
            assert together.stats[name][index] == alone.stats[name]
        if index < 3:
            torch.testing.assert_close(together.value[index], alone.value, rtol=1e-8, atol=1e-12)
    assert together.stats["result"].tolist() == [0, 0, 0, int(Result.NONFINITE)]
    steps = together.stats["num_steps"]
    assert steps[0] < steps[1]
    assert steps[2] == 0


@pytest.mark.parametrize("restart", [3, 7, 50])
def test_gmres_restarts_from_the_true_residual(restart):
    matrix, b = general(30, batch=(3,), spread=0.4), randn(3, 30)
    found = GMRES(rtol=1e-10, restart=restart).solve(Dense(matrix, symmetric=False), b)
    assert found.result is Result.CONVERGED
    residual = (b - (matrix @ found.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)
    assert (residual <= 1.01e-10 * b.norm(dim=-1)).all()
    torch.testing.assert_close(found.stats["residual_norm"], residual, rtol=1e-3, atol=1e-15)


def test_gmres_pays_one_product_a_step_and_one_a_cycle():
    counted, b = Counted(general(30), symmetric=False), randn(30)
    found = GMRES(rtol=1e-8).solve(counted, b)
    assert counted.products == int(found.stats["num_steps"]) + 1


@pytest.mark.parametrize("scale", [1e-25, 1e20])
@pytest.mark.parametrize("solver", DEVICE)
def test_scales_of_float32_do_not_matter(solver, scale):
    matrix, b = general(20).float(), (scale * randn(20)).float()
    found = solver().solve(Dense(matrix, symmetric=False), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value.double() / scale, torch.linalg.solve(matrix.double(), b.double() / scale)) <= 1e-4


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("solver", DEVICE)
def test_small_systems_end_exactly(solver, size):
    matrix, b = nonsymmetric(size), randn(size)
    found = solver(rtol=1e-12).solve(Dense(matrix, symmetric=False), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, torch.linalg.solve(matrix, b)) <= 1e-10


def test_gmres_solves_what_needs_all_directions():
    """A cyclic shift: the residual does not fall at all before the last step (Nachtigal, Reddy and Trefethen 1992)."""
    shift = torch.roll(torch.eye(12, dtype=torch.float64), 1, 0)
    b = torch.eye(12, dtype=torch.float64)[0]
    found = GMRES().solve(Dense(shift, symmetric=False), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, shift.mT @ b) <= 1e-12
    assert GMRES(restart=4).solve(Dense(shift, symmetric=False), b).result is Result.STAGNATED


def far_from_normal():
    """Matrices whose residual falls late and abruptly, by many orders in one step, or never far, by their names."""
    size = 40
    left, right = (torch.linalg.qr(randn(size, size, seed=seed)).Q for seed in (1, 2))
    eye = torch.eye(size, dtype=torch.float64)
    above = [torch.diag(eye[0].new_ones(size - k), k) for k in (1, 2, 3)]
    return {
        "condition 1e12": left @ torch.diag(torch.logspace(0, -12, size, dtype=torch.float64)) @ right,
        "Jordan": eye + 0.99 * above[0],
        "Grcar": eye + sum(above) - above[0].mT,
        "Hilbert": 1 / (torch.arange(size)[:, None] + torch.arange(size) + 1).double(),
        "a cyclic shift and noise": torch.roll(eye, 1, 0) + 1e-6 * randn(size, size),
    }


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", far_from_normal())
def test_gmres_is_as_accurate_as_that_of_scipy_where_it_is_hard(name, dtype, rtol):
    matrix = far_from_normal()[name]
    b = matrix @ randn(40)
    ours, theirs = (
        solver(rtol=rtol).solve(Dense(matrix.to(dtype), symmetric=False), b.to(dtype)) for solver in (GMRES, ScipyGMRES)
    )
    assert ours.result is Result.CONVERGED
    assert relative_error(matrix @ ours.value.double(), b) <= 1.01 * rtol
    assert int(ours.stats["num_steps"]) <= int(theirs.stats["num_steps"]) + 1


@pytest.mark.parametrize("solver", DEVICE)
def test_batches_of_two_dimensions(solver):
    matrix, b = general(9, batch=(2, 3)), randn(2, 3, 9)
    found = solver(rtol=1e-10).solve(Dense(matrix, symmetric=False), b)
    assert found.stats["num_steps"].shape == (2, 3)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("solver", DEVICE)
def test_singular_systems_tell(solver):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)) + torch.triu(randn(3, 3), 1)
    matrix[2] = 0
    consistent = matrix @ torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    assert not solver().solve(Dense(matrix, symmetric=False), torch.ones(3, dtype=torch.float64)).result.ok
    found = solver().solve(Dense(matrix, symmetric=False), consistent)
    assert found.result is not Result.CONVERGED or relative_error(matrix @ found.value, consistent) <= 1e-9


@pytest.mark.parametrize("solver", DEVICE)
def test_they_can_be_recorded(solver):
    """A fixed number of steps without a look at a value: traced on tensors without values, replayed on others."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def solve(matrix, b):
        return solver(rtol=1e-9, max_steps=20).solve(Dense(matrix, symmetric=False), b).value

    matrix, b = general(8, batch=(3,)), randn(3, 8)
    program = make_fx(solve, tracing_mode="fake")(matrix, b)
    other = general(8, batch=(3,), seed=4)
    torch.testing.assert_close(program(other, b), torch.linalg.solve(other, b.unsqueeze(-1)).squeeze(-1))
