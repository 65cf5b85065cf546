"""What keeps one bad task from ruining a training: a solve that is worse than none is left out, a leap is shortened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.frame.interruption import stop_if_asked

LEFT_OUT = "left_out"
"""Name in the stats of an adjoint: whether the task is left out, bool ``[T]``."""

LIMIT = 10.0
"""Seen where all goes well: up to 2 with 64 filters, 4 with 8; in a step that ruined a network, hundreds. What lies
between is left to `Clipping`."""


@dataclass(frozen=True)
class Guarded:
    """A linear solver for ``(strength I + H) u = b`` whose answer is zero where that of ``solver`` is worse than zero.

    That is where the relative residual is above 1, that of zero, and ``strength ||u|| > LIMIT ||b||``; a convex loss
    allows no more than ``||b||``. So it is after a few steps of CG along a direction of almost no curvature: then the
    task's part of the meta-gradient is noise times a large number. The residual alone does not tell. That of CG may
    grow for a while where ``u`` comes nearer all the same, and does in every task of the first meta-steps.

    With zero the task adds nothing to the sum of the meta-gradients; the stats say so under `LEFT_OUT`, and keep the
    residual that was found. Nothing here looks at a value.

    Attributes:
        strength: 0-d, lambda; the smallest where there are several.
    """

    solver: Any
    strength: Tensor

    def solve(self, operator: Any, b: Tensor, state: Any = None) -> bl.Solution:
        """``b [*batch, n]``; see the linear solvers of `bilevel`."""
        solved = self.solver.solve(_Stoppable(operator), b, state)
        size = torch.linalg.vector_norm(solved.value, dim=-1)
        gain = self.strength * size / torch.linalg.vector_norm(b, dim=-1)
        # A solver that measures no residual, such as Identity, has NaN there, and is not meant.
        bad = (solved.stats["relative_residual"] > 1) & (gain > LIMIT)
        bad |= (solved.stats["result"] == bl.Result.NONFINITE) | ~torch.isfinite(size)
        value = torch.where(bad.unsqueeze(-1), torch.zeros_like(solved.value), solved.value)
        return replace(solved, value=value, stats={**solved.stats, LEFT_OUT: bad})


class _Stoppable(bl.Operator):
    """The same operator; its products are the longest part of a meta-step, and a signal need not wait for them all."""

    def __init__(self, operator: bl.Operator):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator = operator

    def matvec(self, v: Tensor) -> Tensor:
        stop_if_asked()
        return self.operator.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v)


def guarded(hypergrad: Any, strength: Tensor) -> Any:
    """The same hypergradient, with its linear solver guarded where it is an implicit one."""
    if not isinstance(hypergrad, bl.Implicit):
        return hypergrad
    return replace(hypergrad, linear_solver=Guarded(hypergrad.linear_solver or bl.CG(), strength))


@dataclass
class Clipping:
    """Shortens a meta-gradient to a multiple of the running norm of those before it.

    A norm enters the running one as far as it was let through, so one leap does not open the way for the next.

    Attributes:
        multiple: None: nothing is shortened.
        running: exponential average of the norms, of the last 30 or so; 0 before the first.
    """

    multiple: float | None
    running: float = 0.0

    def factor(self, norm: float) -> float:
        """What to multiply a meta-gradient of this finite norm by, at most 1; it is taken into the running norm."""
        before = self.running or norm
        limit = norm if self.multiple is None else min(norm, self.multiple * before)
        self.running = before + (limit - before) / 30
        return limit / norm if norm > 0 else 1.0


def rescale(gradients: list[Tensor], clipping: Clipping, num_tasks: int, kept: float) -> tuple[float, float]:
    """Make ``sum / num_tasks`` the mean over the tasks that are kept, clipped, in place.

    Returns:
        The norm of the mean, and what clipping multiplied it by.
    """
    if 0 < kept < num_tasks:
        for gradient in gradients:
            gradient.mul_(num_tasks / kept)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).item()
    factor = clipping.factor(norm) if math.isfinite(norm) and kept > 0 else 1.0
    if factor < 1:
        for gradient in gradients:
            gradient.mul_(factor)
    return norm, factor


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was left out and clipped in a training, one sentence each from its records; empty where nothing was."""
    tasks = sum(row.get("left_out", 0) for row in rows)
    at = [row["step"] for row in rows if row.get("left_out")]
    clipped = [row["step"] for row in rows if row.get("clipped")]
    said = []
    if at:
        said.append(
            f"{tasks} tasks were left out of the meta-gradient in {len(at)} meta-steps (the last: {at[-1]}): their "
            "linear solves were worse than none. More than a few: lower --lr or --inner-lr, or raise --strength."
        )
    if clipped:
        said.append(f"The meta-gradient was clipped in {len(clipped)} meta-steps (the last: {clipped[-1]}).")
    return "\n".join(said)
