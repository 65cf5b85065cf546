"""Complex hyperparameters, params of mixed dtypes, and half precision."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from tests.conformance import randn, relative_error

F64, C128 = torch.float64, torch.complex128
C = torch.tensor([1 + 1j, 2 - 1j, 0.5j], dtype=C128)
X = torch.tensor(0.3, dtype=F64)
START = torch.zeros(3, dtype=F64)
EXACT, DESCENT = bl.NewtonCG(gtol=1e-12), bl.GradientDescent(0.05, 450)


def inner(p, c):
    return (p * c - (1 + 2j)).abs().square().sum() + X * p.square().sum()


def solution(c):
    return (c.conj() * (1 + 2j)).real / (c.abs() ** 2 + X)


def truth():
    c = C.clone().requires_grad_()
    return torch.autograd.grad(solution(c).pow(3).sum(), c)[0]


METHODS = {
    "implicit": (bl.Implicit(), EXACT, 1e-8),
    "func": (bl.Implicit(operator="func"), EXACT, 1e-8),
    "unroll": (bl.Unroll(), DESCENT, 1e-6),
    "checkpointed": (bl.Unroll(checkpoint=True), DESCENT, 1e-6),
    "truncated": (bl.Truncated(400), DESCENT, 1e-4),
    "forward": (bl.ForwardMode(), DESCENT, 1e-6),
    "penalty": (bl.Penalty(), EXACT, 1e-4),
    "evolution": (bl.EvolutionStrategies(num_samples=400, sigma=1e-3), bl.LBFGS(), 0.15),
}


@pytest.mark.parametrize(("hypergrad", "solver", "tolerance"), METHODS.values(), ids=METHODS)
def test_complex_hyperparameters(hypergrad, solver, tolerance):
    c = C.clone().requires_grad_()
    for objective, args in (
        (lambda p: inner(p, c), ()),
        (inner, (c,)),
        (lambda p, tree: inner(p, tree["c"][0]), ({"c": [c]},)),
    ):
        fit = bl.argmin(objective, START, *args, solver=solver, hypergrad=hypergrad)
        (grad,) = torch.autograd.grad(fit.value.pow(3).sum(), c)
        assert grad.dtype == C128
        assert relative_error(torch.view_as_real(grad), torch.view_as_real(truth())) < tolerance
        if isinstance(hypergrad, bl.EvolutionStrategies):
            break


@pytest.mark.parametrize("hypergrad", [bl.OneStep(0.1), bl.FiniteDifference(0.1)], ids=repr)
def test_complex_hyperparameters_of_one_step(hypergrad):
    c = C.clone().requires_grad_()
    y = solution(C).requires_grad_()
    (g,) = torch.autograd.grad(inner(y, c), y, create_graph=True)
    (expected,) = torch.autograd.grad(-0.1 * (g * 3 * solution(C).square()).sum(), c)
    fit = bl.argmin(inner, START, c, solver=EXACT, hypergrad=hypergrad)
    (grad,) = torch.autograd.grad(fit.value.pow(3).sum(), c)
    assert relative_error(torch.view_as_real(grad), torch.view_as_real(expected)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_complex_hyperparameters_of_a_difference(dtype):
    def run(hypergrad, solver=EXACT):
        c = C.to(dtype.to_complex()).requires_grad_()
        fit = bl.argmin(lambda p: inner(p, c), START.to(dtype), solver=solver, hypergrad=hypergrad, throw="ignore")
        return torch.view_as_real(torch.autograd.grad(fit.value.pow(3).sum(), c)[0])

    tolerance = 1e-8 if dtype is F64 else 1e-3
    assert relative_error(run(bl.FiniteDifference(0.3)), run(bl.OneStep(0.3))) < tolerance
    steps = bl.Steps(bl.SGD(lr=0.05), max_steps=20)
    assert relative_error(run(bl.SAMA(), steps), run(bl.OneStep(0.05), steps)) < tolerance


def test_complex_hyperparameters_in_both_modes_to_second_order_and_in_systems():
    def value(c):
        return bl.argmin(inner, START, c, solver=EXACT).value

    c = C.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (c,))
    assert torch.autograd.gradgradcheck(value, (c,))
    along = torch.tensor([1 - 2j, 0.5, 1j], dtype=C128)
    expected = (truth().conj() * along).real.sum()
    _, found = torch.func.jvp(lambda c: value(c).pow(3).sum(), (C,), (along,))
    assert relative_error(found, expected) < 1e-8
    many = torch.vmap(torch.func.grad(lambda c: value(c).pow(3).sum()))(torch.stack([C, C]))
    assert relative_error(torch.view_as_real(many[1]), torch.view_as_real(truth())) < 1e-8
    found = bl.root(lambda p, c: (c.conj() * (p * c - (1 + 2j))).real + X * p, START, c)
    (grad,) = torch.autograd.grad(found.value.pow(3).sum(), c)
    assert relative_error(torch.view_as_real(grad), torch.view_as_real(truth())) < 1e-8


def test_complex_params_are_refused_in_words():
    with pytest.raises(TypeError, match="real floating-point"):
        bl.argmin(lambda p: p.abs().square().sum(), C)
    with pytest.raises(ValueError, match="objective returned"):
        bl.argmin(lambda p: (p * C).sum(), START)


@pytest.mark.parametrize(
    "hypergrad", [bl.ForwardMode(), bl.Unroll(), bl.Unroll(checkpoint=True), bl.Implicit()], ids=repr
)
def test_params_and_hyperparameters_of_mixed_dtypes(hypergrad):
    x, z = (torch.tensor(0.5, dtype=dtype, requires_grad=True) for dtype in (F64, torch.float32))
    init = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=F64), "c": torch.zeros(())}

    def objective(p):
        return (p["a"] - x).square().sum() + (p["b"] - z * x).square().sum() + (p["c"] - z).square()

    fit = bl.argmin(objective, init, solver=bl.GradientDescent(0.2, 60), hypergrad=hypergrad, throw="ignore")
    loss = fit.value["a"].sum() + 3 * fit.value["b"].sum() + fit.value["c"]
    by_x, by_z = torch.autograd.grad(loss, (x, z))
    assert (by_x.dtype, by_z.dtype) == (F64, torch.float32)
    assert by_x.item() == pytest.approx(2 + 6 * 0.5, rel=1e-5)
    assert by_z.item() == pytest.approx(6 * 0.5 + 1, rel=1e-5)


HALF = [bl.Cholesky(), bl.LU(), bl.LeastNorm(), bl.Nystrom(rank=4, damping=1e-3), bl.Nystrom(2), bl.MINRES(max_steps=4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [*HALF, bl.CG(max_steps=4, preconditioner=bl.NystromPreconditioner(2))], ids=repr)
def test_half_precision(linear, dtype):
    a, b = randn(12, 4, seed=3).to(dtype), randn(12, seed=4).to(dtype)
    x = torch.tensor(0.5, dtype=dtype, requires_grad=True)

    def objective(p):
        return (a.float() @ p.float() - b.float()).square().mean() + x.float() * p.float().square().sum()

    fit = bl.argmin(
        objective,
        torch.zeros(4, dtype=dtype),
        solver=bl.GradientDescent(0.2, 60),
        hypergrad=bl.Implicit(linear),
        throw="ignore",
    )
    (grad,) = torch.autograd.grad(fit.value.float().square().sum(), x)
    a, b, z = a.double(), b.double(), torch.tensor(0.5, dtype=F64, requires_grad=True)
    exact = torch.linalg.solve(a.T @ a / 12 + z * torch.eye(4, dtype=F64), a.T @ b / 12)
    (expected,) = torch.autograd.grad(exact.square().sum(), z)
    rank_2 = isinstance(linear, bl.Nystrom) and linear.rank == 2
    assert fit.adjoint.value.dtype == dtype
    assert rank_2 or relative_error(grad.double(), expected) < 0.1
    assert grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [bl.Anderson(), bl.Picard(), bl.Anderson(history=2)], ids=repr)
def test_fixed_points_in_half_precision(solver, dtype):
    x = torch.tensor([0.5, -0.2, 0.1], dtype=dtype, requires_grad=True)
    fit = bl.fixed_point(lambda z: torch.tanh(0.3 * z + x), torch.zeros(3, dtype=dtype), solver=solver, throw="ignore")
    exact = bl.fixed_point(lambda z: torch.tanh(0.3 * z + x.detach().double()), torch.zeros(3, dtype=F64)).value
    assert relative_error(fit.value.double(), exact) < 0.02
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    slope = 1 - exact.square()
    assert relative_error(grad.double(), slope / (1 - 0.3 * slope)) < 0.05


SYSTEMS = [None, bl.CG(), bl.MINRES(), bl.GMRES(), bl.BiCGSTAB(), bl.LSMR(), bl.Neumann(), bl.Cholesky(), bl.LU()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", SYSTEMS, ids=repr)
def test_defaults_ask_of_half_precision_what_it_can_give(linear, dtype):
    """A well-conditioned problem at all defaults: right to its precision, and no warning."""
    a, b = randn(24, 4, seed=3).to(dtype), randn(24, seed=4).to(dtype)
    x = torch.tensor(0.0, dtype=dtype, requires_grad=True)
    fit = bl.argmin(
        lambda p: (a @ p - b).square().mean() + x.exp() * p.square().sum(),
        torch.zeros(4, dtype=dtype),
        hypergrad=bl.Implicit(linear),
        throw="raise",
    )
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    a, b, z = a.double(), b.double(), torch.tensor(0.0, dtype=F64, requires_grad=True)
    exact = torch.linalg.solve(a.T @ a / 24 + z.exp() * torch.eye(4, dtype=F64), a.T @ b / 24)
    (expected,) = torch.autograd.grad(exact.square().sum(), z)
    assert relative_error(grad.double(), expected) < 8 * torch.finfo(dtype).eps


CURVATURE = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.0], [0.5, 0.0, 2.0]], dtype=F64)
SLOPE = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
ROOT = torch.linalg.cholesky(CURVATURE)


def coupled(p, x):
    """Minimal where ``CURVATURE p = x SLOPE``; of params of two kinds."""
    y = torch.cat([p["coarse"].float(), p["fine"].float()])
    return y @ CURVATURE.float() @ y / 2 - x * (SLOPE.float() @ y)


def residuals(p, x):
    """The same as a sum of squares, in the kind of the coarser ones."""
    y = torch.cat([p["coarse"].float(), p["fine"].float()])
    return (
        ROOT.mT.float() @ y - x * torch.linalg.solve_triangular(ROOT, SLOPE[:, None], upper=False)[:, 0].float()
    ).to(p["coarse"].dtype)


WAYS = {
    "argmin": lambda start, x: bl.argmin(coupled, start, x, throw="raise").value,
    "argmin gtol": lambda start, x: bl.argmin(coupled, start, x, solver=bl.LBFGS(gtol=0.1), throw="raise").value,
    "argmin bounds": lambda start, x: (
        bl.argmin(coupled, start, x, solver=bl.LBFGS(bounds=(-9, None)), throw="raise").value
    ),
    "least_squares": lambda start, x: bl.least_squares(residuals, start, x, throw="ignore").value,
    "constrained": lambda start, x: (
        bl.constrained(coupled, lambda p, x: p["fine"][:1] - p["fine"][1:] / 2, start, x, throw="raise").value.params
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fine", [torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_params_of_a_half_and_of_a_finer_precision_together(way, fine, dtype):
    """The closed form, and its slope by x, to the coarser precision."""
    start = {"coarse": torch.zeros(1, dtype=dtype), "fine": torch.zeros(2, dtype=fine or dtype)}
    x = torch.tensor(1.5, requires_grad=True)
    found = WAYS[way](start, x)
    assert [found[name].dtype for name in start] == [dtype, fine or dtype]
    exact = torch.linalg.solve(CURVATURE, SLOPE)
    if way == "constrained":
        free = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 1.0]], dtype=F64)
        exact = free @ torch.linalg.solve(free.T @ CURVATURE @ free, free.T @ SLOPE)
    flat = torch.cat([found["coarse"].double(), found["fine"].double()])
    error = 16 * torch.finfo(dtype).eps if "gtol" not in way else 0.1
    assert relative_error(flat, 1.5 * exact) < error
    (slope,) = torch.autograd.grad(flat.sum(), x)
    assert slope.item() == pytest.approx(exact.sum().item(), rel=error)


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    "hypergrad", [bl.Implicit(), bl.Implicit(bl.Cholesky()), bl.Implicit(operator="func")], ids=str
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_hyperparameters(hypergrad, captured, layout):
    """``(S y - 1)^2 + y^2`` with a diagonal S: the backward pass was an error of PyTorch about is_set_to."""
    if layout == "csr" and hypergrad.operator == "func":
        pytest.skip("torch.func.grad does not take them: they have no strides")
    values = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    if layout == "coo":
        matrix = torch.sparse_coo_tensor([[0, 1, 2], [0, 1, 2]], values, (3, 3), check_invariants=True)
    else:
        matrix = torch.sparse_csr_tensor([0, 1, 2, 3], [0, 1, 2], values, (3, 3), check_invariants=True)

    def loss(y, matrix):
        return (torch.mv(matrix, y) - 1).square().sum() + y.square().sum()

    zero = torch.zeros(3, dtype=F64)
    if captured:
        fit = bl.argmin(lambda y: loss(y, matrix), zero, hypergrad=hypergrad)
    else:
        fit = bl.argmin(loss, zero, matrix, hypergrad=hypergrad)
    (grad,) = torch.autograd.grad(fit.value.sum(), values)
    exact = ((1 - values**2) / (1 + values**2) ** 2).detach()
    assert (grad - exact).abs().max() < 1e-8
