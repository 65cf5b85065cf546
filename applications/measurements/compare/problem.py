"""Logistic regression whose penalties are shared by groups of features: the same problem with 1 to 1,000 of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl

LOW, HIGH = -6.0, 2.0
"""Box of the log-penalties: of the black-box searches, and clamped for the hypergradient."""
START = -3.0


@dataclass(frozen=True)
class Examples:
    """Features ``[n, d]`` and labels -1 or 1 ``[n]``, float64."""

    features: Tensor
    labels: Tensor

    def loss(self, weights: Tensor) -> Tensor:
        """Mean logistic loss."""
        return softplus(-self.labels * (self.features @ weights)).mean()


@dataclass(frozen=True)
class Penalties:
    """``min over x of val loss(w*(x))``, ``w*(x) = argmin train loss(w) + sum_k exp(x[group_k]) w_k^2 / 2``.

    Attributes:
        groups: the number of the penalty of each feature, int64 ``[d]``.
    """

    train: Examples
    val: Examples
    test: Examples
    groups: Tensor

    @property
    def size(self) -> int:
        """Hyperparameters."""
        return int(self.groups.max()) + 1

    def start(self) -> Tensor:
        return torch.full((self.size,), START, dtype=torch.float64)

    def inner(self, weights: Tensor, x: Tensor) -> Tensor:
        return self.train.loss(weights) + (x.exp()[self.groups] * weights.square()).sum() / 2

    def fit(self, x: Tensor, last: bl.Solution | None, hypergrad: bl.Implicit | None = None) -> bl.Solution:
        """The weights, from the last ones: all methods pay for the same solves."""
        start = self.groups.new_zeros(self.groups.shape, dtype=x.dtype) if last is None else last.value.detach()
        solver = bl.LBFGS(gtol=1e-5)
        return bl.argmin(self.inner, start, x, solver=solver, hypergrad=hypergrad, throw="ignore", warm_start=last)


def make(num_penalties: int, seed: int, features: int = 1_000, useful: int = 30, samples: int = 500) -> Penalties:
    """Gaussian features of which the first few tell the label; groups are runs of neighbours, so most are all useless.

    Args:
        num_penalties: of which each serves ``features / num_penalties`` neighbours.
    """
    random = torch.Generator().manual_seed(seed)
    truth = torch.zeros(features, dtype=torch.float64)
    truth[:useful] = torch.randn(useful, generator=random, dtype=torch.float64)

    def draw() -> Examples:
        x = torch.randn(samples, features, generator=random, dtype=torch.float64)
        chance = (x @ truth).sigmoid()
        labels = 2.0 * (torch.rand(samples, generator=random, dtype=torch.float64) < chance) - 1
        return Examples(x, labels)

    groups = torch.arange(features) * num_penalties // features
    return Penalties(draw(), draw(), draw(), groups)
