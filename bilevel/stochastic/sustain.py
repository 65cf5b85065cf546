"""SUSTAIN: MRBO with one random term of the Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

from .mrbo import MRBO
from .neumann import NeumannTerm, Series, check_seed


@dataclass(eq=False, repr=False, kw_only=True)
class SUSTAIN(MRBO):
    """The double momentum of `MRBO` with the adjoint of `BSA`: half the Hessian products, more variance.

    The random number of factors is the same at the new and the old point, as the recursion needs. The paper's
    schedules are ``Decay(lr, 1/3)`` for both step sizes and ``Decay(mixing, 2/3)``.

    Cost of a step: 4 gradients, on average ``num_terms`` - 1 Hessian products, 2 cross products, and a gradient for
    each change of batch at each point. Independent inner batches: ``num_terms + 2`` at most.

    Args:
        seed: of the random truncation.

    Other arguments and errors: `MRBO`. Source: Khanduri et al. 2021, algorithm 1.
    """

    seed: int = 0

    def _series(self) -> Series:
        return NeumannTerm(self.num_terms, check_seed(self.seed))
