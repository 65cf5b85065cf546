"""CG on one small system in Python's numbers: the same solve as that of a batch of one."""

import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Dense
from bilevel.linalg.solve import LinearState

GENERATOR = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=GENERATOR))[0]
B = torch.randn(12, dtype=torch.float64, generator=GENERATOR)
SPECTRA = {
    "definite": torch.logspace(0, 3, 12, dtype=torch.float64),
    "indefinite": torch.linspace(-1, 5, 12, dtype=torch.float64),
    "singular": torch.linspace(0, 5, 12, dtype=torch.float64),
    "zero": torch.zeros(12, dtype=torch.float64),
    "hard": torch.logspace(0, 12, 12, dtype=torch.float64),
    "NaN": torch.full((12,), torch.nan, dtype=torch.float64),
}
SOLVERS = [
    bl.CG(),
    bl.CG(max_steps=4),
    bl.CG(rtol=1e-3),
    bl.CG(rtol=1e-12, max_steps=5),
    bl.CG(atol=1e9),
    bl.CG(preconditioner=lambda operator: lambda r: r / 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("solver", SOLVERS, ids=range(len(SOLVERS)))
def test_the_answer_is_that_of_a_batch_of_one(solver, name, dtype):
    matrix, b = (BASIS * SPECTRA[name] @ BASIS.T).to(dtype), B.to(dtype)
    with torch.no_grad():
        one = solver.solve(Dense((matrix + matrix.T) / 2), b)
        batch = solver.solve(Dense((matrix + matrix.T)[None] / 2), b[None])
    assert one.stats.keys() == batch.stats.keys()
    assert all(stat.dtype == batch.stats[name].dtype and stat.dim() == 0 for name, stat in one.stats.items())
    if name != "hard":  # rounding decides there
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        assert one.result is batch.result
        assert abs(one.stats["num_steps"] - batch.stats["num_steps"][0]) <= (0 if dtype == torch.float64 else 3)
        assert torch.allclose(one.value, batch.value[0], **close)
        for found, wanted in zip(one.curvature, batch.curvature, strict=True):
            assert torch.allclose(found, wanted, equal_nan=True, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("b", [torch.zeros(12, dtype=torch.float64), torch.full((12,), torch.inf, dtype=torch.float64)])
def test_right_hand_sides_that_are_not_solved(b):
    with torch.no_grad():
        one = bl.CG().solve(Dense(torch.eye(12, dtype=torch.float64)), b)
        batch = bl.CG().solve(Dense(torch.eye(12, dtype=torch.float64)[None]), b[None])
    assert one.result is batch.result
    assert torch.equal(one.value, batch.value[0])


def test_an_answer_that_is_known_takes_no_step():
    matrix = torch.diag(SPECTRA["definite"])
    with torch.no_grad():
        first = bl.CG().solve(Dense(matrix), B)
        again = bl.CG(rtol=1e-9).solve(Dense(matrix), B, LinearState(first.value))
    assert again.stats["num_steps"] == 0
    assert again.result is bl.Result.CONVERGED


def test_a_derivative_is_still_that_of_the_solution():
    matrix = torch.diag(SPECTRA["definite"]).requires_grad_()
    (found,) = torch.autograd.grad(bl.CG().solve(Dense(matrix), B).value.sum(), matrix)
    expected = -torch.outer(1 / SPECTRA["definite"], B / SPECTRA["definite"])
    assert torch.allclose(found, expected, rtol=1e-6)
