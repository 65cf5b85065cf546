"""`argmin`: solve an inner problem, and let gradients pass through its solution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .hypergrad.implicit import Implicit
from .hypergrad.unroll import Unroll
from .inner.gradient_descent import GradientDescent
from .inner.lbfgs import LBFGS
from .inner.minimize import InnerSolver
from .inner.newton_cg import NewtonCG
from .linalg.curvature import hessian
from .problem import Linearization, Objective, Problem, graph_nodes
from .solution import Result, Solution, Throw, make_codes, settle
from .tree import Tree, norm

INNER_ADVICE = (
    "The hypergradient holds at a minimum only: raise max_steps, lower the step size, loosen gtol, or take "
    "LBFGS or NewtonCG (throw='fallback' does that)"
)
ADJOINT_ADVICE = (
    "The hypergradient is inexact: raise max_steps, loosen rtol, give CG a preconditioner; for negative "
    "curvature take MINRES, a stronger regularizer, or Implicit(damping=...) (throw='fallback' tries these)"
)


def argmin(
    objective: Objective,
    init: Tree,
    *args: Any,
    solver: InnerSolver | None = None,
    hypergrad: Implicit | Unroll | None = Implicit(),  # noqa: B008 (frozen)
    throw: Throw = "warn",
) -> Solution:
    """Minimise ``objective(params, *args)`` over ``params``; the solution is differentiable.

    Gradients flow from ``solution.value`` to every tensor that the objective used: captured ones, module
    parameters, non-leaf tensors, ``args``. First derivatives by ``backward()`` or `torch.autograd.grad`; a
    second derivative is refused with `NotImplementedError`.

    An objective that returns a scalar is one problem. One that returns a vector ``[T]`` is T independent
    problems (the t-th loss depends on the t-th slice of ``params`` only, as `torch.vmap` gives it); every leaf
    of ``params`` then has T as its first dimension, and step sizes, masks and statistics are per problem.

    Args:
        objective: differentiable twice; written with ``params``, its first argument.
        init: where to start: any tree of floating-point tensors. With `Implicit`, no gradient flows to it.
        args: passed on to the objective.
        solver: `LBFGS` by default; `GradientDescent`, `NewtonCG`, `TorchOptim`, `ScipyMinimize`.
        hypergrad: `Implicit` or `Unroll`; None: the value is detached.
        throw: what a failed solve does, here and in the backward pass: ``"raise"`` a `SolveError`, ``"warn"``
            (a `SolveWarning`; non-finite solves still raise), ``"fallback"`` (retry with `NewtonCG`, and MINRES
            or damped CG, then warn), ``"ignore"`` (the stats alone tell).

    Returns:
        A `Solution` whose value is a tree like ``init``. Its stats have the batch shape: ``num_steps``,
        ``residual_norm`` (norm of the gradient at the solution), ``result``. After a backward pass
        ``solution.adjoint`` tells how the linear solve went.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
        SolveError: as ``throw`` says.
    """
    if throw not in ("raise", "warn", "fallback", "ignore"):
        raise ValueError(f"throw is {throw!r}: it is 'raise', 'warn', 'fallback' or 'ignore'.")
    solver = LBFGS() if solver is None else solver
    if isinstance(hypergrad, Unroll):
        return _unrolled(objective, init, args, solver, throw)
    problem = Problem(objective, init, args)
    create_graph = hypergrad is not None and torch.is_grad_enabled()
    found, at = _measure(problem, solver.minimize(problem), create_graph)
    if throw == "fallback" and not found.result.ok:
        found, at = _measure(problem, NewtonCG().minimize(problem), create_graph)
        found.recovered = ("NewtonCG",)
    settle(found, throw, "The inner solve", INNER_ADVICE)
    if hypergrad is None or not create_graph or not _reaches_others(at):
        found.value = problem.raveler.unflatten(problem.raveler.unravel(found.value))
        return found
    return _attach(problem, at, found, hypergrad, throw)


def _measure(problem: Problem, found: Solution, create_graph: bool) -> tuple[Solution, Linearization]:
    """The gradient at what the solver found, with its graph; its norm joins the stats."""
    at = problem.linearize(found.value, create_graph=create_graph)
    size = norm(problem.raveler.ravel([residual.detach() for residual in at.residual]))
    codes = found.stats["result"]
    bad = ~(torch.isfinite(size) & torch.isfinite(at.loss.detach()))
    found.stats["result"] = torch.where(bad, make_codes(Result.NONFINITE, codes), codes)
    found.stats["residual_norm"] = size
    return found, at


def _attach(problem: Problem, at: Linearization, found: Solution, hypergrad: Implicit, throw: Throw) -> Solution:
    """Make the value differentiable: its backward pass solves the adjoint system and feeds the residual."""
    raveler, cell = problem.raveler, found.adjoint_cell

    def adjoint(grads: Sequence[Tensor]) -> list[Tensor]:
        operator = hessian(problem, at, hypergrad.hessian)
        b = raveler.ravel(grads)
        solved = hypergrad.solve(operator, b)
        if throw == "fallback" and not solved.result.ok:
            solved = hypergrad.recover(operator, b, solved)
        u = raveler.unravel(solved.value)
        cell.solution = dataclasses.replace(solved, value=raveler.unflatten(u))
        settle(solved, throw, "The adjoint solve of the hypergradient", ADJOINT_ADVICE)
        return u

    for leaf in at.leaves:
        # backward() without inputs= would keep a gradient here that nobody reads.
        leaf.register_post_accumulate_grad_hook(_drop_grad)
    value = _ImplicitSolution.apply(adjoint, *raveler.unravel(found.value), *at.residual)
    found.value = raveler.unflatten(value)
    return found


class _ImplicitSolution(torch.autograd.Function):
    """Identity on the solution forward; backward, the cotangent g becomes -H^{-1} g on the residual."""

    @staticmethod
    def forward(ctx: Any, adjoint: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        value = tensors[: len(tensors) // 2]
        ctx.adjoint = adjoint
        return tuple(leaf.clone() for leaf in value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "A second derivative through argmin was asked for (create_graph=True): it would have to "
                "differentiate the linear solve, which is not supported, and would otherwise be silently wrong. "
                "Use hypergrad=Unroll() with GradientDescent, or a first-order outer optimizer."
            )
        u = ctx.adjoint(grads)
        return (None, *[None] * len(u), *[-part for part in u])


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None


def _reaches_others(at: Linearization) -> bool:
    """Whether the residual depends on any tensor besides the solution: if not, there is no hypergradient."""
    own = {id(leaf) for leaf in at.leaves}
    variables = (getattr(node, "variable", None) for node in graph_nodes(at.residual))
    return any(variable is not None and id(variable) not in own for variable in variables)


def _unrolled(objective: Objective, init: Tree, args: tuple[Any, ...], solver: InnerSolver, throw: Throw) -> Solution:
    """Let the graph of the solver's own steps be the derivative."""
    if not isinstance(solver, GradientDescent) or solver.line_search:
        raise TypeError(
            f"hypergrad=Unroll() cannot differentiate {solver!r}: it needs GradientDescent without line_search. "
            "Every solver works with hypergrad=Implicit()."
        )
    differentiable = torch.is_grad_enabled()
    problem = Problem(objective, init, args, differentiable=differentiable)
    found = solver.minimize(problem)
    found, _ = _measure(problem, found, create_graph=False)
    settle(found, throw, "The inner solve", INNER_ADVICE)
    found.value = problem.raveler.unflatten(problem.raveler.unravel(found.value))
    return found
