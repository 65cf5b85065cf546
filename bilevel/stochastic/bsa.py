"""BSA: an inner loop and one random term of the Neumann series."""

from __future__ import annotations

from ..tree import Tree
from .neumann import NeumannTerm, check_seed
from .oracles import Loss
from .schedule import StepSize
from .two_loops import NeumannLoops


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
        neumann_lr: at most 1/L, constant; by default the first of ``inner_lr``.
        seed: of the random truncation.

    Other arguments and errors: `Stochastic`. Source: Ghadimi and Wang 2018, algorithms 2 and 3.
    """

    def __init__(
        self,
        inner_params: Tree,
        outer_params: Tree,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        inner_lr: StepSize,
        outer_lr: StepSize,
        num_inner_steps: int = 10,
        num_terms: int = 10,
        neumann_lr: float | None = None,
        seed: int = 0,
    ):
        super().__init__(
            inner_params,
            outer_params,
            inner_loss,
            outer_loss,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            num_inner_steps=num_inner_steps,
            series=NeumannTerm(num_terms, check_seed(seed)),
            neumann_lr=neumann_lr,
        )
