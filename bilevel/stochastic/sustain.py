"""SUSTAIN: MRBO with one random term of the Neumann series."""

from __future__ import annotations

from ..tree import Tree
from .mrbo import MRBO
from .neumann import NeumannTerm, check_seed
from .oracles import Loss
from .schedule import StepSize


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

    def __init__(
        self,
        inner_params: Tree,
        outer_params: Tree,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        inner_lr: StepSize,
        outer_lr: StepSize,
        mixing: StepSize = 0.5,
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
            mixing=mixing,
            num_terms=num_terms,
            neumann_lr=neumann_lr,
        )
        self._series = NeumannTerm(num_terms, check_seed(seed))
