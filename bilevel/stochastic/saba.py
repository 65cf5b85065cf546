"""SABA: SOBA with a SAGA memory of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .base import State, Step
from .oracles import Batch
from .schedule import check_count, check_positive
from .soba import SOBA, Directions
from .state import Layout


@dataclass(eq=False, repr=False, kw_only=True)
class SABA(SOBA):
    """For a data set cut into fixed batches: converges linearly with constant step sizes, without full passes.

    Each of the five quantities of `SOBA` (grad_y g, H u, the cross product; grad_y f, grad_x f) is replaced by its
    SAGA estimate, of batch i of N with weight w_i (its part of the data):

        estimate = mean + N w_i (new - memory_i),    then   memory_i <- new,   mean <- sum_i w_i memory_i

    A batch that was not met yet counts at the mean of those that were, so no first pass over the data is needed.
    Batches must be drawn uniformly, each always with the same examples, and named by their index.

    Cost: as `SOBA`. Memory: 2 n + m numbers for each inner batch and n + m for each outer one, on the device.

    Args:
        inner_batches, outer_batches: how many batches there are, or their sizes where these differ.
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Dagréou, Ablin, Vaiter, Moreau 2022, algorithm 2; SAGA:
    Defazio, Bach, Lacoste-Julien 2014.
    """

    inner_batches: int | Sequence[int]
    outer_batches: int | Sequence[int]

    _fixed_settings = ("inner_batches", "outer_batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights = {
            "inner": _weights("inner_batches", self.inner_batches),
            "outer": _weights("outer_batches", self.outer_batches),
        }
        self._indices = {"inner": 0, "outer": 0}

    def step(
        self,
        inner_batch: Batch = None,
        outer_batch: Batch = None,
        *,
        inner_index: int | None = None,
        outer_index: int | None = None,
    ) -> Step:
        """One step on batch ``inner_index`` of the inner data and ``outer_index`` of the outer data.

        Raises:
            ValueError: an index is missing (there is more than one batch) or out of range.
            SolveError: as `Stochastic.step`.
        """
        self._indices = {
            level: self._check_index(level, index) for level, index in (("inner", inner_index), ("outer", outer_index))
        }
        return super().step(inner_batch, outer_batch)

    def _check_index(self, level: str, index: int | None) -> int:
        count = len(self._weights[level])
        if index is None and count == 1:
            return 0
        if not isinstance(index, Integral) or not 0 <= index < count:
            raise ValueError(
                f"{level}_index is {index}: SABA needs to know which of its {count} batches {level}_batch is "
                f"(0 ... {count - 1})."
            )
        return int(index)

    def _directions(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Directions:
        y, x, u = now["inner"], now["outer"], now["adjoint"]
        g = self._oracles.linearize(y, x, next(inner))
        f = self._oracles.outer_gradients(y, x, next(outer))
        n, m = y.numel(), x.numel()
        inner_part, remember_inner = self._average("inner", torch.cat([g.gradient, *g.products(u)]))
        outer_part, remember_outer = self._average("outer", torch.cat([f.inner, f.outer]))
        # Where the two levels differ in their dtype, the memory is in the wider one.
        gradient, hessian, cross = inner_part.split([n, n, m])
        f_inner, f_outer = outer_part.split([n, m])
        gradient, linear, direction = (
            gradient.to(y.dtype),
            (hessian - f_inner).to(y.dtype),
            (f_outer - cross).to(x.dtype),
        )

        def remember() -> None:
            remember_inner()
            remember_outer()

        return Directions(g.loss, f.loss, gradient, linear, direction, remember=remember)

    def _average(self, level: str, new: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The SAGA estimate, and what brings the memory up to date once the step is known to be finite."""
        weights, index = self._weights[level].to(new), self._indices[level]
        known = f"{level}_rows" in self._memory
        rows = self._memory[f"{level}_rows"] if known else new.new_zeros(len(weights), len(new))
        seen = self._memory[f"{level}_seen"] if known else torch.zeros_like(weights, dtype=torch.bool)
        mean = self._memory[f"{level}_mean"] if known else new.clone()
        old = torch.where(seen[index], rows[index], mean)
        estimate = mean + len(weights) * weights[index] * (new - old)
        now_seen = seen.clone()
        now_seen[index] = True
        parts = weights * now_seen
        if self.num_steps % len(weights) == 0:  # now and then afresh: rounding must not pile up in the mean
            average = (parts @ rows + weights[index] * (new - rows[index])) / parts.sum()
        else:
            average = mean + weights[index] / parts.sum() * (new - old)

        def remember() -> None:
            rows[index] = new
            self._memory.update({f"{level}_rows": rows, f"{level}_seen": now_seen, f"{level}_mean": average})

        return estimate, remember

    def _fixed(self) -> dict[str, Any]:
        sizes = {f"{level}_batches": weights.tolist() for level, weights in self._weights.items()}
        return {**super()._fixed(), **sizes}

    def _tables(self) -> Layout:
        inner, outer = self._oracles.inner, self._oracles.outer
        dtype = torch.promote_types(inner.dtype, outer.dtype)
        widths = {"inner": 2 * inner.size + outer.size, "outer": inner.size + outer.size}
        tables: Layout = {}
        for level, width in widths.items():
            rows = torch.empty(len(self._weights[level]), width, dtype=dtype, device="meta")
            tables |= {f"{level}_rows": rows, f"{level}_seen": rows[:, 0].bool(), f"{level}_mean": rows[0]}
        return tables


def _weights(name: str, batches: int | Sequence[int]) -> Tensor:
    """The part of the data in each batch."""
    sizes = [1] * check_count(name, batches) if isinstance(batches, (int, Integral)) else list(batches)
    if not sizes:
        raise ValueError(f"{name} is empty: give the number of batches, or the size of each.")
    counts = torch.tensor([check_positive(name, size) for size in sizes], dtype=torch.float64, device="cpu")
    return counts / counts.sum()
