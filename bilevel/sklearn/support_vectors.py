"""Support vector regressions of all folds at once: libsvm solves, the active set is differentiated."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVR
from torch import Tensor

from .folds import Folds
from .quadratic import gaussian_kernel, minimize_quadratic, times


class SVRTwin:
    """``min b K b / 2 - y b + epsilon |b|_1`` with ``sum b = 0`` and ``|b_i| <= C w_i``, w the examples' weights.

    At the solution an example lies inside the tube (b = 0), beyond it (b = C w s, s the sign of its error), or on its
    edge, a free support vector: ``(K b)_i + intercept = y_i - epsilon s_i``. libsvm finds these sets. With them fixed,
    b is the minimum of a quadratic in the free entries under one equality, differentiable towards the kernel, epsilon
    and C: the derivative of the solution wherever the sets do not change.
    """

    def __init__(self, folds: Folds):
        self.folds, self.x, self.weights = folds, folds.features, folds.train
        self.y = folds.targets * (folds.train > 0)

    def predictions(self, C: Tensor, epsilon: Tensor, gammas: Tensor) -> Tensor:
        """Predictions of each fold's model for all examples, ``[K, n]``; all 0-d."""
        kernel = gaussian_kernel(self.x, gammas)
        b = self._solve(kernel.detach(), C.item(), epsilon.item())
        sign, bounded = b.sign(), ((b != 0) & (b.abs() >= C.item() * (1 - 1e-9) * self.weights)).double()
        free = (b != 0) * (1 - bounded)
        count = free.sum(-1, keepdim=True).clamp_min(1)

        def mean(v: Tensor) -> Tensor:
            """Over the free entries."""
            return (free * v).sum(-1, keepdim=True) / count

        beyond = C * self.weights * bounded * sign
        feasible = beyond - free * beyond.sum(-1, keepdim=True) / count
        wanted = self.y - epsilon * sign

        def inside(v: Tensor) -> Tensor:
            """The part of v that moves b within its constraints."""
            return free * (v - mean(v))

        def objective(v: Tensor) -> Tensor:
            b = feasible + inside(v)
            rest = (v - inside(v)).square().sum(-1)  # does nothing: zero at the minimum
            return (b * times(kernel, b)).sum(-1) / 2 - (wanted * b).sum(-1) + rest / 2

        with torch.no_grad():
            project = torch.diag_embed(free) - free.unsqueeze(-1) * free.unsqueeze(-2) / count.unsqueeze(-1)
            matrix = project @ kernel @ project + torch.eye(project.shape[-1], dtype=project.dtype) - project
            right = inside(wanted - times(kernel, feasible))
        b = feasible + inside(minimize_quadratic(objective, matrix, right))
        scores = times(kernel, b)
        fixed = free.sum(-1, keepdim=True) == 0
        return scores + torch.where(fixed, self._middle(scores, bounded * sign, epsilon), mean(wanted - scores))

    def _middle(self, scores: Tensor, bounded: Tensor, epsilon: Tensor) -> Tensor:
        """Without a free vector, the middle of the intercepts that the conditions of optimality allow, ``[K, 1]``.

        ``bounded`` is the sign of examples beyond the tube, and 0 inside, where the error is at most epsilon both ways.
        Both ends are there: as b sums to zero, there are examples beyond the tube on both sides, or all are inside.
        """
        error, there = self.y - scores, self.weights > 0
        above = torch.where(there & (bounded >= 0), error + epsilon * (1 - 2 * bounded), torch.inf)
        below = torch.where(there & (bounded <= 0), error - epsilon * (1 + 2 * bounded), -torch.inf)
        return (above.amin(-1, keepdim=True) + below.amax(-1, keepdim=True)) / 2

    def _solve(self, kernel: Tensor, C: float, epsilon: float) -> Tensor:
        """b ``[K, n]`` by libsvm, fold by fold."""
        kernels, targets = kernel.expand(len(self.weights), -1, -1).numpy(), self.folds.targets.numpy()
        b = torch.zeros_like(self.weights)
        for k, weights in enumerate(self.weights.numpy()):
            inside = np.flatnonzero(weights)
            unit = float(targets[inside].std()) or 1.0  # libsvm's tolerance has the units of y
            model = SVR(kernel="precomputed", C=C, epsilon=epsilon, tol=5e-5 * unit, cache_size=500)
            model.fit(kernels[k][np.ix_(inside, inside)], targets[inside], sample_weight=weights[inside])
            chosen = torch.from_numpy(inside[model.support_])
            b[k, chosen] = torch.from_numpy(model.dual_coef_[0])
        return b
