"""What all linear solvers share: their protocol, the checks of their settings and their reports."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..solution import Solution
from ..tree import norm
from .operator import Operator


class LinearSolver(Protocol):
    """Solves ``A x = b`` for symmetric A. Frozen settings only: the same object twice gives the same answer."""

    def solve(self, operator: Operator, b: Tensor) -> Solution:
        """``b`` of shape ``[*batch, n]``; the solution's ``value`` has the same shape."""
        ...


def default_rtol(dtype: torch.dtype) -> float:
    """The relative residual asked for where the user names neither a tolerance nor a number of steps."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def check_settings(*, rtol: float | None, atol: float, max_steps: int | None) -> None:
    """Refuse tolerances and limits that mean nothing, naming the argument."""
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}: a relative tolerance lies in [0, 1).")
    if not atol >= 0:
        raise ValueError(f"atol is {atol}: a tolerance cannot be negative.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")


def normalise(b: Tensor) -> tuple[Tensor, Tensor]:
    """``b / ||b||`` and ``||b||`` for each problem, so that tiny losses do not underflow in the dot products.

    A zero or non-finite right-hand side gives zero; its norm tells them apart.
    """
    largest = b.abs().amax(-1)
    usable = torch.isfinite(largest) & (largest > 0)
    factor = torch.where(usable, largest, torch.ones_like(largest)).unsqueeze(-1)
    scaled = torch.where(usable.unsqueeze(-1), b / factor, torch.zeros_like(b))
    length = norm(scaled)
    unit = scaled / torch.where(usable, length, torch.ones_like(length)).unsqueeze(-1).to(b.dtype)
    return unit, torch.where(usable, length * factor.squeeze(-1).double(), largest.double())


def report(value: Tensor, codes: Tensor, steps: Tensor, residual: Tensor, scale: Tensor) -> Solution:
    """A `Solution` whose stats have the batch shape.

    Args:
        residual: ``||b - A x||``. scale: ``||b||``. Both float64.
    """
    relative = torch.where(scale > 0, residual / scale, torch.zeros_like(residual))
    stats = {"num_steps": steps, "residual_norm": residual, "relative_residual": relative, "result": codes}
    return Solution(value, stats)


def relative_tolerance(rtol: float | Tensor, atol: float, scale: Tensor) -> Tensor:
    """``max(rtol, atol / ||b||)`` for each problem: the stopping rule of SciPy, on normalised residuals."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.clamp(atol / safe, min=rtol) if not isinstance(rtol, Tensor) else torch.maximum(rtol, atol / safe)


def stop_now(active: Tensor, step: int) -> bool:
    """Whether no problem is active any more. On a GPU it asks every eighth step only: each is a synchronisation."""
    if active.device.type != "cpu" and step % 8 != 7:
        return False
    return not bool(active.any())
