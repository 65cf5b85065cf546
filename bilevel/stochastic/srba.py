"""SRBA: SOBA with recursive (SARAH) directions and a full pass now and then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .base import State
from .oracles import Batch
from .schedule import check_count
from .soba import SOBA, Directions


@dataclass(eq=False, repr=False, kw_only=True)
class RecursiveMethod(SOBA):
    """Base of the methods whose directions are those of all the data now and then, and corrected by batches between."""

    _kept = (
        *("adjoint", "inner_old", "adjoint_old", "outer_old"),
        *("inner_direction", "linear_direction", "outer_direction"),
    )

    def _directions(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Directions:
        inner_batch, outer_batch = next(inner), next(outer)
        new = self._plain(now, inner_batch, outer_batch)
        if self.wants_full_batch:
            y, u, x = new.inner, new.linear, new.outer
        else:
            before = {name: now[f"{name}_old"] for name in ("inner", "adjoint", "outer")}
            old = self._plain(before, inner_batch, outer_batch)
            y = now["inner_direction"] + new.inner - old.inner
            u = now["linear_direction"] + new.linear - old.linear
            x = now["outer_direction"] + new.outer - old.outer
        kept = {f"{name}_old": now[name] for name in ("inner", "adjoint", "outer")}
        kept |= {"inner_direction": y, "linear_direction": u, "outer_direction": x}
        return Directions(new.inner_loss, new.outer_loss, y, u, x, kept)


@dataclass(eq=False, repr=False, kw_only=True)
class SRBA(RecursiveMethod):
    """For finite sums where `SABA`'s memory is too large: constant step sizes, near-optimal in gradient evaluations.

        every ``period`` steps, on all the data:   D = D(z)
        between, on one batch b of each loss:      D <- D + D_b(z) - D_b(z_old)

    for each of the three directions D of `SOBA`, with z = (y, u, x). Pass the full data (or a large batch) when
    ``wants_full_batch`` is true.

    Cost: 4 gradients and 2 joint products a step; a full-batch step 2 and 1. Memory: 6 vectors more.

    Args:
        period: steps from one full batch to the next; the paper takes about the number of batches in the data.
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Dagréou, Moreau, Vaiter, Ablin 2024, algorithm 1.
    """

    period: int

    def _check(self) -> None:
        super()._check()
        check_count("period", self.period)

    @property
    def wants_full_batch(self) -> bool:
        """Whether the next step is the first of a period."""
        return self.num_steps % self.period == 0
