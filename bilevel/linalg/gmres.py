"""Generalised minimal residuals, batched: every problem has its own Krylov space, mask and tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recording import recording
from ..solution import Result, marked
from ..tree import norm
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Stopping, default_rtol, stop_now

SLACK = 1.005
"""Half a percent: the estimate of a cycle and the true residual differ in their last bits."""

TINY = 1e-290
"""Smaller than the norm of any matrix, and not zero."""

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

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        x, r, relative = torch.zeros_like(unit), unit, usable.double()
        codes = marked(stopping.initial_codes(), done, Result.CONVERGED)
        steps, active, taken = torch.zeros_like(length, dtype=torch.int64), usable & ~done, 0
        while taken < stopping.max_steps:
            cycle = min(self.restart, unit.shape[-1], stopping.max_steps - taken)
            space = _Cycle(r, relative, active, stopping.target, cycle)
            for step in range(cycle):
                if stop_now(space.active, taken + step):
                    break
                space.extend(operator)
            taken += space.size
            if not space.size:
                break
            added, made, broken = space.solution()
            steps = steps + made
            new = torch.where(active.unsqueeze(-1), x + added, x)
            residual = unit - operator.matvec(new)
            left = norm(residual)
            better = active & (left < relative)
            stuck = active & ~(left < STUCK * relative)
            x, r = (torch.where(better.unsqueeze(-1), a, b) for a, b in ((new, x), (residual, r)))
            relative = torch.where(broken, torch.nan, torch.where(better, left, relative))
            met = active & (relative <= SLACK * stopping.target)
            stuck = stuck & ~met & ~broken
            active = active & ~met & ~stuck & ~broken & (steps < stopping.max_steps)
            codes = marked(codes, met, Result.CONVERGED)
            codes = marked(codes, broken, Result.NONFINITE)
            codes = marked(codes, stuck & (steps < stopping.max_steps), Result.STAGNATED)
            if taken < stopping.max_steps and not recording() and not bool(active.any()):
                break
        if stopping.ordered:  # as far as the precision goes, which the steps that were ordered went beyond
            codes = marked(codes, relative <= default_rtol(unit.dtype), Result.CONVERGED)
        return Outcome(x, codes, steps, relative)


class _Cycle:
    """The Krylov space of one cycle, ``A V_k = V_{k+1} H`` with H of Hessenberg form, for T problems side by side.

    While it grows, the least squares problem ``min ||b e_1 - H y||`` is known by its residual norm alone: ``b / ||z||``
    with the row z that H annihilates, ``z H = 0`` and ``z_0 = 1``, which grows by one number a step (Ayachour 2003).
    The rotations that make H triangular are functions of z, too: all of them are made at once, at the end.

    Args:
        r: where it starts, ``[*batch, n]``; length: its norm, ``[*batch]`` float64. active: the problems to extend.
        target: the residual norm at which a problem ends, ``[*batch]``. most: directions at most.

    Attributes:
        active: the problems that are not at their end, ``[T]``. size: directions.
    """

    def __init__(self, r: Tensor, length: Tensor, active: Tensor, target: Tensor, most: int):
        self.shape, self.most, self.size = r.shape, most, 0
        count, self.active = active.numel(), active.reshape(-1, 1, 1)
        self.start = torch.where(active, length, 1.0).view(count, 1, 1)
        self.none = r.new_zeros(())
        self.v = torch.where(self.active, r.reshape(count, 1, -1) / self.start.to(r.dtype), self.none)
        self.few, self.largest = 10 * torch.finfo(r.dtype).eps, torch.full_like(self.start, TINY)  # about ||A||
        self.z, self.squares = torch.ones_like(self.start), torch.ones_like(self.start)
        self.limit = (self.start / target.view(count, 1, 1)).square()
        self.kept = r.new_empty(count, min(8, most), r.shape[-1])
        self.made: list[Tensor] = []
        self.parts: list[Tensor] = []  # the numbers of H that are not zero, column by column

    def extend(self, operator: Operator) -> None:
        """One product, orthogonalised twice (it is enough) against the directions."""
        self._keep()
        basis, w = self.kept.narrow(1, 0, self.size), operator.matvec(self.v.view(self.shape)).reshape(self.v.shape)
        self.largest = torch.maximum(self.largest, norm(w).unsqueeze(-1))
        least = self.few * self.largest
        columns = basis.mT
        first = torch.bmm(w, columns)
        w = torch.baddbmm(w, first, basis, alpha=-1)
        second = torch.bmm(w, columns)
        w = torch.baddbmm(w, second, basis, alpha=-1)
        column, height = (first + second).double(), norm(w).unsqueeze(-1)
        safe = torch.maximum(height, least)
        grown = torch.baddbmm(least, self.z, column.mT, beta=0, alpha=-1) / safe
        self.z = torch.cat([self.z, grown], -1)
        self.squares = torch.addcmul(self.squares, grown, grown)
        self.parts += [column, safe]
        self.made.append(self.active)
        # Without height the space is invariant; and NaN is not larger than anything.
        self.active = self.active & (height > least) & (self.squares < self.limit)
        self.v = torch.where(self.active, w / safe.to(w.dtype), self.none)

    def _keep(self) -> None:
        """One direction more, in twice the room where there is none: a copy a few times, not each."""
        room = self.kept.shape[1]
        if self.size == room:
            more = self.kept.new_empty(len(self.kept), min(room, self.most - room), self.kept.shape[2])
            self.kept = torch.cat([self.kept, more], 1)
        self.kept.narrow(1, self.size, 1).copy_(self.v)
        self.size += 1

    def solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the space adds to where it started, ``[*batch, n]``: the least residual in it.

        And ``[*batch]``: the steps that each problem made, and whether one of its products was not finite.
        """
        made, Q = torch.cat(self.made, 1), self._rotations()
        R = (Q @ self._hessenberg()).triu()
        ended = made & ~torch.cat([made[:, 1:], self.active], 1)
        flat = R.diagonal(dim1=1, dim2=2).unsqueeze(-1) <= 1.5 * self.few * self.largest
        used = made & ~(ended & flat)  # a singular problem does not use its last direction
        R = torch.where(used.mT, R, torch.eye(self.size, dtype=R.dtype, device=R.device))
        g = torch.where(used, Q[..., :1] * self.start, 0.0)
        weights = torch.linalg.solve_triangular(R, g, upper=True)
        added = torch.bmm(weights.mT.to(self.kept.dtype), self.kept[:, : self.size])
        broken = made[:, :1] & ~torch.isfinite(self.largest)
        batch = self.shape[:-1]
        return added.view(self.shape), made.sum(1).view(batch), broken.view(batch)

    def _hessenberg(self) -> Tensor:
        """H, ``[T, k + 1, k]``."""
        k = self.size
        column, row = torch.tril_indices(k, k + 1, 1, device=self.z.device)
        flat = self.z.new_zeros(len(self.z), k * (k + 1))
        return flat.index_copy(1, column * (k + 1) + row, torch.cat(self.parts, -1)[:, 0]).view(-1, k, k + 1).mT

    def _rotations(self) -> Tensor:
        """``Q [T, k, k + 1]`` with ``Q H`` triangular.

        The i-th row is orthogonal to the first i + 2 numbers of z and to the rows above. So rounding errors of z do
        no harm to ``Q Q^T = I``, and what of ``Q H`` stands below the diagonal is one.
        """
        size = self.z.square().cumsum(-1).sqrt()
        before, after = size[..., :-1], size[..., 1:]
        lower = (-self.z[..., 1:] / (before * after)).mT * self.z
        return lower.tril() + torch.diag_embed((before / after)[:, 0], 1)[:, :-1]
