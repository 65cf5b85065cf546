"""Linear solves differentiated by themselves: by their adjoint system, not through the steps of an algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch import FunctionContext
from ..closure import in_transform, is_dual
from ..solution import Solution, settle
from .operator import Operator

if TYPE_CHECKING:
    from .solve import LinearSolver, LinearState

ADVICE = "Its gradient is inexact: raise max_steps, loosen rtol, or take another solver (LU for small systems)"


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative may be asked for through one of these."""
    return any((tensor.requires_grad and torch.is_grad_enabled()) or is_dual(tensor) for tensor in tensors)


def by_adjoint(solver: LinearSolver, operator: Operator, b: Tensor, state: LinearState | None) -> Solution[Tensor]:
    """Solve ``A x = b`` without a graph; ``A^T u = g`` gives the gradients of b and of what ``A`` captured.

    The derivative of the steps themselves is another one: it does not converge as they do, and it is lost where SciPy
    makes them.

    Raises:
        NotImplementedError: under `torch.func`, or in forward mode.
    """
    if in_transform() or is_dual(b):
        raise NotImplementedError(
            f"{type(solver).__name__}.solve was called under torch.func or in forward mode: by itself it has first "
            "derivatives in reverse mode only. bilevel.root with a linear residual, and the solve functions of "
            "bilevel.compat, have all of them."
        )
    with torch.no_grad():
        found = solver.solve(operator, b.detach(), state)
    residual = b - operator.matvec(found.value)  # about zero; it carries the gradients
    if is_dual(residual):
        raise NotImplementedError("A linear solver was given an operator of dual numbers: see bilevel.root.")
    return found.with_value(_Solved.apply(residual, found.value, solver, operator))


class _Solved(torch.autograd.Function):
    """``x + A^{-1} r`` at ``r = 0``."""

    @staticmethod
    def forward(ctx: FunctionContext, residual: Tensor, x: Tensor, solver: LinearSolver, operator: Operator) -> Tensor:
        ctx.solver, ctx.operator = solver, operator
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"A second derivative (create_graph=True) was asked for through {type(ctx.solver).__name__}.solve, "
                "which has first ones by itself. bilevel.root with a linear residual has all of them."
            )
        solved = ctx.solver.solve(ctx.operator.T, grads[0])
        settle(solved, "warn", "The adjoint solve of a linear solve", ADVICE)
        return solved.value, None, None, None
