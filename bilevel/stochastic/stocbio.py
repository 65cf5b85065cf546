"""stocBiO: an inner loop and a truncated Neumann series."""

from __future__ import annotations

from ..tree import Tree
from .neumann import NeumannSum
from .oracles import Loss
from .schedule import StepSize
from .two_loops import NeumannLoops


class StocBiO(NeumannLoops):
    """The classical two-loop method, where nothing but the params may be kept between steps.

        y <- y - inner_lr grad_y g(y, x)         ``num_inner_steps`` times
        u = neumann_lr sum_{q=0}^{Q} prod_{i=1}^{q} (I - neumann_lr H_i) grad_y f(y, x),   Q = ``num_terms``
        x <- x - outer_lr (grad_x f - (d_x grad_y g)^T u)

    The series has the bias (1 - neumann_lr mu)^(Q+1) and diverges for ``neumann_lr`` above 2/L; `AmIGO` has none.

    Cost of a step: ``num_inner_steps`` gradients, one outer gradient, ``num_terms`` Hessian products, one cross
    product, and a gradient for each change of batch. Independent inner batches: ``num_inner_steps + num_terms + 1``.

    Args:
        neumann_lr: at most 1/L, constant; by default the first of ``inner_lr``.

    Other arguments and errors: `Stochastic`. Source: Ji, Yang, Liang 2021, algorithm 2.
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
    ):
        super().__init__(
            inner_params,
            outer_params,
            inner_loss,
            outer_loss,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            num_inner_steps=num_inner_steps,
            series=NeumannSum(num_terms),
            neumann_lr=neumann_lr,
        )
