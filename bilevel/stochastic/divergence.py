"""A divergence, told before it overflows, and from bad data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tree import norm
from .oracles import Batch, Oracles

LENGTH = 10
"""Steps of which a divergence consists at least."""
GROWTH = 1e6
"""How much the norm of a direction grows over them."""
STRIDE = 0.5
"""The least length of such a step, as a part of the iterate that it leads to."""
FARTHER = 1e3
"""How much the iterate grows meanwhile, where its steps are shorter."""

NOISE = 0.1
"""How far the norm may fall back on one batch."""


@dataclass(frozen=True)
class Seen:
    """One variable at one step.

    Attributes:
        norm, move, size: the norms of its direction, of its move and of where it led. loss: its loss.
        farness: one plus the size; 0 of a linear system, which may grow for a while, near a saddle of the inner loss.
    """

    norm: float
    move: float
    size: float
    loss: float | None = None
    farness: float = 1.0


@dataclass(frozen=True)
class Run:
    """Steps that grow: the first and the last of them, and their number; a batch that is kinder does not end it.

    Attributes:
        stride: the least length of a step that counts.
    """

    first: Seen
    last: Seen
    length: int = 0
    stride: float = STRIDE

    def after(self, seen: Seen) -> Run:
        """The run with one step more, as it was, or, far below its highest norm, a new one that begins there."""
        if seen.norm > self.last.norm and seen.move >= self.stride * seen.size:
            return replace(self, last=seen, length=self.length + 1)
        return self if seen.norm >= NOISE * self.last.norm else Run(seen, seen, stride=self.stride)

    @property
    def growth(self) -> float:
        return self.last.norm / self.first.norm if self.first.norm > 0 else 0.0

    @property
    def worse(self) -> bool:
        """Whether the loss rose: an escape from a saddle grows as well, but downwards. A linear system has none."""
        return self.first.loss is None or self.last.loss is None or self.last.loss > self.first.loss

    @property
    def diverges(self) -> bool:
        far = self.stride > 0 or self.last.farness > FARTHER * self.first.farness
        return self.length >= LENGTH and self.growth >= GROWTH and self.worse and far


@dataclass(frozen=True)
class Growth:
    """The runs of the variables of a method, by name: of long steps, and of all.

    Where steps are too long, an iterate is thrown across the minimum to a point farther away, again and again: each
    move is as long as the iterate itself, and the direction grows from step to step. Neither holds of a start at zero,
    of a solution that moves, or of one outlying batch, for `LENGTH` steps. Where moves are limited
    (``longest_move``), or are those of a whole inner loop, they are shorter; then the iterate itself has to have grown.
    """

    runs: Mapping[str, tuple[Run, Run]]

    def after(self, seen: Mapping[str, Seen]) -> Growth:
        """What is known after one step more."""
        first = {name: (Run(one, one), Run(one, one, stride=0.0)) for name, one in seen.items()}
        runs = {name: (long.after(seen[name]), all_.after(seen[name])) for name, (long, all_) in self.runs.items()}
        return Growth({**first, **runs})

    @property
    def diverges(self) -> bool:
        return any(run.diverges for both in self.runs.values() for run in both)

    def __str__(self) -> str:
        """The norm that grew most."""
        every = [(name, run) for name, both in self.runs.items() for run in both]
        name, run = max(every, key=lambda item: (item[1].diverges, item[1].stride > 0, item[1].growth))
        return (
            f"the norm of the {name} direction grew from {run.first.norm:.2g} to {run.last.norm:.2g} in {run.length} "
            f"{'long ' if run.stride > 0 else ''}steps"
        )


def complaints(
    oracles: Oracles, y: Tensor, x: Tensor, inner: Sequence[Batch], outer: Sequence[Batch], second: bool
) -> list[str]:
    """What is not finite on these batches at (y, x) shrunk to unit norm: what no shorter step would mend.

    Args:
        inner, outer: the batches of the two losses.
        second: whether the method takes second derivatives.
    """
    y, x = (z / norm(z).clamp_min(1.0).to(z.dtype) for z in (y, x))
    found = []
    for what, gradients, batches in (
        ("inner_loss", oracles.inner_gradients, inner),
        ("outer_loss", oracles.outer_gradients, outer),
    ):
        seen = [gradients(y, x, batch) for batch in batches]
        if not all(bool(torch.isfinite(one.loss)) for one in seen):
            found.append(f"{what} is NaN or infinite on this batch: look at the data, or at a loss that overflows")
        elif not all(_finite(one.inner, one.outer) for one in seen):
            found.append(
                f"the gradient of {what} is NaN or infinite on this batch while the loss is finite: it has no "
                "derivative there (such as a root or a norm at 0)"
            )
    if second and not found:
        at = [oracles.linearize(y, x, batch) for batch in inner]
        if not all(_finite(*one.products(torch.ones_like(y))) for one in at):
            found.append(
                "a second derivative of inner_loss is NaN or infinite on this batch while its gradient is finite: take "
                "a first-order method (F2SA, BOME), or smooth the loss"
            )
    return found


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
