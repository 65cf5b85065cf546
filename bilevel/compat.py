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
from .hypergrad.implicit import Implicit
from .linalg.cg import CG
from .linalg.direct import LU, Cholesky
from .linalg.normal import NormalCG
from .linalg.operator import Damped, Operator
from .linalg.scipy import GMRES, BiCGSTAB
from .linalg.solve import LinearSolver, LinearState, normalise, report
from .problem import RootProblem
from .solution import Result, Solution, Throw, make_codes
from .tree import Raveler, Tree, leaves, norm, tree_map

Solve = Callable[..., Any]


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
    hypergrad = Implicit(_linear_solver(solve))
    signature = inspect.signature(reference_signature or optimality_fun)

    def wrap(solver: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solver)
        def solved(init_params: Tree, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                found = solver(init_params, *_detached(args), **_detached(kwargs))
            params, aux = found if has_aux else (found, None)
            bound = signature.bind(params, *args, **kwargs)
            bound.apply_defaults()
            _, *positional = bound.args
            fit = root(
                lambda y, *given: optimality_fun(y, *given, **bound.kwargs),
                _detached(params),
                *positional,
                solver=_Given(tol),
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


def solve_cg(matvec: Callable[[Tree], Tree], b: Tree, **settings: Any) -> Tree:
    """Conjugate gradients, with JAXopt's keywords ``ridge``, ``init``, ``tol`` and ``maxiter``."""
    return _solve(CG, True, matvec, b, **settings)


def solve_normal_cg(matvec: Callable[[Tree], Tree], b: Tree, **settings: Any) -> Tree:
    """Conjugate gradients on the normal equations; the transpose comes from `torch.func.vjp` of ``matvec``."""
    return _solve(NormalCG, False, matvec, b, **settings)


def solve_gmres(matvec: Callable[[Tree], Tree], b: Tree, **settings: Any) -> Tree:
    """GMRES, for any regular matrix."""
    return _solve(GMRES, False, matvec, b, **settings)


def solve_bicgstab(matvec: Callable[[Tree], Tree], b: Tree, **settings: Any) -> Tree:
    """BiCGSTAB, for any regular matrix."""
    return _solve(BiCGSTAB, False, matvec, b, **settings)


def solve_lu(matvec: Callable[[Tree], Tree], b: Tree) -> Tree:
    """A dense LU factorisation, from n products."""
    return _solve(lambda **_: LU(), False, matvec, b)


def solve_cholesky(matvec: Callable[[Tree], Tree], b: Tree) -> Tree:
    """A dense Cholesky factorisation, for positive definite matrices."""
    return _solve(lambda **_: Cholesky(), True, matvec, b)


def _solve(
    solver: Callable[..., LinearSolver],
    symmetric: bool,
    matvec: Callable[[Tree], Tree],
    b: Tree,
    ridge: float | None = None,
    init: Tree | None = None,
    tol: float = 1e-5,
    maxiter: int | None = None,
) -> Tree:
    raveler = Raveler(b)
    operator: Operator = _TreeOperator(matvec, raveler, symmetric)
    state = None if init is None else LinearState(x0=raveler.ravel(leaves(init)))
    found = solver(rtol=tol, max_steps=maxiter).solve(
        Damped(operator, ridge) if ridge else operator, raveler.ravel(leaves(b)), state
    )
    return raveler.unflatten(raveler.unravel(found.value))


class _TreeOperator(Operator):
    """A product of trees as one of flat vectors."""

    def __init__(self, tree_matvec: Callable[[Tree], Tree], raveler: Raveler, symmetric: bool):
        super().__init__((), raveler.size, raveler.dtype, raveler.device, symmetric=symmetric)
        self.tree_matvec, self.raveler = tree_matvec, raveler

    def matvec(self, v: Tensor) -> Tensor:
        product = self.tree_matvec(self.raveler.unflatten(self.raveler.unravel(v)))
        return self.raveler.ravel(leaves(product))

    def rmatvec(self, v: Tensor) -> Tensor:
        if self.symmetric:
            return self.matvec(v)
        if isinstance(self.tree_matvec, _Product):
            (b,) = self.raveler.unravel(v)
            return self.raveler.ravel([self.tree_matvec.operator.rmatvec(b)])
        return torch.func.vjp(self.matvec, torch.zeros_like(v))[1](v)[0]


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

    def find(self, problem: RootProblem) -> Solution:
        size = norm(problem.r)
        codes = make_codes(Result.STEPS_DONE, size)
        if self.tol is not None:
            codes = torch.where(size <= self.tol, make_codes(Result.CONVERGED, codes), int(Result.STAGNATED))
        return Solution(problem.y, {"num_steps": torch.zeros_like(codes, dtype=torch.int64), "result": codes})


@dataclass(frozen=True)
class _MatvecSolver:
    """A function ``solve(matvec, b)`` as a linear solver; its result is judged by its true residual."""

    fn: Solve

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution:
        unit, length = normalise(b)
        x = self.fn(_Product(operator), unit)
        if not isinstance(x, Tensor) or x.shape != b.shape:
            raise TypeError(
                f"solve returned {type(x).__name__}: a tensor of shape {tuple(b.shape)}, like b, is needed."
            )
        relative = norm(unit - operator.matvec(x))
        # JAXopt's own solvers stop at 1e-5 by default; what is above a percent is called what it is.
        codes = torch.where(relative <= 1e-2, int(Result.STEPS_DONE), int(Result.STAGNATED)).to(torch.int8)
        codes = torch.where(torch.isfinite(relative), codes, make_codes(Result.NONFINITE, codes))
        steps = torch.zeros_like(codes, dtype=torch.int64)
        return report(length.to(x.dtype).unsqueeze(-1) * x, codes, steps, relative * length, length)


def _linear_solver(solve: LinearSolver | Solve | None) -> LinearSolver | None:
    return solve if solve is None or hasattr(solve, "solve") else _MatvecSolver(solve)


def _detached(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
