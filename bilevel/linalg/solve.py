"""What all linear solvers share: their protocol, the stopping rule, the state that they carry, their reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..checks import check_fields, check_preconditioner, refuse_mps
from ..recording import free_looks, recording
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm, scale
from .adjoint import by_adjoint, is_differentiated
from .lanczos import Lanczos
from .operator import Operator

Precondition = Callable[[Tensor], Tensor]
"""``r -> M^{-1} r``, an approximate inverse, ``[*batch, n] -> [*batch, n]``."""

Preconditioner = Callable[[Operator], Precondition]
"""Looks at an operator once and returns a `Precondition`."""


@dataclass(frozen=True)
class LinearState:
    """What a later solve can start from; it is returned as ``Solution.state`` and passed back by the user.

    Attributes:
        x0: a first guess ``[*batch, n]``; ignored where zero is the better one, or where shapes differ.
        precondition: built by an earlier solve, and used again instead of building it anew.
        maker: the settings that built it, or the function; others build their own. None: it serves all.
        lanczos: the curvature that the solve saw, where it is a Lanczos process.
    """

    x0: Tensor | None = None
    precondition: Precondition | None = None
    lanczos: Lanczos | None = None
    maker: object = None

    def made_by(self, maker: object) -> bool:
        """Whether these settings built the preconditioner."""
        if self.precondition is None or self.maker is None or self.maker is maker:
            return self.precondition is not None
        try:
            return type(self.maker) is type(maker) and bool(self.maker == maker)
        except (RuntimeError, ValueError):  # tensors or arrays among the settings, that are other objects
            return False

    def fits(self, operator: Operator) -> bool:
        """Whether it is of problems of the same number, size and dtype, as far as it shows."""
        return self.x0 is None or (self.x0.shape == operator.shape[:-1] and self.x0.dtype == operator.dtype)


class LinearSolver(Protocol):
    """Solves ``A x = b``. Frozen settings only: the same object twice gives the same answer."""

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve for ``b`` of shape ``[*batch, n]``, from ``state.x0`` where that is the better start.

        The solution's ``value`` is like ``b``; its ``state`` is a `LinearState`, from which a later solve may start;
        its stats are those of `report`. What is not finite is `Result.NONFINITE`.
        """
        ...


@dataclass(frozen=True)
class Stopping:
    """When a solve ends: ``target`` is the residual norm relative to that at the start, ``[*batch]`` float64.

    ``ordered``: a number of steps was ordered and no tolerance, so making them is no failure.
    """

    target: Tensor
    max_steps: int
    ordered: bool

    def initial_codes(self) -> Tensor:
        return make_codes(Result.STEPS_DONE if self.ordered else Result.MAX_STEPS, self.target)


@dataclass(frozen=True)
class Outcome:
    """What an algorithm made of a normalised right-hand side; ``relative`` is its residual norm.

    ``condition``: a lower bound of the matrix's condition number, ``least``: an upper one of its smallest eigenvalue,
    where the algorithm sees them.
    """

    x: Tensor
    codes: Tensor
    steps: Tensor
    relative: Tensor
    lanczos: Lanczos | None = None
    condition: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True)
class IterativeSolver(ABC):
    """Base of the iterative solvers: tolerances, scaling, warm start and report; a subclass writes `iterate`.

    Args:
        rtol: stop a problem at ``||b - A x|| <= max(rtol ||b||, atol)``. None: 1e-5 (float32), 1e-10 (float64) or four
            rounding errors (half precision) where ``max_steps`` is None as well, else make ``max_steps`` steps, which
            is then no failure.
        atol: absolute part of the tolerance.
        max_steps: limit on the steps; None: ``10 n``, at most 1000.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    symmetric_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_settings(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        check_preconditioner(getattr(self, "preconditioner", None))
        if getattr(self, "restart", 1) < 1:
            raise ValueError(f"restart is {self.restart}: at least one direction must be kept.")  # type: ignore[attr-defined]

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`. Differentiable once in reverse mode, by the adjoint system.

        Gradients flow to b and to what the operator captured.
        """
        refuse_mps("b", b.device)
        if self.symmetric_only:
            require_symmetric(operator, type(self).__name__)
        if is_differentiated(b):
            return by_adjoint(self, operator, b, state)
        kept = None if state is None else state.precondition
        solution = self._solve(operator, b, state)
        if kept is not None and solution.state.precondition is kept and failed(solution):
            # A preconditioner of another problem may do harm.
            return self._solve(operator, b, LinearState(solution.value))
        return solution

    def _solve(self, operator: Operator, b: Tensor, state: LinearState | None) -> Solution[Tensor]:
        x0, r0 = first_guess(operator, b, state)
        unit, length = normalise(r0)
        size = norm(b) if x0 is not None else length
        ordered = self.rtol is None and self.max_steps is not None
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        target = relative_tolerance(torch.finfo(b.dtype).eps if ordered else rtol, self.atol, size)
        if x0 is not None:
            target = target * torch.where(length > 0, size / length, torch.ones_like(size))
        stopping = Stopping(target, self.step_limit(unit), ordered)
        idle = stop_now((length > 0) & (length < torch.inf) & (target < 1), 0)
        precondition = None if idle else self.precondition(operator, state)
        found = self.iterate(operator, unit, length, stopping, precondition)
        if is_differentiated(found.x, found.relative):  # through what the operator captured
            return by_adjoint(self, operator, b, state)
        finite = length < torch.inf
        value = scale(torch.where(finite, length, torch.zeros_like(length)), found.x)
        codes = marked(found.codes, length == 0, Result.CONVERGED)
        codes = marked(codes, ~(finite & (found.relative < torch.inf)), Result.NONFINITE)
        value = value if x0 is None else x0 + value
        kept = LinearState(value, precondition, found.lanczos, getattr(self, "preconditioner", None))
        solution = report(value, codes, found.steps, found.relative * length, size, kept)
        seen = {"condition": found.condition, "least_curvature": found.least}
        return solution.with_stats(**{name: value for name, value in seen.items() if value is not None})

    @abstractmethod
    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        """Solve ``A x = unit`` from zero; ``unit`` has norm one, or zero where ``length`` is zero or not finite."""

    def precondition(self, operator: Operator, state: LinearState | None) -> Precondition | None:
        """The preconditioner of an earlier solve, or a new one; subclasses that take none have none."""
        build: Preconditioner | None = getattr(self, "preconditioner", None)
        if build is None:
            return None
        if state is None or not state.made_by(build) or not state.fits(operator):
            return build(operator)
        return state.precondition

    def step_limit(self, b: Tensor) -> int:
        if self.max_steps is None and recording():
            raise NotImplementedError(f"{type(self).__name__} stops by its tolerance: give it max_steps.")
        return self.max_steps or self.default_steps(b.shape[-1])

    def default_steps(self, size: int) -> int:
        """The limit on the steps of a system of ``size`` unknowns where ``max_steps`` is None."""
        return min(10 * size, 1000)


def require_symmetric(operator: Operator, name: str) -> None:
    if not operator.symmetric:
        raise ValueError(
            f"{name} needs a symmetric matrix, and this {type(operator).__name__} is not one: its answer would be "
            "wrong. Take GMRES, BiCGSTAB, LSMR, NormalCG, Neumann or LU."
        )


def first_guess(operator: Operator, b: Tensor, state: LinearState | None) -> tuple[Tensor | None, Tensor]:
    """The guess, zero where zero is better, and its residual; one product where there is a guess."""
    if state is None or state.x0 is None or not state.fits(operator):
        return None, b
    r0 = b - operator.matvec(state.x0)
    better = (norm(r0) < norm(b)).unsqueeze(-1)
    return torch.where(better, state.x0, torch.zeros_like(b)), torch.where(better, r0, b)


def default_rtol(dtype: torch.dtype) -> float:
    """The relative residual asked for where the user names neither a tolerance nor a number of steps."""
    return 1e-10 if dtype == torch.float64 else max(1e-5, 4 * torch.finfo(dtype).eps)


def check_settings(*, rtol: float | None, atol: float, max_steps: int | None) -> None:
    """Refuse tolerances and limits that mean nothing, naming the argument."""
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}: a relative tolerance lies in [0, 1).")
    if not atol >= 0:
        raise ValueError(f"atol is {atol}: a tolerance cannot be negative.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")


COMPLEX = "linear systems here are real; solve for real and imaginary parts together, torch.view_as_real(b).flatten()"


def normalise(b: Tensor) -> tuple[Tensor, Tensor]:
    """``b / ||b||`` and ``||b||`` for each problem, so that tiny losses do not underflow in the dot products.

    A zero or non-finite right-hand side gives zero; its norm tells them apart.

    Raises:
        TypeError: b is complex.
    """
    if b.is_complex():
        raise TypeError(f"b is {b.dtype}: {COMPLEX}.")
    largest = b.abs().amax(-1)
    usable = (largest > 0) & (largest < torch.inf)
    if free_looks(b) and bool(usable.all()):
        scaled = b / largest.unsqueeze(-1)
        length = norm(scaled)
        return scaled / length.unsqueeze(-1).to(b.dtype), length * largest.double()
    factor = torch.where(usable, largest, torch.ones_like(largest)).unsqueeze(-1)
    scaled = chosen(usable, b / factor, b.new_zeros(()).expand_as(b))
    length = norm(scaled)
    unit = scaled / torch.where(usable, length, torch.ones_like(length)).unsqueeze(-1).to(b.dtype)
    return unit, torch.where(usable, length * factor.squeeze(-1).double(), largest.double())


WORSE = 1 + 1e-4
"""A relative residual above it is worse than that of zero; one of exactly 1 may come out a little larger."""


def failed(solution: Solution) -> bool:
    """Whether a solve did not do what was asked; in a recording nobody can know."""
    return not recording() and not solution.result.ok


def report(
    value: Tensor,
    codes: Tensor,
    steps: Tensor,
    residual: Tensor,
    scale: Tensor,
    state: LinearState | None = None,
) -> Solution[Tensor]:
    """A `Solution` whose stats have the batch shape; an answer that is worse than zero has diverged.

    Args:
        residual: ``||b - A x||``. scale: ``||b||``. Both float64.
        state: what a later solve can start from; None: the value alone.
    """
    relative = torch.where(scale > 0, residual / scale, torch.zeros_like(residual))
    worse = (relative > WORSE) & (codes < int(Result.MAX_STEPS))
    codes = marked(codes, worse, Result.DIVERGED)
    stats = {"num_steps": steps, "residual_norm": residual, "relative_residual": relative, "result": codes}
    return Solution(value, stats, state=state or LinearState(value))


def relative_tolerance(rtol: float | Tensor, atol: float, scale: Tensor) -> Tensor:
    """``max(rtol, atol / ||b||)`` for each problem: the stopping rule of SciPy, on normalised residuals."""
    if atol == 0 and not isinstance(rtol, Tensor):
        return torch.full_like(scale, rtol)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.clamp(atol / safe, min=rtol) if not isinstance(rtol, Tensor) else torch.maximum(rtol, atol / safe)


LOOK_EVERY = 8
"""Steps between two looks at whether all problems have ended, where a look is not free."""


FEW = 4096
"""Numbers that are passed over in less time than a look at a mask takes."""


def chosen(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the problems of a mask, ``old`` in the others, both ``[*batch, n]``.

    Where a look at the mask is free and it is the same everywhere, which is the rule, that is no pass over memory. Few
    numbers are passed over in less time than a look takes.
    """
    if new.numel() > FEW and free_looks(where):
        if bool(where.all()):
            return new
        if not bool(where.any()):
            return old
    return torch.where(where.unsqueeze(-1), new, old)


def stop_now(active: Tensor, step: int) -> bool:
    """Whether no problem is active any more. On a GPU it asks every eighth step only: each is a synchronisation.

    In a recording it cannot ask, and the steps go on to their limit.
    """
    if recording() or (not free_looks(active) and (step == 0 or step % LOOK_EVERY)):
        return False
    return not bool(active.any())
