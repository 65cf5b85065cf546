"""Generalised minimal residuals, batched: every problem has its own Krylov space, rotations, mask and tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recording import recording
from ..solution import Result, marked
from ..tree import norm, scale
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Stopping, default_rtol, stop_now

SLACK = 1.005
"""Half a percent: the estimate of a cycle and the true residual differ in their last bits."""

STUCK = 0.999
"""The part of the true residual that a cycle which makes progress leaves at most."""


@dataclass(frozen=True)
class GMRES(IterativeSolver):
    """Generalised minimal residuals (Saad and Schultz 1986): any regular matrix, products by ``A`` only.

    The default of `root` and `fixed_point`. The residual never grows. One product a step, and one more for the true
    residual at the end of each cycle of ``restart`` steps, by which alone a problem is judged; the next cycle starts
    from it. Everything stays on the device of b. On a singular system it ends with `Result.STAGNATED` unless the
    solution lies in the Krylov space.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
        restart: directions that are kept before a restart, each a vector of memory for each problem.
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"restart is {self.restart}: at least one direction must be kept.")

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        x, r, relative = torch.zeros_like(unit), unit, usable.double()
        codes = marked(stopping.initial_codes(), done, Result.CONVERGED)
        steps, active, taken = torch.zeros_like(length, dtype=torch.int64), usable & ~done, 0
        while taken < stopping.max_steps:
            cycle = min(self.restart, unit.shape[-1], stopping.max_steps - taken)
            space = _Cycle(r, relative, active)
            for step in range(cycle):
                if stop_now(space.active, taken + step):
                    break
                space.extend(operator, stopping.target)
            taken += space.size
            steps = steps + space.steps
            if not space.size:
                break
            new = torch.where(active.unsqueeze(-1), x + space.solution(), x)
            residual = unit - operator.matvec(new)
            left = norm(residual)
            better = active & (left < relative)
            stuck = active & ~(left < STUCK * relative)
            x, r = (torch.where(better.unsqueeze(-1), a, b) for a, b in ((new, x), (residual, r)))
            relative = torch.where(better, left, relative)
            relative = torch.where(space.broken, torch.full_like(relative, torch.nan), relative)
            met = active & (relative <= SLACK * stopping.target)
            codes = marked(codes, met, Result.CONVERGED)
            codes = marked(codes, space.broken, Result.NONFINITE)
            codes = marked(codes, stuck & ~met & ~space.broken & (steps < stopping.max_steps), Result.STAGNATED)
            active = active & ~met & ~stuck & ~space.broken & (steps < stopping.max_steps)
            if taken < stopping.max_steps and not recording() and not bool(active.any()):
                break
        if stopping.ordered:  # as far as the precision goes, which the steps that were ordered went beyond
            codes = marked(codes, relative <= default_rtol(unit.dtype), Result.CONVERGED)
        return Outcome(x, codes, steps, relative)


class _Cycle:
    """The Krylov space of one cycle, and the rotations that make its Hessenberg matrix triangular.

    Args:
        r: where it starts, ``[*batch, n]``; length: its norm, ``[*batch]`` float64. active: the problems to extend.

    Attributes:
        size: directions. steps: those that each problem made. broken: problems with a product that is not finite.
    """

    def __init__(self, r: Tensor, length: Tensor, active: Tensor):
        self.active, self.size = active, 0
        self.steps, self.broken = torch.zeros_like(active, dtype=torch.int64), torch.zeros_like(active)
        safe = torch.where(active, length, torch.ones_like(length))
        first = torch.where(active.unsqueeze(-1), scale(1 / safe, r), torch.zeros_like(r))
        self.kept = first.unsqueeze(-2)
        self.scale = torch.zeros_like(length)  # about ||A||
        # Q H = R, Q r = g: both grow by a row and a column a step.
        self.rotated = torch.where(active, length, torch.zeros_like(length)).unsqueeze(-1)
        self.Q = torch.ones_like(length)[..., None, None]
        self.columns: list[Tensor] = []

    def extend(self, operator: Operator, target: Tensor) -> None:
        """One product, orthogonalised twice (it is enough) against the directions, and one rotation."""
        k = self.size
        basis = self.kept[..., : k + 1, :]
        v = basis[..., k, :]
        roundoff = torch.finfo(v.dtype).eps
        w = operator.matvec(v)
        stretched = norm(w)
        finite = torch.isfinite(stretched)
        self.broken = self.broken | (self.active & ~finite)
        self.steps = self.steps + self.active
        self.active = self.active & finite
        w = torch.where(self.active.unsqueeze(-1), w, torch.zeros_like(w))
        self.scale = torch.where(self.active, torch.maximum(self.scale, stretched), self.scale)
        column = torch.zeros_like(self.rotated)
        for _ in range(2):
            along = (basis @ w.unsqueeze(-1)).squeeze(-1)
            w = w - (along.unsqueeze(-2) @ basis).squeeze(-2)
            column = column + along.double()
        height = norm(w)
        end = height <= 10 * roundoff * self.scale  # the space is invariant
        height = torch.where(end, torch.zeros_like(height), height)

        column = (self.Q @ column.unsqueeze(-1)).squeeze(-1)
        diagonal = torch.hypot(column[..., k], height)
        singular = self.active & (diagonal <= 10 * roundoff * self.scale)
        used = self.active & ~singular
        safe = torch.where(used, diagonal, torch.ones_like(diagonal))
        cosine = torch.where(used, column[..., k] / safe, torch.ones_like(safe))
        sine = torch.where(used, height / safe, torch.zeros_like(safe))
        above = torch.where(used.unsqueeze(-1), column, torch.zeros_like(column))[..., :k]
        self.columns.append(torch.cat([above, safe.unsqueeze(-1)], -1))
        self._rotate(cosine, sine)
        # A problem that does not use the direction leaves its part of g to the next rotation: none.
        self.rotated[..., k] = torch.where(used, self.rotated[..., k], torch.zeros_like(cosine))
        self.size += 1
        self.active = used & ~end & (self.rotated[..., k + 1].abs() > target)
        unit = scale(torch.where(self.active, 1 / height, torch.zeros_like(height)), w)
        if self.kept.shape[-2] == self.size:  # twice the room: a copy a few times, not each
            self.kept = torch.cat([self.kept, torch.zeros_like(self.kept)], -2)
        self.kept[..., self.size, :] = unit

    def _rotate(self, cosine: Tensor, sine: Tensor) -> None:
        """Grow Q and g by a row, and rotate the last two."""
        k = self.size
        last = self.rotated[..., k]
        self.rotated = torch.cat(
            [self.rotated[..., :k], (cosine * last).unsqueeze(-1), (-sine * last).unsqueeze(-1)], -1
        )
        row, zeros = self.Q[..., k, :], torch.zeros_like(self.Q[..., 0])
        upper = torch.cat([scale(cosine, row), sine.unsqueeze(-1)], -1)
        lower = torch.cat([scale(-sine, row), cosine.unsqueeze(-1)], -1)
        above = torch.cat([self.Q[..., :k, :], zeros[..., :k].unsqueeze(-1)], -1)
        self.Q = torch.cat([above, upper.unsqueeze(-2), lower.unsqueeze(-2)], -2)

    def solution(self) -> Tensor:
        """What the space adds to where it started, ``[*batch, n]``: the least residual in it."""
        size = self.size
        padded = [torch.nn.functional.pad(column, (0, size - column.shape[-1])) for column in self.columns]
        R, g = torch.stack(padded, -1), self.rotated[..., :size].unsqueeze(-1)
        weights = torch.linalg.solve_triangular(R, g, upper=True).mT.to(self.kept.dtype)
        added: Tensor = (weights @ self.kept[..., :size, :]).squeeze(-2)
        return added
