"""Fixed-point iterations ``y = T(y)``, seen as the residual ``y - T(y)``: Picard, and Anderson's acceleration."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.jacobian import GraphJacobian
from ..linalg.solve import normalise
from ..problem import RootProblem
from ..recording import recording
from ..solution import Result, Solution, marked
from ..tree import norm
from .minimize import check_tolerance
from .nearness import STILL, Nearness
from .roots import ROOT_ADVICE, RootProgress
from .watch import Callbacks, watch

HIDDEN = 8
"""Units of rounding of the unknowns, below which a change of the residual says nothing."""

ADVICE = {
    None: ROOT_ADVICE,
    Result.INACCURATE: (
        "The map moves the unknowns by little more than their rounding, so that it hardly tells how far the fixed "
        "point is: take float64, a map of larger steps, or Newton(), or give a tol if this accuracy is enough"
    ),
}
"""What a message about a failed solve says, by its result."""

STRETCHES = 10
"""Steps over which the slowest contraction that was seen tells the distance to the fixed point."""


@dataclass(frozen=True)
class Picard:
    """``y <- y - damping (y - T(y))``: converges where T is a contraction, at the rate of its constant.

    Args:
        damping: in (0, 1]; 1 is the plain iteration, less helps maps that oscillate.
        max_steps: steps at most.
        tol: stop a problem at this norm of ``y - T(y)``; None: where the distance to the fixed point, as the
            contraction of the last step predicts it, is at most 1e-9 (float64) or 3e-5 (float32) times ``||y||``.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    damping: float = 1.0
    max_steps: int = 1000
    tol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)
    advice: ClassVar[Mapping[Result | None, str]] = ADVICE

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)
        check_damping(self.damping)

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Iterate; see `RootSolver`."""
        plain = Anderson(
            history=0, damping=self.damping, max_steps=self.max_steps, tol=self.tol, callback=self.callback
        )
        return plain.find(problem)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (1965; Walker and Ni 2011), batched. The default of `fixed_point`.

    The next point mixes the last ``history`` ones with the weights that make the residual smallest: for linear
    maps it is GMRES. A problem whose residual blows up restarts its memory from the plain iteration.

    Args:
        history: differences kept, two vectors each.
        damping: in (0, 1], of the residual that is added.
        ridge: regularization of the least-squares weights, relative to the size of the residual differences.
        max_steps: steps at most, one evaluation of the map each.
        tol, callback: as in `Picard`.
    """

    history: int = 5
    damping: float = 1.0
    ridge: float = 1e-10
    max_steps: int = 500
    tol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)
    advice: ClassVar[Mapping[Result | None, str]] = ADVICE

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)
        check_damping(self.damping)
        if self.history < 0:
            raise ValueError(f"history is {self.history}: it cannot be negative.")
        if not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}: it cannot be negative.")

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Iterate; see `RootSolver`."""
        y, r = problem.y, problem.r
        progress = RootProgress.begin(r, self.tol)
        nearness = Nearness(y, problem.raveler.coarsest) if self.tol is None else None
        if nearness is not None:
            # No contraction was seen yet: a short residual may be that of a map that hardly moves.
            progress.end(nearness.look(norm(r), y, settled=(r == 0).all(-1)), Result.CONVERGED)
        longest = r.abs()
        start = norm(r) + norm(y)
        steps_back: list[Tensor] = []
        changes: list[Tensor] = []
        stretches: deque[Tensor] = deque(maxlen=STRETCHES)
        unseen = torch.zeros_like(progress.active)
        told = watch(self, problem)
        for step in range(self.max_steps + 1):
            if told is not None and told(step, y, r, None, progress.active):
                progress.stop()
            if step == self.max_steps or progress.done(step):
                break
            move = -self.damping * r
            if changes:
                move = move - self._mixed(r, torch.stack(steps_back, -1), torch.stack(changes, -1))
            keep = progress.active.unsqueeze(-1)
            new_y = torch.where(keep, y + move, y)
            new_r = torch.where(keep, problem.evaluate(new_y), r)
            # Where the mixture left the domain of T, the problem goes on from where it was, by the plain iteration.
            lost = ~torch.isfinite(norm(new_r))
            mixed = torch.stack(changes, -1).abs().amax((-2, -1)) > 0 if changes else torch.zeros_like(lost)
            back = (lost & mixed).unsqueeze(-1)
            new_y, new_r = torch.where(back, y, new_y), torch.where(back, r, new_r)
            if self.history:
                # A problem that got worse forgets: its differences count as zero and get no weight.
                worse = back | (norm(new_r) > 10 * norm(r)).unsqueeze(-1)
                steps_back, changes = (
                    [torch.where(worse, torch.zeros_like(d), d) for d in kept] for kept in (steps_back, changes)
                )
                steps_back = [*steps_back, new_y - y][-self.history :]
                changes = [*changes, new_r - r][-self.history :]
            # r is the distance to the fixed point where T forgets its argument; where it contracts by q, 1 - q of it.
            # One step sees the contraction along itself only: the worst of some counts.
            change = norm(new_r - r)
            stretches.append((norm(new_y - y) / change).nan_to_num(1.0, 1.0).clamp_min(1.0))
            stretch = torch.stack(list(stretches)).amax(0)
            unseen = torch.where(progress.active, change <= HIDDEN * torch.finfo(r.dtype).eps * norm(y), unseen)
            y, r = new_y, new_r
            progress.count()
            progress.look(norm(r))
            if nearness is not None:
                longest = torch.maximum(longest, r.abs())
                bound = 0.1 * nearness.goal.promised * torch.maximum(longest, STILL * y.abs())
                settled = nearness.settled(r, y, bound)
                progress.end(nearness.look(stretch * norm(r), y, settled=settled), Result.CONVERGED)
            progress.end(norm(r) > 1e8 * start, Result.DIVERGED)
        if nearness is None:
            return progress.solution(y)
        found = progress.solution(y, step_norm=nearness.predicted)
        converged = found.stats["result"] == int(Result.CONVERGED)
        return _looked_closer(problem, found, r, converged & unseen & (norm(r) > 0), nearness.goal.promised)

    def _mixed(self, r: Tensor, steps_back: Tensor, changes: Tensor) -> Tensor:
        """What the weights ``argmin ||r - changes w||`` take off the plain step; ``[*batch, n]``."""
        f, g = changes.double(), r.double().unsqueeze(-1)
        gram = f.mT @ f
        size = torch.diagonal(gram, dim1=-2, dim2=-1)
        # Unit diagonal first: differences shrink by orders of magnitude along the iteration.
        length = torch.where(size > 0, size, torch.ones_like(size)).sqrt()
        unit = gram / (length.unsqueeze(-1) * length.unsqueeze(-2))
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        empty = torch.diag_embed((size == 0).to(gram.dtype))
        weights, _ = torch.linalg.solve_ex(unit + self.ridge * eye + empty, (f.mT @ g) / length.unsqueeze(-1))
        weights = torch.nan_to_num(weights / length.unsqueeze(-1), 0, 0, 0)
        return ((steps_back - self.damping * changes).double() @ weights).squeeze(-1).to(r.dtype)


def _looked_closer(
    problem: RootProblem, found: Solution[Tensor], r: Tensor, unsure: Tensor, promised: float
) -> Solution[Tensor]:
    """The distance by a product with the derivative of the map, where rounding hid how much it contracts.

    A map of short steps, such as one of gradient descent, hardly changes its residual from one point to the next.
    """
    if recording() or not bool(unsure.any()):
        return found
    unit, _ = normalise(r)
    with contextlib.suppress(RuntimeError):  # the map has no derivative: nothing more can be seen of it
        product = GraphJacobian(problem.raveler, problem.linearize(found.value)).rmatvec(unit)
        distance = norm(r) * (1 / norm(product)).nan_to_num(torch.inf).clamp_min(1.0)
        step_norm = torch.where(unsure, torch.maximum(distance, found.stats["step_norm"]), found.stats["step_norm"])
        far = unsure & (step_norm > promised * norm(found.value))
        return found.with_stats(step_norm=step_norm, result=marked(found.stats["result"], far, Result.INACCURATE))
    return found


def check_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}: it lies in (0, 1].")
