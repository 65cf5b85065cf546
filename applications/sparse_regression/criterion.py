"""The cross-validation loss as a function of the log-penalties, with its hypergradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bilevel as bl
from applications.sparse_regression.folds import Folds
from applications.sparse_regression.penalties import Penalty, coordinate_descent

SETTINGS: dict[str, Any] = {"hypergrad": bl.Implicit(bl.CG(rtol=1e-8))}
"""Settings of the criterion: as exact as its fits, which nothing else may be."""


@dataclass(frozen=True)
class Evaluation:
    """At one set of penalties, for K fits and one linear system on the support of each.

    Attributes:
        criterion: mean of the validation losses. objective: what is minimised, the criterion and the pull.
        gradient: of the objective towards the log-penalties, ``[size]``.
        coefficients: of the folds, ``[K, d]``; support: how many of them are not zero, on average.
    """

    criterion: float
    objective: float
    gradient: Tensor
    coefficients: Tensor
    support: float


@dataclass(frozen=True)
class Criterion:
    """``C(x) = mean_k V_k(b_k(x)) + pull V(0) / 2 sum_j (x_j - mean x)^2`` of log-penalties x (Bertrand et al. 2020).

    The pull towards one common penalty is what keeps hundreds of penalties from fitting the validation examples; V(0)
    is the criterion without any feature, so that a pull means the same on any data. ``hypergrad`` makes its gradient,
    and may be less exact; its value is always that of exact fits.
    """

    folds: Folds
    penalty: Penalty
    pull: float = 0.0
    hypergrad: Any = SETTINGS["hypergrad"]

    def __call__(self, log_strengths: Tensor, start: Tensor | None = None) -> Evaluation:
        """Fit the folds, from the coefficients ``start`` ``[K, d]``, and differentiate."""
        x = log_strengths.detach().clone().requires_grad_()
        # Coordinate descent finds the solutions; at them the proximal fixed point is checked, polished if its residual
        # is not yet at rounding, and differentiated on the active set.
        fit = bl.argmin(
            self.folds.training_losses,
            self._solutions(x.detach(), start),
            solver=bl.ProximalGradient(self.penalty.prox(x)),
            hypergrad=self.hypergrad,
            throw="warn" if self.hypergrad == SETTINGS["hypergrad"] else "ignore",
        )
        criterion = self.folds.validation_losses(fit.value).mean()
        objective = criterion + self.pull * self.without_features() / 2 * (x - x.mean()).square().sum()
        (gradient,) = torch.autograd.grad(objective, x)
        coefficients = fit.value.detach()
        support = (coefficients != 0).sum(-1).double().mean().item()
        return Evaluation(criterion.item(), objective.item(), gradient, coefficients, support)

    def without_features(self) -> float:
        return self.folds.validation_losses(torch.zeros_like(self.folds.centres)).mean().item()

    def _solutions(self, x: Tensor, start: Tensor | None) -> Tensor:
        folds, (l1, l2) = self.folds, self.penalty.strengths(x)
        solutions = [
            coordinate_descent(
                (folds.features[rows] - folds.centres[k]).numpy(),
                (folds.targets[rows] - folds.means[k]).numpy(),
                l1.numpy(),
                0.0 if l2 is None else l2.item(),
                None if start is None else start[k].numpy(),
            )
            for k, (rows, _) in enumerate(folds.pairs)
        ]
        return torch.from_numpy(np.stack(solutions))
