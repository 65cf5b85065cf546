"""stocBiO: an inner loop and a truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

from .two_loops import NeumannLoops


@dataclass(eq=False, repr=False, kw_only=True)
class StocBiO(NeumannLoops):
    """The classical two-loop method, where nothing but the params may be kept between steps.

        y <- y - inner_lr grad_y g(y, x)         ``num_inner_steps`` times
        u = neumann_lr sum_{q=0}^{Q} prod_{i=1}^{q} (I - neumann_lr H_i) grad_y f(y, x),   Q = ``num_terms``
        x <- x - outer_lr (grad_x f - (d_x grad_y g)^T u)

    The series has the bias (1 - neumann_lr mu)^(Q+1) and diverges for ``neumann_lr`` above 2/L; `AmIGO` has none.

    Cost of a step: ``num_inner_steps`` gradients, one outer gradient, ``num_terms`` Hessian products, one cross
    product, and a gradient for each change of batch. Independent inner batches: ``num_inner_steps + num_terms + 1``.

    Args:
        neumann_lr: at most 1/L, constant; by default the largest ``inner_lr`` so far, a schedule's first peak.

    Other arguments and errors: `Stochastic`. Source: Ji, Yang, Liang 2021, algorithm 2.
    """
