"""What the sweeps of CG and MINRES over many problems at once carry from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..solution import Result, marked
from .operator import Operator
from .solve import Precondition, Stopping

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class SweepState:
    """Where each problem stands; ``x``, ``r`` are ``[*batch, n]``, the other tensors ``[*batch]``.

    ``size`` is about ``||A||``; ``target`` is that of `Stopping`.
    """

    operator: Operator
    target: Tensor
    precondition: Precondition | None
    x: Tensor
    r: Tensor
    relative: Tensor
    active: Tensor
    steps: Tensor
    codes: Tensor
    size: Tensor

    @classmethod
    def begin(
        cls,
        operator: Operator,
        unit: Tensor,
        length: Tensor,
        stopping: Stopping,
        precondition: Precondition | None = None,
    ) -> Self:
        """At zero; see `IterativeSolver.iterate`."""
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        state = cls(
            operator,
            stopping.target,
            precondition,
            x=unit.new_zeros(()).expand_as(unit),
            r=unit,
            relative=usable.double(),
            active=usable & ~done,
            steps=torch.zeros_like(length, dtype=torch.int64),
            codes=stopping.initial_codes(),
            size=torch.zeros_like(length),
        )
        state.mark(done, Result.CONVERGED)
        return state

    def mark(self, where: Tensor, result: Result) -> None:
        """Give these problems that result."""
        self.codes = marked(self.codes, where, result)

    def preconditioned(self, r: Tensor) -> Tensor:
        """``M^{-1} r``; r itself where there is no preconditioner."""
        return self.precondition(r) if self.precondition else r
