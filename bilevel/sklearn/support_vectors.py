"""Support vector regressions of all folds at once: libsvm solves, the active set is differentiated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lstsq
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import SVR
from torch import Tensor

from ..notices import tell
from .folds import Folds
from .quadratic import gaussian_kernel, minimize_quadratic, times


class SVRTwin:
    """``min b K b / 2 - y b + epsilon |b|_1`` with ``sum b = 0`` and ``|b_i| <= C w_i``, w the examples' weights.

    At the solution an example lies inside the tube (b = 0), beyond it (b = C w s, s the sign of its error), or on its
    edge, a free support vector: ``(K b)_i + intercept = y_i - epsilon s_i``. libsvm finds these sets, up to its
    tolerance and its kernel of float32; what it has confused is put right in float64. With the sets fixed, b is the
    minimum of a quadratic in the free entries under one equality, differentiable towards the kernel, epsilon and C: the
    derivative of the solution wherever the sets do not change.
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
        alone = middle(self.y - scores, bounded * sign, epsilon, self.weights > 0)
        return scores + torch.where(fixed, alone, mean(wanted - scores))

    def _solve(self, kernel: Tensor, C: float, epsilon: float) -> Tensor:
        """b ``[K, n]``, fold by fold.

        Warns:
            ConvergenceWarning: the predictions of a fold are inexact.
        """
        kernels, targets = kernel.expand(len(self.weights), -1, -1).numpy(), self.folds.targets.numpy()
        b = torch.zeros_like(self.weights)
        for k, weights in enumerate(self.weights.numpy()):
            inside = np.flatnonzero(weights)
            fold = Fold(kernels[k][np.ix_(inside, inside)], targets[inside], C * weights[inside], epsilon)
            found, violation = fold.corrected(fold.by_libsvm(C, weights[inside]))
            b[k, inside] = torch.from_numpy(found)
            if violation > 1e-6:
                tell(
                    "Predictions of a support vector regression are off by more than 1e-6 of the spread of y: neither "
                    "libsvm nor the active set method found its support vectors. Scale the features "
                    "(StandardScaler), lower the bounds of C, or raise those of gamma.",
                    ConvergenceWarning,
                )
        return b


def middle(error: Tensor, beyond: Tensor, epsilon: Tensor | float, there: Tensor) -> Tensor:
    """Without a free vector, the middle of the intercepts that the conditions of optimality allow, ``[*K, 1]``.

    Both ends are there: as b sums to zero, there are examples beyond the tube on both sides, or all are inside.

    Args:
        error: without the intercept, ``[*K, n]``, as the others.
        beyond: the sign of examples beyond the tube, and 0 inside, where the error is at most epsilon both ways.
        there: which examples are in the fit.
    """
    above = torch.where(there & (beyond >= 0), error + epsilon * (1 - 2 * beyond), torch.inf)
    below = torch.where(there & (beyond <= 0), error - epsilon * (1 + 2 * beyond), -torch.inf)
    return (above.amin(-1, keepdim=True) + below.amax(-1, keepdim=True)) / 2


INSIDE, FREE, BEYOND = 0, 1, 2


@dataclass(frozen=True)
class Fold:
    """The problem of one fold: kernel ``[n, n]``, y ``[n]``, and the bounds of b's entries ``[n]``."""

    kernel: np.ndarray
    y: np.ndarray
    bounds: np.ndarray
    epsilon: float

    @property
    def unit(self) -> float:
        return float(self.y.std()) or 1.0

    def by_libsvm(self, C: float, weights: np.ndarray) -> np.ndarray:
        """b ``[n]``; the tolerance has the units of y."""
        model = SVR(kernel="precomputed", C=C, epsilon=self.epsilon, tol=5e-5 * self.unit, cache_size=500)
        model.fit(self.kernel, self.y, sample_weight=weights)
        b = np.zeros_like(self.y)
        b[model.support_] = model.dual_coef_[0]
        return b

    def corrected(self, b: np.ndarray) -> tuple[np.ndarray, float]:
        """The minimum, from one that is near, by the primal active set method (Nocedal and Wright 2006, 16.5).

        The free entries move to where they solve the conditions of their set, or up to the first that meets a bound
        and is free no more. Once there, the example that lies farthest on the wrong side of the tube's edge is freed.

        Returns:
            b ``[n]``, and by how much it violates the conditions of optimality, relative to the spread of y.
        """
        sign = np.sign(b)
        kind = np.where(b == 0, INSIDE, np.where(np.abs(b) >= self.bounds * (1 - 1e-9), BEYOND, FREE))
        best, least = b, np.inf
        for _ in range(200):
            target, intercept = self._of_sets(kind, sign, b)
            up, at = sign * (target - b), sign * b
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.where(up < 0, -at / up, np.where(up > 0, (self.bounds - at) / up, np.inf))
            room[kind != FREE] = np.inf
            first = int(room.argmin())
            b = b + min(1.0, max(0.0, room[first])) * (target - b)
            if room[first] < 1:
                kind[first] = BEYOND if up[first] > 0 else INSIDE
                b[first] = sign[first] * self.bounds[first] if up[first] > 0 else 0.0
                continue
            error = self.y - self.kernel @ b - intercept
            out = np.where(kind == INSIDE, np.abs(error), sign * error) - self.epsilon
            wrong = np.where(kind == FREE, np.abs(out), np.maximum(np.where(kind == BEYOND, -out, out), 0)) / self.unit
            violation = max(float(wrong.max()), float(abs(b.sum())) / self.unit)
            if violation < least:
                best, least = b, violation
            wrong[kind == FREE] = 0
            worst = int(wrong.argmax())
            if wrong[worst] < 1e-9:
                break
            if kind[worst] == INSIDE:
                sign[worst] = np.sign(error[worst])
            kind[worst] = FREE
        return best, least

    def _of_sets(self, kind: np.ndarray, sign: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, float]:
        """b ``[n]`` that is on the edge of the tube where it is free, and its intercept.

        Of several b that are, the one closest to ``near``: of equal examples, or a kernel that is flat.
        """
        free = kind == FREE
        b = np.where(free, near, np.where(kind == BEYOND, sign * self.bounds, 0.0))
        error = self.y - self.kernel @ b
        if not free.any():
            beyond = torch.from_numpy(sign * (kind == BEYOND))
            return b, middle(torch.from_numpy(error), beyond, self.epsilon, torch.ones_like(beyond).bool()).item()
        count = int(free.sum())
        matrix = np.ones((count + 1, count + 1))
        matrix[-1, -1] = 0
        matrix[:-1, :-1] = self.kernel[np.ix_(free, free)]
        right = np.append((error - self.epsilon * sign)[free], -b.sum())
        move = lstsq(matrix, right, lapack_driver="gelsy", check_finite=False)[0]
        b[free] += move[:-1]
        return b, float(move[-1])
