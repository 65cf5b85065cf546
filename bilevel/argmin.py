"""`argmin`: solve an inner problem, and let gradients pass through its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._torch import pytree
from .checks import check_argmin, check_flag, check_root
from .closure import Closure, Tracer
from .context import solves
from .has_aux import with_aux
from .hypergrad.base import Hypergrad, PathMethod
from .hypergrad.composite import CompositeStatement
from .hypergrad.differentiate import differentiable_solve, tell_settings
from .hypergrad.implicit import Implicit
from .hypergrad.penalty import Penalty
from .hypergrad.search import Search
from .hypergrad.statement import ObjectiveStatement, ResidualStatement, SymmetricResidualStatement
from .inner.decay import with_decay
from .inner.default import DefaultLBFGS
from .inner.first_look import first_look, hidden_inside, hidden_minimum, hidden_root
from .inner.fixed_point import Anderson
from .inner.minimize import InnerSolver
from .inner.newton_cg import NewtonCG
from .inner.outcome import RANDOM_ADVICE, RANDOM_SYSTEM_ADVICE, is_random, is_random_system, look_closer
from .inner.proximal import look_closer_inside, own_stats_of, prox_of
from .inner.roots import ROOT_ADVICE, Newton, RootSolver
from .problem import Objective, Problem, RootProblem, check_batch, check_init, check_loss, check_residual
from .prox import Prox
from .solution import Solution, Throw, check_throw, hint_of
from .tree import Raveler, Tree, leaves, tree_map

Params = TypeVar("Params")
"""The tree of what is solved for: the value of a solution is one like ``init``."""

COMPOSITE_ADVICE = (
    "The hypergradient holds at a minimum only: raise max_steps, loosen tol, or start closer to the solution"
)


@solves
def argmin(
    objective: Objective,
    init: Params,
    *args: Any,
    solver: InnerSolver | None = None,
    hypergrad: Hypergrad | PathMethod | None = Implicit(),  # noqa: B008 (frozen)
    has_aux: bool = False,
    throw: Throw = "warn",
    warm_start: Solution | None = None,
) -> Solution[Params]:
    """Minimise ``objective(params, *args)`` over ``params``; the solution is differentiable.

    Gradients flow from ``solution.value`` to every tensor that the objective used: captured ones, module
    parameters, non-leaf tensors, ``args``. By ``backward()``, `torch.autograd.grad`, with ``create_graph`` for
    higher derivatives, in forward mode, and under `torch.func.grad`, ``vmap``, ``jvp``, ``jacrev``, ``jacfwd``
    and ``hessian``; also from inside the objective of another `argmin`.

    An objective that returns a scalar is one problem. One that returns a vector ``[T]`` is T independent
    problems (the t-th loss depends on the t-th slice of ``params`` only, as `torch.vmap` gives it); every leaf
    of ``params`` then has T as its first dimension, and step sizes, masks and statistics are per problem.

    Args:
        objective: differentiable twice; written with ``params``, its first argument.
        init: where to start: any tree of floating-point tensors. With `Implicit`, no gradient flows to it.
        args: passed on to the objective.
        solver: `LBFGS` by default, which gives up a network that is far from a minimum (1,000 unknowns and more,
            negative curvature after 50 steps or more, 20 from a warm start), as one that is named does not;
            `GradientDescent`, `NewtonCG`, `TorchOptim`, `ScipyMinimize`, `Steps`; with `ProximalGradient` the minimum
            is that of ``objective + prox.value``.
        hypergrad: `Implicit` by default; `Unroll` and the others of ``docs/methods.md``, of which some give first
            derivatives in reverse mode only, and say so; None: the value is detached.
        has_aux: the objective returns a pair, the loss and anything else: logits, single terms, the updated state of
            a norm. ``solution.aux`` is the latter at the solution, from one more evaluation there, as a function of the
            solution and of the hyperparameters, through which gradients flow. A function under `torch.vmap` may return
            such pairs, too.
        throw: what a failed solve does, here and in the backward pass: ``"raise"`` a `SolveError`, ``"warn"``
            (a `SolveWarning`; non-finite solves still raise; on a GPU of both solves with the backward pass, by one
            look), ``"fallback"`` (retry with `NewtonCG`, where there are no bounds or prox, and MINRES or damped CG,
            then warn), ``"ignore"`` (the stats alone tell).
        warm_start: an earlier solution: its adjoint is the first guess of the next, with its preconditioner, where its
            settings are the same. Methods without an iterative linear solve have no use for it.

    Returns:
        A `Solution` whose value is a tree like ``init``. Its stats have the batch shape: ``num_steps``,
        ``residual_norm`` (norm of the gradient at the solution), ``result``. After a backward pass
        ``solution.adjoint`` tells how the linear solve went.

    Raises:
        TypeError, ValueError: bad input; the message names the argument. A tensor that requires grad and cannot be
            followed is bad input.
        NotImplementedError: a derivative that PyTorch would get wrong (``docs/choosing.md``).
        SolveError: as ``throw`` says.
    """
    check_throw(throw)
    check_argmin(objective, init, solver, hypergrad, warm_start)
    check_flag("has_aux", has_aux)
    if has_aux:
        settings: dict[str, Any] = {"solver": solver, "hypergrad": hypergrad, "throw": throw, "warm_start": warm_start}
        return with_aux(lambda loss: argmin(loss, init, *args, **settings), objective, args, hypergrad is not None)
    solver = DefaultLBFGS() if solver is None else solver
    if isinstance(hypergrad, PathMethod):
        return hypergrad.run(objective, init, args, solver, throw)
    reads_residual = isinstance(hypergrad, Implicit | Penalty) and torch.is_grad_enabled() and throw != "ignore"
    given = objective
    solver, objective = with_decay(solver, objective, init, warn=reads_residual)
    prox = prox_of(solver, init)
    if prox is not None:
        return _composite(objective, init, args, solver, prox, hypergrad, throw, warm_start)

    tell_settings(solver, hypergrad, throw)
    return differentiable_solve(
        ObjectiveStatement,
        objective,
        init,
        args,
        build=lambda tracer: Problem(objective, init, args, tracer=tracer),
        batch_dims_of=_check_loss,
        search=Search.by(
            solver,
            throw,
            "The inner solve",
            fallback=NewtonCG(),
            look=look_closer,
            hides=first_look(given, solver, hidden_minimum),
        ),
        hypergrad=hypergrad,
        minimize=solver.minimize,
        warm_start=warm_start,
    )


def _composite(
    objective: Objective,
    init: Tree,
    args: tuple[Tree, ...],
    solver: InnerSolver,
    prox: Prox,
    hypergrad: Hypergrad | None,
    throw: Throw,
    warm_start: Solution | None,
) -> Solution:
    """``min objective + prox.value``, through the residual of its fixed point."""
    pair = pytree.tree_structure(("y", "step"))

    def reached(params: Tree, *args: Any) -> Tensor:
        """The loss; on its way, everything that objective and prox reach."""
        losses = objective(params, *args)
        check_loss(losses, params)
        prox.prox(Raveler(params, losses.shape).ravel(leaves(params)), torch.ones_like(losses))
        return losses

    def build(tracer: Tracer) -> Problem:
        problem = Problem(objective, init, args, tracer=tracer)
        problem.shrink = prox.prox
        if tracer.differentiable:
            tracer.note(prox.tensors)
            with tracer:
                prox.prox(problem.start.y, torch.ones_like(problem.start.f))
        return problem

    def statement(closure: Closure) -> CompositeStatement:
        shrink = replace(closure, fn=lambda pair, *_: prox.prox(*pair), spec=pair)
        return CompositeStatement(replace(closure, fn=objective), shrink, prox.separable)

    def advice(problem: Problem, found: Solution) -> str:
        return RANDOM_ADVICE if is_random(problem, found) else COMPOSITE_ADVICE

    return differentiable_solve(
        statement,
        reached,
        init,
        args,
        build=build,
        batch_dims_of=_check_loss,
        search=Search(
            solver.minimize,
            throw,
            "The inner solve",
            advice,
            look=partial(look_closer_inside, prox.separable),
            hides=first_look(objective, solver, partial(hidden_inside, prox.separable)),
            own_stats=own_stats_of(solver),
        ),
        hypergrad=hypergrad,
        warm_start=warm_start,
    )


@solves
def root(
    residual: Callable[..., Tree],
    init: Params,
    *args: Any,
    solver: RootSolver | None = None,
    hypergrad: Hypergrad | None = Implicit(),  # noqa: B008 (frozen)
    batched: bool = False,
    symmetric: bool = False,
    has_aux: bool = False,
    throw: Throw = "warn",
    warm_start: Solution | None = None,
) -> Solution[Params]:
    """Solve ``residual(y, *args) = 0`` for ``y``; the solution is differentiable, as that of `argmin`.

    For square systems of any kind, symmetric or not: optimality conditions, equilibria, implicit layers. The
    backward pass solves ``J^T u = df/dy`` with ``J = d_y residual``, by `GMRES` unless told otherwise.

    Args:
        residual: returns a tree of the structure and shapes of ``init``.
        solver: `Newton` by default; `ScipyRoot`.
        batched: the first dimension of every leaf counts T independent problems, each with its own stopping; the
            t-th residual then depends on the t-th unknowns only.
        symmetric: the Jacobian is symmetric, as that of a gradient is: `CG`, `MINRES` and `Cholesky` may be used. The
            first solve of a function looks whether it is.
        has_aux: ``residual`` returns a pair, of which the second part becomes ``solution.aux``, as in `argmin`.
        init, args, hypergrad, throw, warm_start: as in `argmin`; ``throw="fallback"`` retries the adjoint solve.

    Returns:
        As `argmin`; ``stats["residual_norm"]`` is ``||residual||`` at the solution.
    """
    check_root("residual", residual, init, solver, hypergrad, warm_start)
    check_flag("symmetric", symmetric)
    check_flag("has_aux", has_aux)
    if has_aux:
        settings: dict[str, Any] = {"solver": solver, "hypergrad": hypergrad, "throw": throw, "warm_start": warm_start}
        settings |= {"batched": batched, "symmetric": symmetric}
        return with_aux(lambda first: root(first, init, *args, **settings), residual, args, hypergrad is not None)
    kind = SymmetricResidualStatement if symmetric else ResidualStatement
    return _root(kind, residual, residual, init, args, solver or Newton(), hypergrad, batched, throw, warm_start)


@solves
def fixed_point(
    map: Callable[..., Tree],
    init: Params,
    *args: Any,
    solver: RootSolver | None = None,
    hypergrad: Hypergrad | None = Implicit(),  # noqa: B008 (frozen)
    batched: bool = False,
    has_aux: bool = False,
    throw: Throw = "warn",
    warm_start: Solution | None = None,
) -> Solution[Params]:
    """Solve ``y = map(y, *args)``; the solution is differentiable, and memory does not grow with the iterations.

    For equilibrium models, contractions and solvers that are iterations themselves. The backward pass solves
    ``(I - d_y map)^T u = df/dy``: by `GMRES`, or ``Implicit(Neumann(alpha=1.0))``, the fixed-point adjoint of
    Grazzi et al. (2020), which converges where the map contracts.

    Args:
        map: returns a tree of the structure and shapes of ``init``.
        solver: `Anderson` by default; `Picard`, and every solver of `root`.
        init, args, hypergrad, batched, has_aux, throw, warm_start: as in `root`.

    Returns:
        As `root`; ``stats["residual_norm"]`` is ``||y - map(y)||``.
    """
    check_root("map", map, init, solver, hypergrad, warm_start)
    check_flag("has_aux", has_aux)
    if has_aux:
        settings: dict[str, Any] = {"solver": solver, "hypergrad": hypergrad, "throw": throw, "warm_start": warm_start}
        settings |= {"batched": batched}
        return with_aux(lambda first: fixed_point(first, init, *args, **settings), map, args, hypergrad is not None)

    def residual(y: Tree, *args: Any) -> Tree:
        found = map(y, *args)
        check_residual(found, y, "map")
        return tree_map(torch.sub, y, found)

    solver = solver or Anderson()
    return _root(ResidualStatement, residual, map, init, args, solver, hypergrad, batched, throw, warm_start)


def _root(
    kind: type[ResidualStatement],
    residual: Callable[..., Tree],
    given: Callable[..., Tree],
    init: Tree,
    args: tuple[Tree, ...],
    solver: RootSolver,
    hypergrad: Hypergrad | None,
    batched: bool,
    throw: Throw,
    warm_start: Solution | None,
) -> Solution:
    check_throw(throw)
    check_flag("batched", batched)
    check_init(init)
    if isinstance(hypergrad, PathMethod):
        raise NotImplementedError(
            f"{type(hypergrad).__name__} differentiates the path of argmin's solvers; those of root and fixed_point "
            "have none that it could follow. Take Implicit, or iterate the map in your own loop: autograd follows it."
        )

    tell_settings(solver, hypergrad, throw)
    own_advice = getattr(solver, "advice", ROOT_ADVICE)

    def advice(problem: RootProblem, found: Solution) -> str:
        if is_random_system(problem, found):
            return RANDOM_SYSTEM_ADVICE
        return hint_of(found.result, partial(own_advice, problem, found) if callable(own_advice) else own_advice)

    return differentiable_solve(
        kind,
        residual,
        init,
        args,
        build=lambda tracer: RootProblem(residual, init, args, batch_dims=int(batched), tracer=tracer),
        batch_dims_of=lambda _, init: len(check_batch(init, int(batched))),
        search=Search(
            solver.find,
            throw,
            "The solve of the system",
            advice,
            hides=first_look(given, solver, partial(hidden_root, kind.symmetric)),
        ),
        hypergrad=hypergrad,
        warm_start=warm_start,
    )


def _check_loss(loss: Tensor, init: Tree) -> int:
    check_loss(loss, init)
    return loss.dim()
