"""Logistic regressions of all folds at once, by Newton's method on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..argmin import argmin
from ..hypergrad.implicit import Implicit
from ..inner.external import External
from ..inner.lbfgs import LBFGS
from ..linalg.cg import CG
from .folds import Folds
from .quadratic import Factored, cholesky

MOST_UNKNOWNS = 1500
"""Most coefficients of one fold for its Hessian to be formed and factorised."""


class LogisticTwin:
    """``sum_i s_i log loss_i + sum_cj penalties_j w_cj^2 / 2``: that of scikit-learn, with ``penalties = 1 / C``.

    Two classes have one vector of weights, more have one each. Each solve begins at the solution of the last. Newton's
    steps have the whole Hessian, and the factor of the last preconditions the adjoint; large problems go to L-BFGS.
    """

    def __init__(self, folds: Folds, fit_intercept: bool):
        self.folds = folds
        ones = torch.ones_like(folds.features[..., :1])
        rows = 1 if folds.num_classes == 2 else folds.num_classes
        self.small = rows * (folds.num_features + fit_intercept) <= MOST_UNKNOWNS
        # The intercept takes up the means, and for Newton's steps the weights take up the scales: features may be far
        # from zero, and in any units. L-BFGS is better off without: the penalty of rare features would be stiff.
        x = folds.features - folds.features.mean(-2, keepdim=True) if fit_intercept else folds.features
        largest = x.abs().amax((0, 1))
        self.scale = torch.where((largest > 0) & self.small, largest, torch.ones_like(largest))
        self.x = torch.cat([x / self.scale, ones], -1) if fit_intercept else x / self.scale
        self.start = self.x.new_zeros(len(folds.train), rows * self.x.shape[-1])
        self.gauge = fit_intercept and rows > 1
        self.free = self.x.new_zeros(int(fit_intercept))

    def predictions(self, penalties: Tensor) -> Tensor:
        """Logits of each fold's model for all examples, ``[K, n, 1 or C]``; ``penalties`` 0-d or ``[d]``."""
        each = torch.cat([penalties / self.scale.square(), self.free])

        def objective(weights: Tensor) -> Tensor:
            losses = self.folds.each_loss(self._logits(weights))
            fit = torch.where(self.folds.train > 0, self.folds.train * losses, torch.zeros_like(losses)).sum(-1)
            by_class = self._by_class(weights)
            # Equal shifts of all intercepts change nothing: their sum is held at zero.
            shift = by_class[..., self.folds.num_features :].sum((-2, -1)).square() if self.gauge else 0.0
            return fit + ((each * by_class.square()).sum((-2, -1)) + shift) / 2

        solver: External | LBFGS
        if self.small:
            minimum, factor = self._newton(objective, each.detach())
            solver, linear = (
                External(lambda loss, start: minimum, gtol=1e-5),
                CG(rtol=1e-9, preconditioner=Factored(factor)),
            )
        else:
            minimum, solver, linear = self.start, LBFGS(max_steps=2000), CG(rtol=1e-9)
        fit = argmin(objective, minimum, solver=solver, hypergrad=Implicit(linear))
        self.start = fit.value.detach()
        return self._logits(fit.value)

    def _newton(self, objective: Callable[[Tensor], Tensor], penalties: Tensor) -> tuple[Tensor, Tensor]:
        """The minima ``[K, p]``, and factors of the Hessians there ``[K, p, p]``; each fold halves its own steps."""
        weights = self.start.clone().requires_grad_()
        losses, near, factor = objective(weights), torch.zeros(len(weights), dtype=torch.bool), torch.empty(0)
        for _ in range(MOST_STEPS):
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
            if not bool(near.all()):  # near the minimum the last factor is as good
                factor = cholesky(self._hessian(weights.detach(), penalties))
            step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
            decrement = (gradient * step).sum(-1)
            near = decrement < 1e-8 * (1 + losses.abs())
            pending = decrement > 1e-18 * (1 + losses.abs())
            if not bool(pending.any()):
                break
            length = pending.double()
            for _ in range(30):
                trial = (weights - length.unsqueeze(-1) * step).detach().requires_grad_()
                new = objective(trial)
                worse = pending & ~(new <= losses - 1e-4 * length * decrement + 1e-12 * (1 + losses.abs()))
                if not bool(worse.any()):
                    break
                length = torch.where(worse, length / 2, length)
            weights, losses = trial, new
        return weights.detach(), factor

    def _hessian(self, weights: Tensor, penalties: Tensor) -> Tensor:
        """The Hessians of the objective, ``[K, p, p]``."""
        logits, counts = self._logits(weights), self.folds.train.unsqueeze(-1)
        if logits.shape[-1] == 1:
            share = logits.sigmoid()
            hessian = (self.x * (counts * share * (1 - share))).mT @ self.x
        else:  # in the outputs of one example: diag(share) - share share'
            share = logits.softmax(-1)
            each = ((counts.sqrt() * share).unsqueeze(-1) * self.x.unsqueeze(-2)).flatten(-2)
            diagonal = [(self.x * column.unsqueeze(-1)).mT @ self.x for column in (counts * share).unbind(-1)]
            hessian = -each.mT @ each
            for c, block in enumerate(diagonal):
                at = slice(c * self.x.shape[-1], (c + 1) * self.x.shape[-1])
                hessian[:, at, at] += block
            if self.gauge:
                last = slice(self.x.shape[-1] - 1, None, self.x.shape[-1])
                hessian[:, last, last] += 1
        return hessian + torch.diag_embed(penalties.repeat(logits.shape[-1]))

    def _by_class(self, weights: Tensor) -> Tensor:
        rows: Tensor = weights.unflatten(-1, (-1, self.x.shape[-1]))
        return rows

    def _logits(self, weights: Tensor) -> Tensor:
        return self.x @ self._by_class(weights).mT


MOST_STEPS = 100
