"""Root solvers and fixed-point iterations: all conform; then what is particular to each."""

from __future__ import annotations

import math

import pytest
import torch

import bilevel as bl
from bilevel import Anderson, Newton, Picard, Result, ScipyRoot
from bilevel.problem import RootProblem
from tests.conformance import randn, relative_error


def contraction(rate=0.5, size=6, batch=(3,), seed=0):
    """``y - W y - b`` with ``||W|| = rate``, non-symmetric: the residual, the start and the exact solution."""
    weight = randn(*batch, size, size, seed=seed)
    weight = rate * weight / torch.linalg.matrix_norm(weight, 2)[..., None, None]
    bias = randn(*batch, size, seed=seed + 1)
    truth = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - weight, bias)
    return lambda y: y - (weight @ y.unsqueeze(-1)).squeeze(-1) - bias, torch.zeros_like(bias), truth


SOLVERS = [Newton(), Newton(linear_solver=bl.GMRES(rtol=1e-12)), Picard(), Picard(damping=0.7), Anderson()]
SOLVERS += [ScipyRoot(), ScipyRoot("lm"), ScipyRoot("krylov", tol=1e-8)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_conforms(solver):
    residual, start, truth = contraction()
    found = solver.find(RootProblem(residual, start, batch_dims=1))
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, truth) <= 1e-7
    assert found.stats["num_steps"].shape == (3,)
    again = solver.find(RootProblem(residual, start, batch_dims=1))
    assert torch.equal(found.value, again.value)
    assert eval(repr(solver), vars(bl)) == solver


@pytest.mark.parametrize(
    "solver", [Newton(max_steps=1), Picard(max_steps=3), Anderson(max_steps=2), ScipyRoot(max_steps=1)]
)
def test_stops_on_steps_and_says_so(solver):
    residual, start, _ = contraction(0.9)
    nonlinear = RootProblem(lambda y: residual(y) + 0.01 * y.pow(3), start, batch_dims=1)
    assert solver.find(nonlinear).result is Result.MAX_STEPS


def test_each_problem_is_solved_as_if_alone():
    residual, start, _ = contraction(0.8)
    for solver in (Newton(), Anderson(), Picard()):
        together = solver.find(RootProblem(residual, start, batch_dims=1))
        for task in range(3):

            def alone(y, task=task):
                return residual(y.expand(3, -1))[task]

            single = solver.find(RootProblem(alone, start[task]))
            assert relative_error(together.value[task], single.value) <= 1e-9
            assert together.stats["num_steps"][task] == single.stats["num_steps"]


def test_anderson_needs_fewer_steps_than_picard():
    residual, start, _ = contraction(0.95)
    problem = RootProblem(residual, start, batch_dims=1)
    fast, slow = Anderson().find(problem), Picard().find(problem)
    assert fast.stats["num_steps"].max() < slow.stats["num_steps"].max() / 2


def test_anderson_is_gmres_on_linear_maps():
    """With a full history it ends in n + 1 steps (Walker and Ni 2011)."""
    residual, start, _ = contraction(0.99, size=5, batch=())
    found = Anderson(history=5, tol=1e-8).find(RootProblem(residual, start))
    assert found.stats["num_steps"] <= 7


def test_divergence_is_seen():
    residual, start, _ = contraction(3.0)
    found = Picard().find(RootProblem(residual, start, batch_dims=1))
    assert found.result in (Result.DIVERGED, Result.NONFINITE)
    assert found.stats["num_steps"].max() < 200
    assert Newton().find(RootProblem(residual, start, batch_dims=1)).result is Result.CONVERGED


def test_newton_backtracks_and_gives_up_without_a_root():
    atan = Newton().find(RootProblem(torch.atan, torch.full((), 3.0, dtype=torch.float64)))
    assert atan.result is Result.CONVERGED  # the full step diverges from 3
    none = Newton().find(RootProblem(lambda y: y.square() + 1, torch.tensor(0.7, dtype=torch.float64)))
    assert not none.result.ok


def test_bad_input():
    start = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"residual returned \(2,\) for init \(3,\)"):
        bl.root(lambda y: y[:2], start)
    with pytest.raises(ValueError, match=r"map returned .*'a'"):
        bl.fixed_point(lambda y: {"a": y}, start)
    with pytest.raises(ValueError, match="batched=True"):
        bl.root(lambda y: y, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}, batched=True)
    with pytest.raises(ValueError, match="residual is NaN"):
        bl.root(lambda y: y / y, start)
    with pytest.raises(ValueError, match="throw is 'maybe'"):
        bl.root(lambda y: y, start, throw="maybe")
    for make, name in (
        (lambda: Newton(max_steps=0), "max_steps"),
        (lambda: Picard(damping=0.0), "damping"),
        (lambda: Anderson(history=-1), "history"),
        (lambda: Anderson(ridge=-1.0), "ridge"),
        (lambda: ScipyRoot(tol=-1.0), "tol"),
    ):
        with pytest.raises(ValueError, match=name):
            make()


def test_throw():
    residual, start, _ = contraction(0.9)
    with pytest.raises(bl.SolveError, match=r"solve of the system: the step limit"):
        bl.root(residual, start, batched=True, solver=Picard(max_steps=2), throw="raise")
    with pytest.warns(bl.SolveWarning, match="solve of the system"):
        bl.root(residual, start, batched=True, solver=Picard(max_steps=2))


def test_memory_does_not_grow_with_the_iterations():
    """An equilibrium layer keeps the graph of one evaluation, whatever the number of iterations."""
    weight = (0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))

    def saved(steps):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit = bl.fixed_point(
                lambda z: torch.tanh(z @ weight + x),
                torch.zeros(64, 32),
                solver=Picard(max_steps=steps, tol=0.0),
                throw="ignore",
            )
        assert fit.value.requires_grad
        return sum(sizes)

    assert saved(100) <= 1.5 * saved(10)


@pytest.mark.parametrize(
    "linear",
    [
        bl.GMRES(rtol=1e-12),
        bl.BiCGSTAB(rtol=1e-12),
        bl.LSMR(rtol=1e-12),
        bl.LU(),
        bl.Neumann(alpha=1.0, rtol=1e-12),
        bl.NormalCG(rtol=1e-12),
    ],
    ids=repr,
)
def test_adjoints_of_a_non_symmetric_fixed_point(linear):
    residual, start, _ = contraction(0.5)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def mapped(y):
        return scale * (y - residual(y)) + scale.square()

    fit = bl.fixed_point(
        mapped, start, batched=True, solver=Newton(tol=1e-13), hypergrad=bl.Implicit(linear), throw="ignore"
    )
    (grad,) = torch.autograd.grad(fit.value.square().sum(), scale)
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = scale.detach() + sign * step
        near = bl.fixed_point(
            lambda y, s=moved: s * (y - residual(y)) + s.square(),
            start,
            batched=True,
            solver=Newton(tol=1e-13),
            throw="ignore",
        )
        values.append(near.value.square().sum().item())
    assert grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-7)
    assert math.isfinite(float(fit.adjoint.stats["residual_norm"].max()))


@pytest.mark.parametrize("method", [bl.Unroll(), bl.Truncated(2), bl.ForwardMode()], ids=lambda m: type(m).__name__)
def test_methods_of_a_path_are_refused(method):
    x = torch.tensor(0.5, requires_grad=True)
    for solve in (bl.fixed_point, bl.root):
        with pytest.raises(NotImplementedError, match=f"{type(method).__name__} differentiates the path"):
            solve(lambda y: y / 2 + x, torch.zeros(()), hypergrad=method)


@pytest.mark.parametrize("start", [0.0, 1e-12])
def test_a_singular_jacobian_is_no_root(start):
    """Newton has no step there: ``y^2 + 1`` is far from zero."""
    with pytest.warns(bl.SolveWarning):
        fit = bl.root(lambda y: y**2 + 1, torch.tensor([start], dtype=torch.float64))
    assert fit.result is bl.Result.STAGNATED


@pytest.mark.parametrize("start", [3.0, 1e3])
def test_a_root_without_a_derivative_is_told(start):
    """Where two roots meet, dy/dx is infinite: Newton halves its distance there, whose rounding made it 1e8."""
    x = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    with pytest.warns(bl.SolveWarning, match="double root"):
        fit = bl.root(lambda y: (y - 1).square() - x, torch.tensor(start, dtype=torch.float64))
    assert fit.result is bl.Result.STAGNATED


def test_problems_of_a_batch_that_depend_on_each_other_are_told():
    matrix = torch.tensor([[1.3, 0.5, 0.1], [0.2, 1.3, 0.3], [0.4, 0.1, 1.3]]).double()
    with pytest.warns(bl.SolveWarning, match="depend on each other"):
        bl.root(lambda y: matrix @ y + y**3 - 1, torch.zeros(3).double(), batched=True)


def test_a_complex_residual_of_real_unknowns_is_refused():
    """PyTorch would drop the imaginary parts: ``i (y - 3)`` had the root 0."""
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"residual returned torch\.complex128 for unknowns of torch\.float64"):
        bl.root(lambda y: 1j * (y - 3), start)
    with pytest.raises(ValueError, match=r"map returned torch\.complex128"):
        bl.fixed_point(lambda y: 0.5 * torch.exp(1j * y), start)


@pytest.mark.parametrize("method", ["hybr", "df-sane"])
def test_scipys_limits_are_of_evaluations(method, recwarn):
    """`df-sane` knows of no ``maxiter``: it went on, and SciPy warned of an unknown option."""
    solver = ScipyRoot(method, max_steps=2)
    weights = torch.tensor([0.5, 0.9], dtype=torch.float64)
    fit = bl.root(
        lambda y: weights * torch.cos(y) - y, torch.zeros(2, dtype=torch.float64), solver=solver, throw="ignore"
    )
    assert fit.result is Result.MAX_STEPS
    assert int(fit.stats["num_steps"]) <= 4
    assert not recwarn.list
