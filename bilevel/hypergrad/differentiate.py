"""The solution of a problem as a differentiable function of the tensors that the problem reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import pytree, without_saved_tensors_hooks
from ..closure import Closure, Tracer, in_transform
from ..linalg.adjoint import is_differentiated
from ..notices import place_of_user, tell
from ..problem import Posed, Problem
from ..reach import Reach
from ..recording import recording
from ..solution import Solution, Throw
from ..tree import Tree
from .base import Hypergrad
from .call import Call, measured_at_solution
from .functions import solution
from .implicit import Implicit
from .search import Search
from .statement import Statement


def differentiable_solve(
    kind: Callable[[Closure], Statement],
    fn: Callable[..., Any],
    init: Tree,
    args: tuple[Tree, ...],
    *,
    build: Callable[[Tracer], Posed],
    batch_dims_of: Callable[[Tree, Tree], int],
    search: Search[Posed],
    hypergrad: Hypergrad | None,
    minimize: Callable[[Problem], Solution[Tensor]] | None = None,
    warm_start: Solution | None = None,
) -> Solution:
    """Solve a problem, and make its solution a function of every tensor that ``fn`` reached.

    Args:
        kind: makes the statement of a closure. build: the problem at ``init``, traced.
        batch_dims_of: from what ``fn`` returned and ``init`` to the number of leading dimensions that count problems.
        search: how it is solved. minimize: as in `Point`.
    """
    flat, spec = pytree.tree_flatten(init)
    differentiable = hypergrad is not None and torch.is_grad_enabled()
    tracer, problem = Tracer(differentiable), None
    if not in_transform():
        with without_saved_tensors_hooks():
            problem = build(tracer)
        batch_dims = len(problem.raveler.batch_shape)
        if hypergrad is None or not differentiable or not (tracer.captured or hypergrad.reaches_init):
            with without_saved_tensors_hooks():
                found = search(problem, partial(measured_at_solution, problem))
            # detached: a solver whose settings require grad leaves the graph of its last step
            return found.with_value(pytree.tree_unflatten(problem.raveler.unravel(found.value.detach()), spec))
    else:
        start = [leaf.detach() for leaf in flat]
        tracer.know(start)
        tracer.note(args)
        with tracer:
            batch_dims = batch_dims_of(fn(pytree.tree_unflatten(start, spec), *args), init)
    closure = Closure.traced(fn, spec, args, tracer, flat[0].device)
    method = hypergrad or Implicit()
    state = None if warm_start is None or warm_start.adjoint is None else warm_start.adjoint.state
    place = place_of_user()
    call = Call(kind(closure), spec, batch_dims, method, search, problem, minimize, state, place)
    start = flat if method.reaches_init else [leaf.detach() for leaf in flat]
    value, stats = solution(call, start, tracer.resolved)
    plain = call.findings.found
    assert plain is not None
    reach = None
    if hypergrad is None:
        value = [leaf.detach() for leaf in value]
    else:
        flags = call.findings.reached or [True] * len(tracer.captured)
        reached = [tensor for tensor, flag in zip(tracer.captured, flags, strict=True) if flag]
        reach = Reach.of(fn, init, args, reached, method.reaches_init)
        required = not reach.reaches and is_differentiated(*tracer.captured)
        if required and search.throw != "ignore" and not recording():
            used = Reach.of(fn, init, args, tracer.captured, False).listed()
            names = ", ".join(one.name or f"a tensor {tuple(one.shape)}" for one in used)
            tell(DETACHED.format(names=names), UserWarning, kind="detached")
    return Solution(
        pytree.tree_unflatten(value, spec),
        stats,
        plain.recovered,
        plain.state,
        adjoint_cell=call.findings.adjoint_cell,
        reach=reach,
    )


def tell_settings(solver: object, hypergrad: Hypergrad | None, throw: Throw) -> None:
    """Warn of settings of a solver that require grad, where the hypergradient is that of the solution alone."""
    if hypergrad is None or throw == "ignore" or not torch.is_grad_enabled() or recording():
        return
    parts = [solver, getattr(solver, "rule", None)]
    settings = [(f.name, getattr(part, f.name)) for part in parts if is_dataclass(part) for f in fields(part)]
    names = [
        name
        for name, value in settings
        if any(isinstance(one, Tensor) and one.requires_grad for one in (value if type(value) is tuple else [value]))
    ]
    if names:
        tell(
            SETTINGS.format(names=", ".join(names), solver=type(solver).__name__, method=type(hypergrad).__name__),
            UserWarning,
            kind="settings",
        )


SETTINGS = (
    "Settings of {solver} require grad ({names}), and no gradient will arrive there: hypergrad={method}(...) is the "
    "derivative of the solution, which does not depend on how it was found. Take hypergrad=Unroll(), or Truncated(), "
    "with solver=Steps(rule, ...) for the derivative by the settings of the steps; or detach them."
)

DETACHED = (
    "Of {names}, the problem uses the values alone (detach(), .data, .item(), float(), NumPy, or torch.no_grad()), "
    "although gradients are required there: none will arrive, and backward() leaves .grad as it is. Use the tensors "
    "themselves; or pass hypergrad=None where no gradient is wanted."
)
