"""BSA: an inner loop and one random term of the Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

from .neumann import NeumannTerm, Series, check_seed
from .two_loops import NeumannLoops


@dataclass(eq=False, repr=False, kw_only=True)
class BSA(NeumannLoops):
    """The oldest stochastic method, a baseline: its random truncation makes it noisy even on full batches.

        y <- y - inner_lr grad_y g(y, x)         ``num_inner_steps`` times
        u = neumann_lr Q prod_{i=1}^{p} (I - neumann_lr H_i) grad_y f(y, x),   p uniform in {0, ..., Q-1}
        x <- x - outer_lr (grad_x f - (d_x grad_y g)^T u),                      Q = ``num_terms``

    Take decreasing step sizes: the noise of u does not vanish at the solution.

    Cost of a step: ``num_inner_steps`` gradients, one outer gradient, on average (``num_terms`` - 1)/2 Hessian
    products, one cross product, and a gradient for each change of batch. Independent inner batches:
    ``num_inner_steps + num_terms + 1`` at most.

    Args:
        neumann_lr: at most 1/L, constant; by default the largest ``inner_lr`` so far, a schedule's first peak.
        seed: of the random truncation.

    Other arguments and errors: `Stochastic`. Source: Ghadimi and Wang 2018, algorithms 2 and 3.
    """

    seed: int = 0

    def _series(self) -> Series:
        return NeumannTerm(self.num_terms, check_seed(self.seed))
