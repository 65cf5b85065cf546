"""`custom_root` and `custom_fixed_point`, as JAXopt and TorchOpt name them, for code that comes from there.

New code says `root`, `fixed_point` or `argmin`, which return a `Solution`; ``docs/migration.md`` has both side by side.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .argmin import root
from .checks import check_fields, check_flag, check_leaves
from .closure import in_transform
from .hypergrad.implicit import Implicit
from .linalg.adjoint import is_differentiated
from .linalg.bicgstab import BiCGSTAB
from .linalg.cg import CG
from .linalg.direct import LU, Cholesky
from .linalg.gmres import GMRES
from .linalg.jacobian import GraphJacobian
from .linalg.operator import Operator
from .linalg.solve import COMPLEX, LinearSolver, LinearState, normalise, report
from .problem import RootProblem, check_residual
from .solution import Result, Solution, Throw, make_codes, marked, settle
from .tree import Raveler, Tree, leaves, norm, tree_map

Solve = Callable[..., Any]
Matvec = Callable[[Tree], Tree]
Ridge = float | Tensor | None

LINEAR_ADVICE = (
    "The solution is inexact: raise maxiter, loosen tol, or take another solver (solve_lu for small systems)"
)


def custom_root(
    optimality_fun: Callable[..., Tree],
    has_aux: bool = False,
    solve: LinearSolver | Solve | None = None,
    reference_signature: Callable[..., Any] | None = None,
    *,
    tol: float | None = None,
    throw: Throw = "warn",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a solver ``solver(init_params, *args)`` the implicit derivative of ``optimality_fun(params, *args)``.

    Gradients flow to ``args`` and to whatever else ``optimality_fun`` reaches; none flows to ``init_params``. The
    solver runs once, without a graph, whatever it does inside. Under `torch.func.vmap` it must be vmappable itself.

    Args:
        optimality_fun: zero at the solution: a tree like the params.
        has_aux: the solver returns ``(params, aux)``; aux is passed on.
        solve: a linear solver of this library, or a function ``solve(matvec, b)`` such as `solve_cg`; None: `GMRES`.
        reference_signature: a function whose signature ``optimality_fun`` stands for, so that keyword arguments can be
            given to the solver in any order.
        tol: what norm of ``optimality_fun`` counts as solved: above it, ``throw`` says what happens. None: no check.
        throw: as in `argmin`.
    """
    check_flag("has_aux", has_aux)
    hypergrad, given = Implicit(_linear_solver(solve)), _Given(tol)
    signature = inspect.signature(reference_signature or optimality_fun)

    def wrap(solver: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solver)
        def solved(init_params: Tree, *args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():  # for a training loop inside; of detached arguments it leaves no graph
                found = _detached(solver(init_params, *_detached(args), **_detached(kwargs)))
            if has_aux and not (isinstance(found, tuple | list) and len(found) == 2):
                raise TypeError(f"has_aux=True: the solver returns a pair (params, aux), not a {type(found).__name__}.")
            params, aux = found if has_aux else (found, None)
            bound = signature.bind(params, *args, **kwargs)
            bound.apply_defaults()
            _, *positional = bound.args
            fit = root(
                lambda y, *rest: optimality_fun(y, *rest, **bound.kwargs),
                _detached(params),
                *positional,
                solver=given,
                hypergrad=hypergrad,
                throw=throw,
            )
            return (fit.value, aux) if has_aux else fit.value

        return solved

    return wrap


def custom_fixed_point(
    fixed_point_fun: Callable[..., Tree],
    has_aux: bool = False,
    solve: LinearSolver | Solve | None = None,
    reference_signature: Callable[..., Any] | None = None,
    *,
    tol: float | None = None,
    throw: Throw = "warn",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same for a solver of ``params = fixed_point_fun(params, *args)``."""

    @functools.wraps(fixed_point_fun)
    def optimality_fun(params: Tree, *args: Any, **kwargs: Any) -> Tree:
        return tree_map(torch.sub, params, fixed_point_fun(params, *args, **kwargs))

    return custom_root(optimality_fun, has_aux, solve, reference_signature or fixed_point_fun, tol=tol, throw=throw)


def solve_cg(
    matvec: Matvec,
    b: Tree,
    ridge: Ridge = None,
    init: Tree | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int | None = None,
) -> Tree:
    """Conjugate gradients for ``(A + ridge I) x = b``, with A symmetric positive definite: `jaxopt.linear_solve`.

    Like the other functions here it is differentiable towards ``b``, ``ridge`` and all that ``matvec`` captured, by its
    adjoint system: any order, both modes, under `torch.func`. A solve that fails is a `SolveWarning`.

    Args:
        matvec: ``x -> A x``, from a tree like ``b`` to a tree like ``b``.
        b: a tensor or a tree of tensors.
        ridge: None: zero.
        init: the first guess; None: zero.
        tol: stop at a residual of ``tol ||b||``. maxiter: steps at most; None: ``10 n``, at most 1000.
    """
    return _solve(CG(rtol=tol, max_steps=maxiter), _ridged(matvec, ridge), b, init, symmetric=True)


def solve_normal_cg(
    matvec: Matvec,
    b: Tree,
    ridge: Ridge = None,
    init: Tree | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int | None = None,
) -> Tree:
    """Conjugate gradients for ``(A^T A + ridge I) x = A^T b``: least squares, for any A; see `solve_cg`.

    The tolerance is on the residual of this system, relative to ``||A^T b||``. The transpose comes from
    `torch.func.vjp` of ``matvec``.

    Args:
        init: a tree like x; needed where A is not square.
    """
    check_leaves("b", leaves(b), Tensor.is_floating_point, f"b.double() for example; {COMPLEX}")
    like = tree_map(torch.zeros_like, b if init is None else init)
    try:
        right = _pulled(matvec, like)[1](b)
    except RuntimeError as error:
        raise ValueError(
            f"matvec fails for x like {'b' if init is None else 'init'}, or its transpose for b ({error}): give init, "
            "a tree like x, where A is not square."
        ) from error

    def normal(x: Tree) -> Tree:
        product, pull = _pulled(matvec, x)
        return pull(product)

    return _solve(CG(rtol=tol, max_steps=maxiter), _ridged(normal, ridge), right, init, symmetric=True)


def solve_gmres(
    matvec: Matvec,
    b: Tree,
    ridge: Ridge = None,
    init: Tree | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int | None = None,
    restart: int = 20,
) -> Tree:
    """GMRES for ``(A + ridge I) x = b``, for any regular matrix; see `solve_cg`.

    Args:
        maxiter: times that a space of ``restart`` directions is built, as in JAX; None: as many as 1000 steps allow.
    """
    solver = GMRES(rtol=tol, max_steps=None if maxiter is None else maxiter * restart, restart=restart)
    return _solve(solver, _ridged(matvec, ridge), b, init)


def solve_bicgstab(
    matvec: Matvec,
    b: Tree,
    ridge: Ridge = None,
    init: Tree | None = None,
    *,
    tol: float = 1e-5,
    maxiter: int | None = None,
) -> Tree:
    """BiCGSTAB for ``(A + ridge I) x = b``, for any regular matrix; see `solve_cg`."""
    return _solve(BiCGSTAB(rtol=tol, max_steps=maxiter), _ridged(matvec, ridge), b, init)


def solve_lu(matvec: Matvec, b: Tree) -> Tree:
    """A dense LU factorisation, from n products; see `solve_cg`."""
    return _solve(LU(), matvec, b, None)


def solve_cholesky(matvec: Matvec, b: Tree) -> Tree:
    """A dense Cholesky factorisation, for positive definite matrices; see `solve_cg`."""
    return _solve(Cholesky(), matvec, b, None, symmetric=True)


def _ridged(matvec: Matvec, ridge: Ridge) -> Matvec:
    if ridge is None:
        return matvec
    return lambda x: tree_map(lambda product, leaf: product + ridge * leaf, matvec(x), x)


def _pulled(matvec: Matvec, x: Tree) -> tuple[Tree, Matvec]:
    """``A x``, and ``y -> A^T y``."""
    if isinstance(matvec, _Product):
        return matvec(x), matvec.operator.rmatvec
    product, pull = torch.func.vjp(matvec, x)  # type: ignore[misc]
    return product, lambda y: pull(y)[0]


def _solve(solver: LinearSolver, matvec: Matvec, b: Tree, init: Tree | None, symmetric: bool = False) -> Tree:
    """The solution, as a function of b and of what ``matvec`` captured."""
    check_leaves("b", leaves(b), Tensor.is_floating_point, f"b.double() for example; {COMPLEX}")
    start = _detached(tree_map(torch.zeros_like, b) if init is None else init)
    if [leaf.shape for leaf in leaves(start)] != [leaf.shape for leaf in leaves(b)]:
        shapes = [[list(leaf.shape) for leaf in leaves(tree)] for tree in (start, b)]
        raise ValueError(f"init has leaves of shapes {shapes[0]}, and b {shapes[1]}: a tree like b is needed.")
    raveler = Raveler(start)
    product = matvec(start)
    check_residual(product, b, "matvec")
    if not (in_transform() or is_differentiated(*leaves(b), *leaves(product))):
        operator = _TreeOperator(matvec, raveler, symmetric)
        found = solver.solve(operator, raveler.ravel(leaves(b)), LinearState(x0=raveler.ravel(leaves(start))))
        # What is called by a solve of this library is judged there.
        settle(found, "ignore" if isinstance(matvec, _Product) else "warn", "The linear solve", LINEAR_ADVICE)
        return raveler.unflatten(raveler.unravel(found.value))

    def residual(x: Tree, b: Tree) -> Tree:
        return tree_map(torch.sub, matvec(x), b)

    linear = _Linear(solver, symmetric)
    return root(residual, start, b, solver=linear, hypergrad=Implicit(solver), symmetric=symmetric).value


@dataclass(frozen=True)
class _Linear:
    """The root of a linear residual, by a linear solver: a `RootSolver`."""

    solver: LinearSolver
    symmetric: bool

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        zero = torch.zeros_like(problem.y)
        operator = GraphJacobian(problem.raveler, problem.linearize(zero), self.symmetric)
        return self.solver.solve(operator, -problem.evaluate(zero), LinearState(x0=problem.y))


class _TreeOperator(Operator):
    """A product of trees as one of flat vectors."""

    def __init__(self, tree_matvec: Matvec, raveler: Raveler, symmetric: bool):
        super().__init__((), raveler.size, raveler.dtype, raveler.device, symmetric=symmetric)
        self.tree_matvec, self.raveler = tree_matvec, raveler

    def matvec(self, v: Tensor) -> Tensor:
        product = self.tree_matvec(self.raveler.unflatten(self.raveler.unravel(v)))
        return self.raveler.ravel(leaves(product))


@dataclass(frozen=True)
class _Product:
    """The ``matvec`` that a solve function is given; it knows its transpose."""

    operator: Operator

    def __call__(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)


@dataclass(frozen=True)
class _Given:
    """A root that a solver of the user's found already."""

    tol: float | None

    def __post_init__(self) -> None:
        check_fields(self)

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        size = norm(problem.r)
        codes = make_codes(Result.STEPS_DONE, size)
        if self.tol is not None:
            codes = marked(make_codes(Result.STAGNATED, size), size <= self.tol, Result.CONVERGED)
        return Solution(problem.y, {"num_steps": torch.zeros_like(codes, dtype=torch.int64), "result": codes})


@dataclass(frozen=True)
class _MatvecSolver:
    """A function ``solve(matvec, b)`` as a linear solver; its result is judged by its true residual."""

    fn: Solve

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        unit, length = normalise(b)
        x = self.fn(_Product(operator), unit)
        if not isinstance(x, Tensor) or x.shape != b.shape:
            raise TypeError(
                f"solve returned {type(x).__name__}: a tensor of shape {tuple(b.shape)}, like b, is needed."
            )
        relative = norm(unit - operator.matvec(x))
        # JAXopt's own solvers stop at 1e-5 by default; what is above a percent is called what it is.
        codes = marked(make_codes(Result.STEPS_DONE, relative), ~(relative <= 1e-2), Result.STAGNATED)
        codes = marked(codes, ~torch.isfinite(relative), Result.NONFINITE)
        steps = torch.zeros_like(codes, dtype=torch.int64)
        return report(length.to(x.dtype).unsqueeze(-1) * x, codes, steps, relative * length, length)


def _linear_solver(solve: LinearSolver | Solve | None) -> LinearSolver | None:
    return solve if solve is None or hasattr(solve, "solve") else _MatvecSolver(solve)


def _detached(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
