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
    @compat.custom_root(optimality, has_aux=True)
    def solver(init_params, l2reg, data):
        return ridge_solver(init_params, l2reg, data), {"steps": 7}

    value, aux = solver(INIT, torch.tensor(0.3, dtype=torch.float64), (A, B))
    assert aux == {"steps": 7}
    penalties = torch.tensor([0.1, 0.3], dtype=torch.float64)
    many = torch.vmap(torch.func.jacrev(lambda p: solver(INIT, p, (A, B))[0]))(penalties)
    assert relative_error(many, torch.stack([exact(0.1), exact(0.3)])) <= 1e-7
    assert relative_error(value, ridge_solver(None, 0.3, (A, B))) <= 1e-12


def test_a_solver_without_aux_that_was_promised_is_told():
    """A vector of two numbers was taken apart."""
    solver = compat.custom_root(optimality, has_aux=True)(ridge_solver)
    with pytest.raises(TypeError, match="returns a pair"):
        solver(INIT, torch.tensor(0.3, dtype=torch.float64), (A, B))


def test_settings_of_a_wrong_kind_are_told_before_anything_is_solved():
    with pytest.raises(TypeError, match="tol is 'a': a number"):
        compat.custom_root(optimality, tol="a")
    with pytest.raises(TypeError, match="has_aux is 'no': True or False"):
        compat.custom_root(optimality, has_aux="no")


@pytest.mark.parametrize("solve", [compat.solve_cg, compat.solve_gmres, compat.solve_normal_cg, compat.solve_lu])
def test_complex_systems_are_refused_by_name(solve):
    with pytest.raises(TypeError, match=r"complex128.*view_as_real"):
        solve(lambda v: (2 + 1j) * v, torch.ones(3, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"complex128.*view_as_real"):
        bl.GMRES().solve(bl.extending.Dense(torch.eye(3).to(torch.complex128)), torch.ones(3, dtype=torch.complex128))


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

    @compat.custom_root(lambda w, h: w**3 + h * w - 1)
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


SOLVE_FUNCTIONS = {
    "cg": functools.partial(compat.solve_cg, tol=1e-13),
    "normal_cg": functools.partial(compat.solve_normal_cg, tol=1e-13),
    "gmres": functools.partial(compat.solve_gmres, tol=1e-13),
    "bicgstab": functools.partial(compat.solve_bicgstab, tol=1e-13),
    "lu": compat.solve_lu,
    "cholesky": compat.solve_cholesky,
}
SYMMETRIC = ("cg", "cholesky")
ITERATIVE = ("cg", "normal_cg", "gmres", "bicgstab")
EYE = torch.eye(5, dtype=torch.float64)


def matrix_of(name):
    """Positive definite where the solver needs that, else general."""
    return A.mT @ A / 20 + EYE if name in SYMMETRIC else 2 * EYE + A[:5] / 3


def truth_of(name, matrix, b, ridge=0.0):
    """The solution that JAXopt defines."""
    if name == "normal_cg":
        return torch.linalg.solve(matrix.mT @ matrix + ridge * EYE, matrix.mT @ b)
    return torch.linalg.solve(matrix + ridge * EYE, b)


@pytest.mark.parametrize("name", ITERATIVE)
def test_solve_functions_take_trees_and_jaxopts_keywords(name):
    matrix = matrix_of(name)

    def matvec(tree):
        product = matrix @ torch.cat([tree["a"], tree["b"]])
        return {"a": product[:2], "b": product[2:]}

    b = {"a": B[:2], "b": B[2:5]}
    found = getattr(compat, f"solve_{name}")(matvec, b, ridge=0.5, init=b, tol=1e-10, maxiter=500)
    assert relative_error(torch.cat([found["a"], found["b"]]), truth_of(name, matrix, B[:5], 0.5)) <= 1e-8


def test_normal_cg_solves_least_squares():
    """As in JAXopt: any A, where init says what x looks like; the solution of least norm where it is singular."""
    start = torch.zeros(5, dtype=torch.float64)
    found = compat.solve_normal_cg(lambda x: A @ x, B, init=start, tol=1e-12)
    assert relative_error(found, torch.linalg.lstsq(A, B).solution) <= 1e-9
    found = compat.solve_normal_cg(lambda x: A @ x, B, 0.7, start, tol=1e-12)
    assert relative_error(found, torch.linalg.solve(A.mT @ A + 0.7 * EYE, A.mT @ B)) <= 1e-9
    with pytest.raises(ValueError, match=r"give init.*not square"):
        compat.solve_normal_cg(lambda x: A @ x, B)
    singular = EYE.clone()
    singular[4, 4] = 0
    found = compat.solve_normal_cg(lambda x: singular @ x, B[:5])
    assert relative_error(found, singular @ B[:5]) <= 1e-12
    matrix, b = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.ones(2)
    found = compat.solve_normal_cg(lambda v: matrix @ v, b, ridge=1.0, tol=1e-7)
    assert relative_error(found, torch.linalg.solve(matrix.mT @ matrix + torch.eye(2), matrix.mT @ b)) <= 1e-5


@pytest.mark.parametrize("name", SOLVE_FUNCTIONS)
def test_a_solve_is_differentiated_by_its_adjoint_system(name):
    """Towards b, towards what matvec captured, and the ridge; of first and second order, twice, in both modes."""
    solve, matrix = SOLVE_FUNCTIONS[name], matrix_of(name)
    b, t = B[:5].clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    keywords = {"ridge": t.square()} if name in ITERATIVE else {}
    moving = EYE if name in SYMMETRIC else A[5:10] / 3

    def found(b, t):
        keywords = {"ridge": t.square()} if name in ITERATIVE else {}
        return solve(lambda v: matrix @ v + t * (moving @ v), b, **keywords)

    def true(b, t):
        return truth_of(name, matrix + t * moving, b, t.square() if keywords else 0.0)

    x, exact = found(b, t), true(b, t)
    assert relative_error(x, exact) <= 1e-9
    for _ in range(2):  # a second backward pass over the same graph
        grads = torch.autograd.grad(x.sin().sum(), (b, t), retain_graph=True)
        truths = torch.autograd.grad(exact.sin().sum(), (b, t), retain_graph=True)
        assert max(map(relative_error, grads, truths)) <= 1e-8
    seconds = []
    for y in (x, exact):
        first = torch.autograd.grad(y.sin().sum(), (b, t), create_graph=True)
        seconds.append(torch.autograd.grad(first[0].square().sum() + first[1].square(), (b, t)))
    assert max(map(relative_error, *seconds)) <= 1e-7
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        pairs = zip(jacobian(found, (0, 1))(b, t), jacobian(true, (0, 1))(b, t), strict=True)
        assert max(relative_error(one, other) for one, other in pairs) <= 1e-8
    many = torch.stack([B[:5], B[5:10], B[10:15]])
    both = [torch.vmap(f, in_dims=(0, None))(many, t.detach()) for f in (found, true)]
    assert relative_error(*both) <= 1e-8


@pytest.mark.parametrize("name", SOLVE_FUNCTIONS)
def test_a_solve_of_a_tree_is_differentiated(name):
    solve, matrix = SOLVE_FUNCTIONS[name], matrix_of(name)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def matvec(tree):
        product = matrix @ torch.cat([tree["a"], tree["b"].flatten()])
        return {"a": scale[0] * product[:1], "b": scale[0] * product[1:].view(2, 2)}

    b = {"a": (scale[1] * B[:1]), "b": B[1:5].view(2, 2)}
    x = solve(matvec, b)
    found = torch.autograd.grad(x["a"].sum() + x["b"].square().sum(), scale)[0]
    flat = truth_of(name, scale[0] * matrix, torch.cat([scale[1] * B[:1], B[1:5]]))
    expected = torch.autograd.grad(flat[:1].sum() + flat[1:].square().sum(), scale)[0]
    assert relative_error(found, expected) <= 1e-8


def test_solves_that_fail_are_heard():
    with pytest.warns(bl.SolveWarning, match=r"The linear solve.*maxiter"):
        compat.solve_cg(lambda v: A.mT @ (A @ v), B[:5], maxiter=1)
    b = B[:5].clone().requires_grad_()
    with pytest.warns(bl.SolveWarning, match="step limit"):
        compat.solve_cg(lambda v: A.mT @ (A @ v), b, maxiter=1)
    with pytest.raises(ValueError, match="matvec returned"):
        compat.solve_gmres(lambda v: v[:3], b)


def test_maxiter_of_gmres_counts_spaces_of_restart_directions():
    """As in JAX."""
    matrix = 2 * torch.eye(20, dtype=torch.float64) + torch.diag(torch.ones(19, dtype=torch.float64), 1)
    found = compat.solve_gmres(lambda v: matrix @ v, B, maxiter=1, tol=1e-10)
    assert relative_error(found, torch.linalg.solve(matrix, B)) <= 1e-9
    with pytest.warns(bl.SolveWarning):
        compat.solve_gmres(lambda v: matrix @ v, B, maxiter=1, restart=3, tol=1e-10)


def test_a_matvec_of_numpy_serves_where_nothing_is_differentiated():
    matrix = matrix_of("gmres").numpy()
    found = compat.solve_gmres(lambda v: torch.from_numpy(matrix @ v.numpy()), B[:5], tol=1e-12)
    assert relative_error(found, torch.linalg.solve(matrix_of("gmres"), B[:5])) <= 1e-9


def test_a_custom_root_may_train_inside():
    """A loop of `backward` and an optimizer of PyTorch, also where the caller wants no gradient."""

    @compat.custom_root(torch.func.grad(lambda w, target: ((w - target) ** 2).sum()))
    def solver(init, target):
        w = init.clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.3)
        for _ in range(100):
            optimizer.zero_grad()
            ((w - target) ** 2).sum().backward()
            optimizer.step()
        return w

    target = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(solver(torch.zeros(2), target).square().sum(), target)
    torch.testing.assert_close(grad, torch.full((2,), 2.0))
    with torch.no_grad():
        assert not solver(torch.zeros(2), target).requires_grad


@pytest.mark.parametrize("solve", [compat.solve_cg, compat.solve_normal_cg, compat.solve_gmres, compat.solve_lu])
def test_right_sides_and_starts_of_a_wrong_kind_are_named(solve):
    with pytest.raises(TypeError, match=r"b holds torch\.int64"):
        solve(lambda v: v, torch.arange(3))
    if solve in (compat.solve_cg, compat.solve_gmres):
        with pytest.raises(ValueError, match=r"init has leaves of shapes \[\[2\]\], and b \[\[3\]\]"):
            solve(lambda v: v, torch.ones(3), init=torch.ones(2))
