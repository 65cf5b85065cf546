"""TTSA: BSA without an inner loop, on two time scales."""

from __future__ import annotations

from dataclasses import dataclass, field

from .bsa import BSA


@dataclass(eq=False, repr=False, kw_only=True)
class TTSA(BSA):
    """`BSA` with a single inner step: the inner variable keeps up because the outer steps decay faster.

        y+ = y - inner_lr_t grad_y g(y, x),    x+ = x - outer_lr_t h(y+, x)

    with h the estimate of `BSA`. The paper's schedules are ``Decay(inner_lr, 2/5)`` and ``Decay(outer_lr, 3/5)``
    (strongly convex outer problem: 2/3 and 1).

    Cost of a step: 2 gradients, on average (``num_terms`` - 1)/2 Hessian products, one cross product, and a
    gradient for each change of batch. Independent inner batches: ``num_terms + 2`` at most.

    Arguments and errors: `BSA`. Source: Hong, Wai, Wang, Yang 2023, algorithm 1.
    """

    num_inner_steps: int = field(init=False, default=1)
