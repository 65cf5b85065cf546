"""Ridge and kernel ridge regressions of all folds at once: quadratic inner problems, solved by one factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..argmin import argmin
from ..hypergrad.implicit import Implicit
from ..inner.external import External
from ..linalg.cg import CG
from .folds import Folds


@dataclass(frozen=True, eq=False)
class Factored:
    """The Cholesky factor ``[K, p, p]`` of the forward solve as preconditioner of `CG`: one step is exact.

    CG measures the true residual all the same, and mends what rounding left.
    """

    factor: Tensor

    def __call__(self, operator: object) -> Callable[[Tensor], Tensor]:
        return lambda r: torch.cholesky_solve(r.unsqueeze(-1), self.factor).squeeze(-1)


def minimize_quadratic(objective: Callable[[Tensor], Tensor], matrix: Tensor, right: Tensor) -> Tensor:
    """The minimum ``[K, p]`` of K quadratics ``y A y / 2 - b y``, differentiable towards what ``objective`` captured.

    Args:
        objective: ``[K, p] -> [K]``, the same functions, written so that products with their Hessian are cheap.
        matrix, right: A ``[K, p, p]``, positive definite, and b ``[K, p]``, without a graph.
    """
    factor = cholesky(matrix)
    exact = External(lambda loss, start: torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1))
    adjoint = Implicit(CG(rtol=1e-9, preconditioner=Factored(factor)))
    return argmin(objective, torch.zeros_like(right), solver=exact, hypergrad=adjoint).value


def cholesky(matrix: Tensor) -> Tensor:
    """Factors of positive definite matrices ``[K, p, p]``; what rounding made indefinite is moved a little.

    Raises:
        ValueError: it is not of rounding alone.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed((1e-10 * size).expand_as(matrix[..., 0])))
        if bool(info.any()):
            raise ValueError(
                "The fit of a fold has no minimum in float64: its features are too large or differ too much in scale. "
                "Scale them (StandardScaler), or raise the bounds of the penalty (for C, lower them)."
            )
    return factor


class RidgeTwin:
    """``sum_i s_i (y_i - x_i w - b)^2 + sum_j alpha_j w_j^2`` (half of it), s the weights of the examples.

    The rows are those of the centred examples times ``sqrt(s)``, zero where an example is held out.

    With more features than examples in the dual: ``w = X' a / alpha`` with ``a (X X' / alpha + I) = y``, so that a
    thousand penalties cost a matrix of the examples only.
    """

    def __init__(self, folds: Folds, fit_intercept: bool):
        share = folds.train / folds.train.sum(-1, keepdim=True)
        x, y = folds.features, folds.targets.expand_as(share)
        self.offset = torch.zeros(len(share), 1, dtype=torch.float64)
        if fit_intercept:  # the intercept is free: it takes up the means
            x = x - (share.unsqueeze(-1) * x).sum(-2, keepdim=True)
            self.offset = (share * y).sum(-1, keepdim=True)
        root = folds.train.sqrt()
        self.x, self.y = x, (y - self.offset) * root
        self.rows = self.x * root.unsqueeze(-1)
        self.dual = self.x.shape[-1] > self.x.shape[-2]
        if not self.dual:
            self.gram, self.moment = self.rows.mT @ self.rows, (self.rows.mT @ self.y.unsqueeze(-1)).squeeze(-1)

    def predictions(self, penalties: Tensor) -> Tensor:
        """Predictions of each fold's model for all examples, ``[K, n]``; ``penalties`` 0-d or ``[d]``."""
        weights = self._dual_weights(penalties) if self.dual else self._weights(penalties)
        return times(self.x, weights) + self.offset

    def _weights(self, penalties: Tensor) -> Tensor:
        def objective(w: Tensor) -> Tensor:
            return (w * (times(self.gram, w) + penalties * w) / 2 - self.moment * w).sum(-1)

        diagonal = penalties.detach().expand(self.gram.shape[-1])
        return minimize_quadratic(objective, self.gram + torch.diag(diagonal), self.moment)

    def _dual_weights(self, penalties: Tensor) -> Tensor:
        scale = penalties.rsqrt()

        def objective(a: Tensor) -> Tensor:
            v = scale * times(self.rows.mT, a)
            return v.square().sum(-1) / 2 + (a * (a / 2 - self.y)).sum(-1)

        scaled = self.rows * scale.detach()
        matrix = scaled @ scaled.mT + torch.eye(scaled.shape[-2], dtype=scaled.dtype)
        return times(self.rows.mT, minimize_quadratic(objective, matrix, self.y)) / penalties


class KernelRidgeTwin:
    """``a (S K S + alpha I) a / 2 - S y a``, with ``K_ij = exp(-sum_k gamma_k (x_ik - x_jk)^2)``.

    S is the diagonal of the roots of the examples' weights, zero where one is held out. Without gammas the kernel is
    linear.
    """

    def __init__(self, folds: Folds):
        self.x, self.root = folds.features, folds.train.sqrt()
        self.y = folds.targets * self.root

    def predictions(self, alpha: Tensor, gammas: Tensor | None) -> Tensor:
        """Predictions of each fold's model for all examples, ``[K, n]``; ``gammas`` 0-d or ``[d]``."""
        kernel = self.x @ self.x.mT if gammas is None else gaussian_kernel(self.x, gammas)

        def objective(a: Tensor) -> Tensor:
            inside = a * self.root
            return (inside * times(kernel, inside) + alpha * a.square()).sum(-1) / 2 - (self.y * a).sum(-1)

        pairs = self.root.unsqueeze(-1) * self.root.unsqueeze(-2)
        matrix = kernel.detach() * pairs + alpha.detach() * torch.eye(pairs.shape[-1], dtype=pairs.dtype)
        return times(kernel, minimize_quadratic(objective, matrix, self.y) * self.root)


def gaussian_kernel(x: Tensor, gammas: Tensor) -> Tensor:
    """``exp(-sum_k gamma_k (x_ik - x_jk)^2)``: ``[*, n, d] -> [*, n, n]``."""
    scaled = x * gammas.sqrt()
    norms = scaled.square().sum(-1)
    distances = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * scaled @ scaled.mT
    return torch.exp(-distances.clamp_min(0))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """``[*, m, n], [*, n] -> [*, m]``"""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
