"""The unrolled hypergradient: differentiate the steps of the solver themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unroll:
    """Backpropagate through every step of `GradientDescent`, towards ``init`` as well.

    The exact derivative of what the solver returned, converged or not; memory grows with the steps. MAML
    (Finn et al. 2017) is this with few steps, and `Implicit` its limit where the solver converges.
    """
