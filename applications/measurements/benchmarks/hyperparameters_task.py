"""The problem of workload B, as every contestant is given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

RTOL, MAX_STEPS = 1e-6, 50
"""Tolerance and most steps of the conjugate gradients of every contestant."""


@dataclass(frozen=True)
class Data:
    """Both data sets, the log-penalties, and the solution W of the inner problem, ``[classes, features]``."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    log_penalties: np.ndarray
    solution: np.ndarray

    @property
    def num_classes(self) -> int:
        return len(self.solution)

    def diagonal(self) -> np.ndarray:
        """About the diagonal of the Hessian, one entry for each feature, at no product: penalty plus 1/classes.

        The features have variance 1; a balanced softmax that knows nothing yet has curvature 1/classes along every
        change of logits that sums to zero, and CG never leaves those. The same for all classes: entries of their own,
        as the exact diagonal has, would lead it out.
        """
        return np.exp(self.log_penalties) + np.float32(1 / self.num_classes)


Linear = Callable[[Tensor, Tensor], Tensor]
"""``linear(x, params)``: PyTorch's own, or ours in its place."""


def objective(params: Tensor, log_penalties: Tensor, x: Tensor, y: Tensor, linear: Linear = linear) -> Tensor:
    """The inner loss, as every contestant in PyTorch writes it."""
    return cross_entropy(linear(x, params), y) + (log_penalties.exp() * params.square()).sum() / 2
