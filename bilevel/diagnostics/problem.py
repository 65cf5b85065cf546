"""A bilevel problem in one object: what diagnostics need to see of it, both levels and the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor

from .._torch import pytree
from ..argmin import argmin, fixed_point, root
from ..closure import Autocast, Closure
from ..hypergrad.base import Hypergrad, PathMethod
from ..hypergrad.statement import ObjectiveStatement, ResidualStatement, Statement, SymmetricResidualStatement
from ..inner.decay import with_decay
from ..inner.minimize import InnerSolver
from ..inner.proximal import prox_of
from ..inner.roots import RootSolver
from ..prox.base import Prox
from ..solution import Solution, Throw
from ..tree import Raveler, Tree, is_continuous, leaves, tree_map
from .captures import Opened, captured_hparams, takes_params_only

Kind = Literal["argmin", "root", "fixed_point"]
Solver = InnerSolver | RootSolver
AnyHypergrad = Hypergrad | PathMethod
Method = AnyHypergrad | None | tuple[Solver | None, AnyHypergrad | None]
"""A hypergradient, or an inner solver with one."""
SOLVED_KINDS = ("argmin", "root", "fixed_point")
"""The kinds that `solve` solves itself; a problem of another kind brings its own solver."""


class Bilevel(Protocol):
    """What every function of `diagnostics` takes: a `BilevelProblem`, or one of `bilevel.problems`.

    Attributes:
        kind: what ``inner`` is: an objective for `argmin`, a residual for `root`, or a map for `fixed_point`; a problem
            of another kind brings ``solve_inner(hparams, solver=, hypergrad=, throw=)``, and, for error estimates,
            ``residual(params, hparams)``, a tree like params that vanishes at the solution.
    """

    @property
    def init(self) -> Tree: ...

    @property
    def hparams(self) -> Tree: ...

    @property
    def kind(self) -> str: ...

    def inner(self, params: Tree, hparams: Tree) -> Tree:
        """The loss, residual or map."""
        ...

    def outer(self, params: Tree, hparams: Tree) -> Tensor:
        """A scalar."""
        ...


@dataclass(frozen=True)
class BilevelProblem:
    """``min over hparams of outer(y, hparams)`` where y solves the inner problem.

    Functions of the params alone are taken as `argmin` takes them: the hyperparameters are tensors that they captured,
    and wherever the problem is evaluated at other hyperparameters, those stand in for them.

    Args:
        inner: ``inner(params, hparams)``, or ``inner(params)``, as ``kind`` says; see `Bilevel`.
        outer: ``outer(params, hparams)``, or ``outer(params)``, a scalar.
        init: where the inner solve starts.
        hparams: a tree of real tensors, where the hypergradient is wanted; None: the tuple of all tensors that require
            grad and were captured by ``inner``, then by ``outer``.

    Raises:
        TypeError: ``hparams`` holds complex tensors, or is missing although ``inner`` takes it as an argument.
        ValueError: functions of the params alone use no tensor that requires grad, or not one of ``hparams``.
    """

    inner: Callable[..., Any]
    outer: Callable[..., Tensor]
    init: Tree
    hparams: Tree = None
    kind: Kind = "argmin"

    def __post_init__(self) -> None:
        functions = {"inner": self.inner, "outer": self.outer}
        captures = {name: fn for name, fn in functions.items() if takes_params_only(fn)}
        hparams = captured_hparams(list(captures.values()), self.init, self.hparams, complete=len(captures) == 2)
        object.__setattr__(self, "hparams", hparams)
        for name, fn in captures.items():
            object.__setattr__(self, name, Opened(fn, leaves(hparams)))
        whole = [leaf.dtype for leaf in leaves(self.hparams) if isinstance(leaf, Tensor) and not is_continuous(leaf)]
        if whole:
            raise TypeError(f"hparams contains a tensor of {whole[0]}, which has no derivative: pass it as floats.")
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves(self.hparams)):
            raise TypeError(
                "hparams contains a complex tensor: differences and norms are taken of real numbers. Pass "
                "torch.view_as_real(tensor), and let inner and outer begin with torch.view_as_complex; the solves "
                "themselves take complex hyperparameters."
            )


def solve(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Solver | None = None,
    hypergrad: AnyHypergrad | None = None,
    init: Tree | None = None,
    throw: Throw = "warn",
    **settings: Any,
) -> Solution:
    """The inner problem solved by `argmin`, `root` or `fixed_point`, as its kind says; or by its ``solve_inner``."""
    hparams = problem.hparams if hparams is None else hparams
    init = problem.init if init is None else init
    given: dict[str, Any] = {"throw": throw, **settings}
    if hypergrad is not None:
        given["hypergrad"] = hypergrad
    own: Callable[..., Solution] | None = getattr(problem, "solve_inner", None)
    if own is not None:
        return own(hparams, solver=solver, **given)
    if problem.kind == "root":
        given["symmetric"] = getattr(problem, "symmetric", False)
    entries: dict[str, Callable[..., Solution]] = {"argmin": argmin, "root": root, "fixed_point": fixed_point}
    entry = entries.get(problem.kind, entries["argmin"])
    return entry(problem.inner, init, hparams, solver=solver, **given)


def leaf_copies(tree: Tree) -> Tree:
    """Fresh leaves that require grad.

    Raises:
        TypeError: a leaf is no tensor.
    """
    for leaf in leaves(tree):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"hparams (or params) holds {type(leaf).__name__}: a tensor, or a tree of tensors, is needed, such as "
                "torch.tensor(3.0)."
            )
    return tree_map(lambda tensor: tensor.detach().clone().requires_grad_(), tree)


def statement_of(problem: Bilevel, hparams: Tree) -> tuple[Statement, list[Tensor]]:
    """The inner problem as a function of params and hparams, and the list of the latter."""
    flat = leaves(hparams)
    spec = pytree.tree_structure(problem.init)
    autocast = Autocast.current(leaves(problem.init)[0].device)
    if problem.kind == "argmin":
        return ObjectiveStatement(Closure(problem.inner, spec, (hparams,), flat, autocast)), flat
    kind = SymmetricResidualStatement if getattr(problem, "symmetric", False) else ResidualStatement
    return kind(Closure(_residual_of(problem), spec, (hparams,), flat, autocast)), flat


def _residual_of(problem: Bilevel) -> Callable[[Tree, Tree], Tree]:
    """What vanishes at the solution of a problem that has no loss, or more than a loss."""
    if problem.kind == "root":
        return problem.inner
    if problem.kind == "fixed_point":
        return lambda params, hparams: tree_map(torch.sub, params, problem.inner(params, hparams))
    own: Callable[[Tree, Tree], Tree] | None = getattr(problem, "residual", None)
    if own is None:
        raise NotImplementedError(
            f"An error estimate or advice for a problem of kind {problem.kind!r} needs what vanishes at its solution: "
            "give it residual(params, hparams), or use check_hypergradient, which compares with finite differences."
        )
    return own


def as_solved(problem: Bilevel, solver: Solver | None) -> tuple[Bilevel, Solver | None]:
    """The problem that the solver solves, which may be more than the inner loss, and the solver for it.

    A weight decay inside of an optimizer is a part of the loss, and so are a prox and bounds.
    """
    if problem.kind != "argmin" or solver is None:
        return problem, solver
    plain, inner = with_decay(cast(InnerSolver, solver), problem.inner, problem.init, warn=False)
    if plain is not solver:
        problem = BilevelProblem(inner, problem.outer, problem.init, problem.hparams)
    prox = prox_of(plain, problem.init)
    return (problem if prox is None else CompositeProblem(problem, plain, prox)), plain


@dataclass(frozen=True)
class CompositeProblem:
    """The inner loss with the bounds or the prox of a solver."""

    problem: Bilevel
    solver: InnerSolver
    prox: Prox
    kind: ClassVar[str] = "composite"
    matrix_kind: ClassVar[str] = "composite"

    @property
    def init(self) -> Tree:
        return self.problem.init

    @property
    def hparams(self) -> Tree:
        return self.problem.hparams

    def inner(self, params: Tree, hparams: Tree) -> Tree:
        """The smooth part of the loss."""
        return self.problem.inner(params, hparams)

    def outer(self, params: Tree, hparams: Tree) -> Tensor:
        """The outer loss."""
        return self.problem.outer(params, hparams)

    def solve_inner(self, hparams: Tree, *, solver: Solver | None = None, **settings: Any) -> Solution:
        """By a solver that has bounds or a prox; by the problem's own where none is given.

        Raises:
            ValueError: the solver has none, so that its solutions are those of another problem.
        """
        other = cast(InnerSolver, solver)
        if solver is not None and prox_of(other, self.init) is None:
            raise ValueError(
                f"{type(solver).__name__} solves the inner problem without the bounds or the prox that "
                f"{type(self.solver).__name__} has: give it the same ones, or leave it out."
            )
        chosen = self.solver if solver is None else other
        return argmin(self.problem.inner, self.init, hparams, solver=chosen, **settings)

    def residual(self, params: Tree, hparams: Tree) -> Tree:
        """``y - prox(y - g(y), 1)``, a tree like params."""

        def summed(point: Tree) -> tuple[Tensor, Tensor]:
            losses = cast(Tensor, self.problem.inner(point, hparams))
            return losses.sum(), losses

        slope, losses = torch.func.grad(summed, has_aux=True)(params)
        raveler = Raveler(params, losses.shape)
        y = raveler.ravel(leaves(params))
        moved = self.prox.prox(y - raveler.ravel(leaves(slope)), torch.ones_like(losses))
        return raveler.unflatten(raveler.unravel(y - moved))
