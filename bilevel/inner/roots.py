"""Solvers of square systems ``r(y) = 0``: Newton-Krylov with a line search, and SciPy's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from .._torch import innermost, shown
from ..checks import check_fields, check_linear_solver, check_number_or_tensor
from ..linalg.direct import LU
from ..linalg.gmres import GMRES
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import to_numpy
from ..linalg.solve import LinearSolver
from ..problem import RootProblem
from ..solution import Result, Solution, make_codes, marked
from ..tree import axpy, broadcasts_to, norm, on_host
from .minimize import Ends, check_tolerance
from .nearness import VANISHED, Nearness
from .outcome import COUPLED_ADVICE, is_coupled
from .watch import Callbacks, watch


class RootSolver(Protocol):
    """Finds a root of a `RootProblem`. Frozen settings only: the same object twice gives the same answer."""

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """The solution's ``value`` is flat, ``[*batch, n]``; its stats lack what `root` measures at the end."""
        ...


@dataclass
class RootProgress(Ends):
    """The stopping rule of root solvers, problem by problem; without a tolerance only a residual of zero ends it."""

    tol: float | None

    @classmethod
    def begin(cls, r: Tensor, tol: float | None) -> RootProgress:
        size = norm(r)
        codes = make_codes(Result.MAX_STEPS, size)
        progress = cls(codes, torch.zeros_like(codes, dtype=torch.int64), torch.ones_like(codes, dtype=torch.bool), tol)
        progress.look(size)
        return progress

    def look(self, size: Tensor) -> None:
        """End the problems whose residual norm is small enough, or not finite."""
        self.end(size <= (self.tol or 0.0), Result.CONVERGED)
        self.end(~torch.isfinite(size), Result.NONFINITE)


@dataclass(frozen=True)
class Newton:
    """Newton's method with a backtracking line search on ``||r||``. The default of `root`.

    Each step solves ``J d = -r`` by Jacobian products; quadratic convergence near a regular root. T problems have
    each its own step size and stopping.

    Args:
        linear_solver: for ``J d = -r``; None: `LU` up to 512 unknowns, `GMRES` beyond.
        max_steps: Newton steps at most.
        tol: stop a problem at this residual norm; None: where the next step is at most 1e-9 (float64) or 3e-5
            (float32) times the norm of the unknowns, and in each of them nothing beside the last step, so that neither
            their units and origins nor that of the residual matter.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    linear_solver: LinearSolver | None = None
    max_steps: int = 100
    tol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_linear_solver(self.linear_solver)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root; see `RootSolver`."""
        y, r = problem.y, problem.r
        progress = RootProgress.begin(r, self.tol)
        nearness = Nearness(y, problem.raveler.coarsest) if self.tol is None else None
        solver = self.linear_solver or (LU() if y.shape[-1] <= 512 else GMRES(rtol=1e-6))
        told, last = watch(self, problem), None
        # The Jacobian changes over a step by about the part that the next one is of it, and over that by its square.
        part = 0.0 if nearness is None else (0.1 * nearness.goal.promised) ** 0.5
        for step in range(self.max_steps + 1):
            going = bool(progress.active.any())
            if going:
                operator = GraphJacobian(problem.raveler, problem.linearize(y))
                wanted = torch.where(progress.active.unsqueeze(-1), -r, torch.zeros_like(r))
                solved, size = solver.solve(operator, wanted), norm(r)
                move = solved.value
                # A singular Jacobian has no step, which is not a short one.
                steps = solved.stats.get("relative_residual", torch.zeros_like(size)) < NO_STEP
                length = torch.where(steps, norm(move), torch.inf)
                if nearness is not None:
                    settled = nearness.settled(move, y, None if last is None else _beside(last, part))
                    progress.end(nearness.look(length, y, settled=settled), Result.CONVERGED)
            if told is not None:
                if told(step, y, r, None, progress.active):
                    progress.stop()
                going = bool(progress.active.any())
            if not going or step == self.max_steps:
                break
            last, before = move, r
            y, r, moved = _backtrack(problem, y, r, move, progress.active)
            progress.count()
            progress.look(norm(r))
            if nearness is not None:
                # The next step is as much smaller as the residual is, where that of each equation is.
                each = (r.abs() <= _beside(before, part)).all(-1)
                arrived = nearness.reached(length * norm(r) / size, y) & each
                progress.end(arrived | (~moved & nearness.acceptable), Result.CONVERGED)
            progress.end(~moved, Result.STAGNATED)
        if nearness is None:
            return progress.solution(y)
        singular = nearness.crawled >= CRAWLED
        progress.mark(singular & (progress.codes <= int(Result.STEPS_DONE)), Result.STAGNATED)
        return progress.solution(y, step_norm=nearness.predicted, singular=singular)

    @staticmethod
    def advice(problem: RootProblem, found: Solution[Tensor]) -> str:
        """What a message about a failed solve says."""
        if problem.raveler.batch_shape and is_coupled(GraphJacobian(problem.raveler, problem.linearize(found.value))):
            return COUPLED_ADVICE
        if bool(found.stats.get("singular", torch.zeros((), device="cpu")).any()):
            return (
                "The last steps were each about a half of the one before, as beside a root where the Jacobian is "
                "singular (a double root, the end of a branch of roots): there the root has no derivative by the "
                "hyperparameters. Look whether two roots meet or the residual only touches zero"
            )
        return ROOT_ADVICE


ROOT_ADVICE = (
    "The hypergradient holds at a solution only: raise max_steps, loosen tol, start closer to the solution, or take "
    "another solver (Newton, Anderson, ScipyRoot)"
)

CRAWLED = 8
"""Steps in a row, short ones that hardly shrink, that a regular root does not have."""


def _beside(last: Tensor, part: float) -> Tensor:
    """What is nothing beside each number of ``[*batch, n]``, or beside the rounding of what the largest is part of."""
    return torch.maximum(part * last.abs(), 2 * torch.finfo(last.dtype).eps * norm(last).unsqueeze(-1))


NO_STEP = 0.5
"""The relative residual of a linear solve that says nothing of where the root is."""


def _backtrack(
    problem: RootProblem, y: Tensor, r: Tensor, direction: Tensor, active: Tensor, max_halvings: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the steps 1, 1/2, 1/4, ... that lowers ``||r||``, for each problem; where none does, none."""
    size = norm(r)
    step, pending = torch.ones_like(size), active.clone()
    best_y, best_r = y, r
    for _ in range(max_halvings):
        trial = axpy(torch.where(pending, step, torch.zeros_like(step)), direction, y)
        trial_r = problem.evaluate(trial)
        better = pending & (norm(trial_r) < (1 - 1e-4 * step) * size)
        where = better.unsqueeze(-1)
        best_y, best_r = torch.where(where, trial, best_y), torch.where(where, trial_r, best_r)
        pending = pending & ~better
        if not bool(pending.any()):
            break
        step = torch.where(pending, step / 2, step)
    return best_y, best_r, active & ~pending


@dataclass(frozen=True)
class ScipyRoot:
    """A method of `scipy.optimize.root`, in float64 on the host; T problems are solved as the one system that they are.

    Args:
        method: ``"hybr"`` and ``"lm"`` (with a dense Jacobian), ``"krylov"``, ``"broyden1"``, ``"anderson"``, ...
        max_steps: iterations (of hybr: evaluations) at most.
        tol: as in `Newton`; whatever SciPy reports, a problem has converged where its residual norm is at most this.
    """

    method: str = "hybr"
    max_steps: int = 1000
    tol: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root; see `RootSolver`."""
        like, method = problem.y, self.method.lower()
        calls = 0

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(x)).to(like.device, like.dtype).view_as(like)

        def residual(x: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return to_numpy(problem.evaluate(tensor(x)))

        def jacobian(x: np.ndarray) -> np.ndarray:
            blocks = GraphJacobian(problem.raveler, problem.linearize(tensor(x))).to_dense()
            flat = blocks.reshape(-1, *blocks.shape[-2:]).double().cpu()
            dense: np.ndarray = torch.block_diag(*flat).numpy()
            return dense

        def solve(start: np.ndarray, tol: float) -> np.ndarray:
            limit = "maxfev" if method in ("hybr", "df-sane") else "maxiter"
            options: dict[str, Any] = (
                {limit: self.max_steps} if dense else {limit: self.max_steps, "fatol": tol / like.numel() ** 0.5}
            )
            try:
                outcome = scipy.optimize.root(
                    residual,
                    start,
                    jac=jacobian if dense else None,
                    method=self.method,
                    tol=1e-14 if dense else None,
                    options=options,
                )
            except (ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
                raise ValueError(f"ScipyRoot({self.method!r}) broke down: {error}. Try Newton().") from error
            return np.asarray(outcome.x)

        dense = method in ("hybr", "lm")
        y, size = like, norm(problem.r)
        done = size <= (self.tol or 0.0)
        for _ in range(1 if dense or self.tol is not None else REFERENCES):
            if bool(done.all()) or calls >= self.max_steps or not bool(torch.isfinite(size).all()):
                break
            y = tensor(solve(to_numpy(y), self.tol or 1e-4 * float(size[~done].max())))
            size = norm(problem.evaluate(y))
            done = size <= self.tol if self.tol is not None else self._arrived(problem, y, size)
        codes = make_codes(Result.MAX_STEPS if calls >= self.max_steps else Result.STAGNATED, size)
        codes = marked(codes, done, Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(size), Result.NONFINITE)
        return Solution(y, {"num_steps": torch.full_like(codes, calls, dtype=torch.int64), "result": codes})

    @staticmethod
    def _arrived(problem: RootProblem, y: Tensor, size: Tensor) -> Tensor:
        """Whether Newton's next step would be small."""
        operator = GraphJacobian(problem.raveler, problem.linearize(y))
        solver = LU() if y.shape[-1] <= 512 else GMRES(rtol=1e-2)
        nearness = Nearness(y, problem.raveler.coarsest)
        return nearness.look(norm(solver.solve(operator, problem.evaluate(y)).value), y) | nearness.near | (size == 0)


@dataclass(frozen=True)
class Bisection:
    """Halve a bracket until it has no inside: for equations of one unknown each that Newton cannot start.

    Each unknown is an equation by itself: the i-th residual depends on the i-th unknown only, as it is elementwise. All
    are halved at once, whatever the batch; the derivative is that of any root.

    Args:
        lower, upper: the first bracket: numbers, or tensors that broadcast to the flat unknowns ``[*batch, n]``. A
            residual without a change of sign in it ends with `Result.STAGNATED`, as does a pole, where the sign changes
            and the residual does not vanish; the message tells which, and ``stats["bracketed"]`` in which problems.
        max_steps: halvings at most; all of float64 takes about 60.
    """

    lower: float | Tensor
    upper: float | Tensor
    max_steps: int = 200

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerance(max_steps=self.max_steps, tol=None)
        check_number_or_tensor("lower", self.lower)
        check_number_or_tensor("upper", self.upper)
        low, high = on_host(self.lower), on_host(self.upper)
        if not bool(innermost(low < high).all()):
            raise ValueError(f"lower is {shown(self.lower)} and upper {shown(self.upper)}: the bracket is empty.")
        if not bool(innermost(torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError(
                f"lower is {shown(self.lower)} and upper {shown(self.upper)}: a bracket without end has no middle. "
                "Give numbers between which the root lies."
            )

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root; see `RootSolver`."""
        low, high = on_host(self.lower), on_host(self.upper)
        for name, bound in (("lower", low), ("upper", high)):
            if not broadcasts_to(bound.shape, problem.y.shape):
                raise ValueError(
                    f"{name} has shape {tuple(bound.shape)}, and the unknowns are vectors of shape "
                    f"{tuple(problem.y.shape)}, flattened and one for each problem: it does not broadcast to them."
                )
        low, high = (bound.to(problem.y).expand_as(problem.y) for bound in (low, high))
        at_low, at_high = problem.evaluate(low), problem.evaluate(high)
        size = torch.maximum(at_low.abs(), at_high.abs())
        bracketed = (at_low.sign() * at_high.sign() <= 0) & torch.isfinite(at_low) & torch.isfinite(at_high)
        steps = torch.zeros(problem.y.shape[:-1], dtype=torch.int64, device=low.device)
        y = torch.where(at_low.abs() <= at_high.abs(), low, high)
        shortest = VANISHED * (high - low)
        for _ in range(self.max_steps):
            middle = low + (high - low) / 2
            inside = bracketed & (middle != low) & (middle != high) & (high - low > shortest)
            if not bool(inside.any()):
                break
            y = torch.where(inside, middle, y)
            r = problem.evaluate(y)
            left = r.sign() == at_low.sign()
            low, high = torch.where(inside & left, middle, low), torch.where(inside & ~left, middle, high)
            steps = steps + inside.any(-1)
        # The end of the bracket that leaves less.
        ends = torch.stack([low, high])
        left_over = torch.stack([problem.evaluate(end).abs() for end in ends])
        y = torch.where(bracketed, torch.where(left_over[0] <= left_over[1], low, high), y)
        # Beside a root the residual is what rounding of the unknown makes of it; beside a pole it grows.
        rounding = 4 * torch.finfo(y.dtype).eps * torch.maximum(low.abs(), high.abs())
        narrow = high - low <= torch.maximum(rounding, shortest)
        vanishes = bracketed & (left_over.amin(0) <= 1e-3 * size) & (narrow | (left_over.amin(0) == 0))
        codes = make_codes(Result.STAGNATED, norm(y))
        codes = marked(codes, (bracketed & ~narrow).any(-1) & bracketed.all(-1), Result.MAX_STEPS)
        codes = marked(codes, vanishes.all(-1), Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(left_over.amin(0)).all(-1), Result.NONFINITE)
        return Solution(y, {"num_steps": steps, "result": codes, "bracketed": bracketed.all(-1)})

    @staticmethod
    def advice(problem: RootProblem, found: Solution[Tensor]) -> str:
        """What a message about a failed solve says in the place of `root`'s own advice."""
        without = ~found.stats["bracketed"]
        if bool(without.any()):
            where = f" in {int(without.sum())} of {without.numel()} problems" if without.dim() else ""
            return (
                f"The residual does not change its sign between lower and upper{where}, so that it need not have a "
                "root there: widen or move the bracket, and look whether there is a root at all"
            )
        if found.result is Result.STAGNATED:
            return "The residual changes its sign without vanishing, as at a pole or a jump: keep it out of the bracket"
        return "The hypergradient holds at a solution only: raise max_steps, or narrow the bracket"


REFERENCES = 5
"""How often SciPy is asked again for a residual of a ten thousandth, where the solution is not near yet."""
