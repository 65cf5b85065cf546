"""What the iterative solvers share: warm starts, carried preconditioners, the meaning of a number of steps."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.linalg.bicgstab import BiCGSTAB
from bilevel.linalg.cg import CG
from bilevel.linalg.direct import LU, Cholesky
from bilevel.linalg.gmres import GMRES
from bilevel.linalg.identity import Identity
from bilevel.linalg.minres import MINRES
from bilevel.linalg.neumann import Neumann
from bilevel.linalg.normal import NormalCG
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import Jacobi
from bilevel.linalg.scipy import LSMR, ScipyBiCGSTAB, ScipyGMRES
from bilevel.linalg.solve import LinearState, chosen
from bilevel.solution import Result
from tests.conformance import nonsymmetric, randn, relative_error, spd
from tests.linalg.operators import Broken, Counted, Rowwise, indefinite

NATIVE = [CG, MINRES, NormalCG, Neumann, GMRES, BiCGSTAB]
ITERATIVE = [*NATIVE, ScipyGMRES, ScipyBiCGSTAB, LSMR]


def products_of(solver, matrix, b, state=None):
    counted = Counted(matrix)
    solved = solver.solve(counted, b, state)
    assert solved.result is Result.CONVERGED
    return counted.products, solved


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_warm_start_saves_products_and_gives_the_same_answer(solver):
    """An outer step moves the system a little: the last solution is a good guess of the next."""
    before, b = spd(30, 30.0, batch=(2,)), randn(2, 30)
    after = before + 1e-6 * torch.eye(30, dtype=torch.float64)
    truth = torch.linalg.solve(after, b.unsqueeze(-1)).squeeze(-1)
    settings = {"rtol": 1e-8, "max_steps": 2000}
    state = solver(**settings).solve(Dense(before), b).state
    cold, alone = products_of(solver(**settings), after, b)
    warm, found = products_of(solver(**settings), after, b, state)
    assert warm <= 0.82 * cold
    for solved in (alone, found):
        # Condition 30 times the residual.
        assert relative_error(solved.value, truth) <= 3.1e-7
    torch.testing.assert_close(
        found.stats["residual_norm"],
        (b - (after @ found.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1),
        rtol=1e-2,
        atol=1e-14,
    )


@pytest.mark.parametrize("solver", NATIVE)
def test_starting_from_the_solution_makes_no_step(solver):
    matrix, b = spd(10, 10.0), randn(10)
    found = solver(rtol=1e-8).solve(Dense(matrix), b, LinearState(torch.linalg.solve(matrix, b)))
    assert found.result is Result.CONVERGED
    assert found.stats["num_steps"] == 0


@pytest.mark.parametrize("solver", NATIVE)
def test_useless_guesses_are_ignored(solver):
    """Worse than zero, of another shape or dtype, not finite: as without a guess, to the last bit."""
    matrix, b = spd(10, 10.0, batch=(2,)), randn(2, 10)
    cold = solver(rtol=1e-8).solve(Dense(matrix), b)
    far = torch.full((2, 10), 1e6, dtype=torch.float64)
    for guess in (far, far[:, :5], far.float(), far * torch.nan):
        found = solver(rtol=1e-8).solve(Dense(matrix), b, LinearState(guess))
        assert torch.equal(found.value, cold.value)


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_the_preconditioner_of_the_state_is_not_built_again(solver):
    scales = torch.logspace(0, 2, 40, dtype=torch.float64).sqrt()
    matrix, b = scales.unsqueeze(-1) * spd(40, 4.0) * scales, randn(40)
    built = solver(rtol=1e-10, preconditioner=Jacobi(num_probes=30))
    first_products, first = products_of(built, matrix, b)
    again_products, again = products_of(built, matrix, b, LinearState(precondition=first.state.precondition))
    assert first_products - again_products == 30
    assert torch.equal(first.value, again.value)


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_a_preconditioner_of_other_problems_is_built_again(solver):
    few = solver(preconditioner=Jacobi(num_probes=3)).solve(Dense(spd(5)), randn(5))
    many = solver(preconditioner=Jacobi(num_probes=3)).solve(Dense(spd(8, batch=(2,))), randn(2, 8), few.state)
    assert many.result is Result.CONVERGED


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_a_preconditioner_that_does_harm_is_given_up(solver):
    """That of another matrix leaves the solve unfinished, and it is made again without."""
    scales, b = torch.logspace(0, 4, 30, dtype=torch.float64), randn(30)
    built = solver(rtol=1e-8, max_steps=30, preconditioner=Jacobi(num_probes=30))
    other = built.solve(Dense(scales.flip(0).diag()), b).state.precondition
    assert not solver(rtol=1e-8, max_steps=30).solve(Dense(scales.diag()), b, LinearState(precondition=other)).result.ok
    found = built.solve(Dense(scales.diag()), b, LinearState(precondition=other))
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, b / scales) <= 1e-3


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_number_of_steps_alone_is_an_order(solver):
    """With a tolerance the same number is a limit, and reaching it is a failure (FACTS 13)."""
    matrix, b = spd(30, 3.0), randn(30)
    ordered = solver(max_steps=1).solve(Dense(matrix), b)
    limited = solver(rtol=1e-10, max_steps=1).solve(Dense(matrix), b)
    assert ordered.result is Result.STEPS_DONE
    assert limited.result is Result.MAX_STEPS
    for solved in (ordered, limited):
        torch.testing.assert_close(solved.stats["residual_norm"], (b - matrix @ solved.value).norm())
        torch.testing.assert_close(
            solved.stats["relative_residual"], solved.stats["residual_norm"] / b.norm(), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("solver", ITERATIVE)
def test_an_absolute_tolerance_holds_in_each_problem(solver):
    matrix, b = spd(10, 10.0, batch=(2,)), randn(2, 10) * torch.tensor([[1.0], [1e-9]], dtype=torch.float64)
    found = solver(rtol=0.0, atol=1e-6).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    assert (found.stats["residual_norm"] <= 1.01e-6).all()
    if solver in NATIVE:
        assert found.stats["num_steps"][1] == 0


@pytest.mark.parametrize("solver", [CG(), MINRES(), Cholesky()], ids=repr)
def test_solvers_for_symmetric_matrices_refuse_others(solver):
    with pytest.raises(ValueError, match=rf"{type(solver).__name__} needs a symmetric matrix.*Take GMRES"):
        solver.solve(Dense(nonsymmetric(4), symmetric=False), randn(4))


@pytest.mark.parametrize("solver", [*(s() for s in ITERATIVE), Cholesky(), LU(), Identity()], ids=repr)
def test_the_state_holds_the_answer(solver):
    found = solver.solve(Dense(spd(5)), randn(5))
    assert torch.equal(found.state.x0, found.value)


@pytest.mark.parametrize("solver", NATIVE)
def test_the_same_solver_twice_gives_the_same_answer(solver):
    """Settings only: state is returned, not kept."""
    matrix, b, method = spd(10), randn(10), solver(rtol=1e-6)
    first = method.solve(Dense(matrix), b).value
    method.solve(Dense(spd(7)), randn(7))
    assert torch.equal(method.solve(Dense(matrix), b).value, first)


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize(
    ("bad", "result"), [(0.0, "CONVERGED"), (float("nan"), "NONFINITE"), (float("inf"), "NONFINITE")]
)
def test_nothing_to_solve_costs_no_product(solver, bad, result):
    """FACTS 9 and 12: zero gives exactly zero in no step; NaN and infinity are found before the first product."""
    counted = Counted(spd(6))
    b = torch.zeros(6, dtype=torch.float64)
    b[2] = bad
    settings = {"preconditioner": Jacobi()} if solver in (CG, MINRES) else {}
    found = solver(**settings).solve(counted, b)
    assert counted.products == 0
    assert found.result is Result[result]
    assert found.stats["num_steps"] == 0
    assert torch.equal(found.value, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_product_is_told(solver, bad):
    """FACTS 12; Neumann's own step size needs its power iterations first."""
    matrix = spd(6)
    matrix[1, 1] = bad
    settings = {"alpha": 0.5} if solver is Neumann else {}
    found = solver(**settings).solve(Dense(matrix), randn(6))
    assert found.result is Result.NONFINITE
    if solver in NATIVE:
        assert found.stats["num_steps"] <= 1


@pytest.mark.parametrize(("solver", "matrix_of"), [(CG, spd), (MINRES, indefinite)])
def test_batch_equals_alone_and_frozen_problems_do_not_move(solver, matrix_of):
    matrices = torch.stack([matrix_of(20, 10.0**k, seed=k) for k in range(4)])
    b = randn(4, 20)
    together = solver(rtol=1e-9).solve(Rowwise(matrices), b)
    assert len(set(together.stats["num_steps"].tolist())) == 4
    for task in range(4):
        alone = solver(rtol=1e-9).solve(Rowwise(matrices[[task]]), b[[task]])
        assert alone.stats["num_steps"] == together.stats["num_steps"][task]
        assert relative_error(together.value[task], alone.value[0]) <= 1e-12
        without_batch = solver(rtol=1e-9).solve(Rowwise(matrices[task]), b[task])  # CG adds in another order there
        assert without_batch.stats["num_steps"] == together.stats["num_steps"][task]
        assert relative_error(together.value[task], without_batch.value) <= 1e-9


@pytest.mark.parametrize(("solver", "matrix_of"), [(CG, spd), (MINRES, indefinite)])
def test_one_poisoned_problem_leaves_the_others_bit_identical(solver, matrix_of):
    matrices, b = torch.stack([matrix_of(20, 1e3, seed=k) for k in range(3)]), randn(3, 20)
    clean = solver(rtol=1e-9).solve(Dense(matrices), b)
    b[1, 3] = torch.nan
    poisoned = solver(rtol=1e-9).solve(Dense(matrices), b)
    assert poisoned.stats["result"].tolist() == [0, int(Result.NONFINITE), 0]
    assert torch.equal(poisoned.value[[0, 2]], clean.value[[0, 2]])


@pytest.mark.parametrize(("solver", "most"), [(CG, 1), (MINRES, 2)])
def test_nan_in_a_product_stops_at_once(solver, most):
    """After one step; MINRES looks at the true residual too."""
    broken = Broken(spd(4))
    solution = solver(max_steps=50).solve(broken, randn(4))
    assert solution.result is Result.NONFINITE
    assert solution.stats["num_steps"] == 1
    assert broken.products <= most


@pytest.mark.parametrize("solver", [CG, MINRES])
def test_preconditioner_halves_the_steps_and_not_the_answer(solver):
    scales = torch.logspace(0, 2, 40, dtype=torch.float64)
    matrix, b = scales.sqrt().unsqueeze(-1) * spd(40, 4.0) * scales.sqrt(), randn(40)
    plain = solver(rtol=1e-10).solve(Dense(matrix), b)
    helped = solver(rtol=1e-10, preconditioner=Jacobi(num_probes=40)).solve(Dense(matrix), b)
    assert helped.result is Result.CONVERGED
    assert relative_error(helped.value, torch.linalg.solve(matrix, b)) <= 1e-8
    assert helped.stats["num_steps"] <= 0.5 * plain.stats["num_steps"]


@pytest.mark.parametrize("mask", [[True, True], [False, False], [True, False]])
def test_a_choice_of_problems_is_that_of_a_mask(mask):
    """Where the mask is the same everywhere, one of the two as it is, and what is not finite does not get through."""
    new, old = torch.tensor([[1.0, torch.inf], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, torch.nan]])
    where = torch.tensor(mask)
    expected = torch.where(where.unsqueeze(-1), new, old)
    torch.testing.assert_close(chosen(where, new, old), expected, rtol=0, atol=0, equal_nan=True)
    many_new, many_old = (vectors.repeat(1, 4096) for vectors in (new, old))
    many = chosen(where, many_new, many_old)
    torch.testing.assert_close(many, expected.repeat(1, 4096), rtol=0, atol=0, equal_nan=True)
    if all(mask) or not any(mask):  # of few numbers a copy takes less time than a look
        assert many is (many_new if mask[0] else many_old)


def test_a_choice_can_be_recorded():
    """Then nothing is looked at: the mask of the replay may be another one."""
    new, old = torch.ones(2, 3), torch.zeros(2, 3)
    program = make_fx(chosen)(torch.tensor([True, True]), new, old)
    torch.testing.assert_close(program(torch.tensor([True, False]), new, old)[:, 0], torch.tensor([1.0, 0.0]))
