"""MA-SOBA: SOBA whose hypergradient is a moving average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .base import Advance, State
from .fsla import mixing_at
from .oracles import Batch
from .schedule import StepSize
from .soba import SOBA


@dataclass(eq=False, repr=False, kw_only=True)
class MASOBA(SOBA):
    """`SOBA` with an outer step along an average of the directions so far, which averages their noise away.

        x <- x - outer_lr h
        y <- y - inner_lr D_y,    u <- u - linear_lr D_u
        h <- (1 - mixing) h + mixing D_x

    with the directions D of `SOBA`, all from the point before the step, and ``h`` as the last step left it, zero
    before the first. In the paper ``mixing`` and all step sizes are of one order, that of one over
    the root of the number of steps in all.

    Cost: 2 gradients and 1 joint product a step, as `SOBA`. Memory: a vector of the outer variables more.

    Args:
        mixing: the weight of the fresh direction, in (0, 1]; a number or a function of the step number.
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Chen, Xiao, Balasubramanian 2024 (JMLR 25:151), algorithm 1.
    """

    mixing: StepSize = 0.5

    _kept = ("adjoint", "outer_average")

    def _check(self) -> None:
        super()._check()
        mixing_at(self.mixing, 0)

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        x = now["outer"]
        average = now.get("outer_average", x.new_zeros(x.shape))
        found = super()._advance(now, inner, outer)
        weight, (_, outer_lr) = mixing_at(self.mixing, self.num_steps), self._sizes()
        state = {
            **found.state,
            "outer": x - outer_lr * average,
            "outer_average": (1 - weight) * average + weight * found.outer,
        }
        return replace(found, state=state)
