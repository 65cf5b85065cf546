"""SPABA: SOBA with recursive directions and a full pass by the toss of a coin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..linalg.noise import uniform
from .base import Advance, State
from .neumann import check_seed
from .oracles import Batch
from .schedule import check_positive
from .srba import RecursiveMethod


@dataclass(eq=False, repr=False, kw_only=True)
class SPABA(RecursiveMethod):
    """Like `SRBA`, but whether a step sees all the data is chance (PAGE): optimal in samples, as for one level.

        with probability ``probability``, on all the data:   D = D(z)
        else, on one batch b of each loss:                   D <- D + D_b(z) - D_b(z_old)

    for each of the three directions D of `SOBA`, with z = (y, u, x); the first step sees all the data. Pass the full
    data (or a large batch) when ``wants_full_batch`` is true.

    Cost: 4 gradients and 2 joint products a step; a full-batch step 2 and 1. Memory: 6 vectors more.

    Args:
        probability: of a full batch, in (0, 1]; the paper takes ``b / (n + b)`` for batches of b of n samples.
        seed: of the coin; the same seed, the same steps.
        clip: entries of the adjoint are kept between -clip and clip, as the authors' program does (with 1), since the
            theory needs it bounded; None: they are not.
        linear_lr: step size of the adjoint; ``inner_lr`` by default.

    Other arguments and errors: `Stochastic`. Source: Chu, Xu, Yao, Zhang 2024, algorithm 1.
    """

    probability: float
    seed: int = 0
    clip: float | None = None

    def _check(self) -> None:
        super()._check()
        check_positive("probability", self.probability)
        if self.probability > 1:
            raise ValueError(f"probability is {self.probability}: that of a full batch lies in (0, 1].")
        check_seed(self.seed)
        if self.clip is not None:
            check_positive("clip", self.clip)

    @property
    def wants_full_batch(self) -> bool:
        """Whether the coin of the next step says so."""
        if self.num_steps == 0:
            return True
        host = torch.device("cpu")
        return bool(uniform((), int(self.seed) * 2**32 + self.num_steps, host) < self.probability)

    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        found = super()._advance(now, inner, outer)
        if self.clip is None:
            return found
        return replace(found, state={**found.state, "adjoint": found.state["adjoint"].clamp(-self.clip, self.clip)})
