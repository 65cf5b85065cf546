"""The two problems of workload D, and the truth about them in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame.data import mislabel

Step = Callable[[], Any]
"""One outer step; returns the hyperparameters that it leads to, as anything that numpy reads."""
Begin = Callable[[], Step]
"""A new run from the start: it sets up what the first step needs, on the clock."""

DESCENT_STEPS = 20
"""Steps of the inner solvers that are unrolled; they start where the last outer step ended."""


RTOL, GTOL = 1e-2, 1e-3
"""Tolerances of the linear and the inner solves of the two-loop methods, whose errors Adam's steps hide."""


@dataclass(frozen=True)
class Task:
    """Softmax regression in float32 whose hyperparameters weigh the examples, or the penalties of the features.

        cleaning:   g(W, x) = mean_i sigmoid(x_i) loss_i(W) + ridge/2 |W|^2
        penalties:  g(W, x) = mean_i loss_i(W) + sum_k exp(x_k) |W_k|^2 / 2
        f(W)        = mean loss of W on the validation data

    Attributes:
        outer_lr: of Adam on x, the same for all two-loop contestants.
        sgd_lr: outer step of the stochastic methods, which are plain gradient steps.
        multiply: the product of features and weights: PyTorch's, or ours for our contestants.
    """

    kind: str
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    classes: int
    ridge: float
    outer_lr: float
    sgd_lr: float
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    @property
    def size(self) -> int:
        return len(self.train[0]) if self.kind == "cleaning" else self.train[0].shape[1]

    def start(self) -> tuple[Tensor, Tensor]:
        """W and x, all zeros."""
        return torch.zeros(self.train[0].shape[1], self.classes), torch.zeros(self.size)

    def inner(self, weights: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        features, labels = self.train if batch is None else (self.train[0][batch], self.train[1][batch])
        if self.kind == "penalties":
            penalty = (x.exp() * weights.square().sum(1)).sum() / 2
            return cross_entropy(self.multiply(features, weights), labels) + penalty
        losses = cross_entropy(self.multiply(features, weights), labels, reduction="none")
        each = x if batch is None else x[batch]
        return (each.sigmoid() * losses).mean() + self.ridge / 2 * weights.square().sum()

    def outer(self, weights: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        features, labels = self.val if batch is None else (self.val[0][batch], self.val[1][batch])
        return cross_entropy(self.multiply(features, weights), labels)

    @cached_property
    def _curvature(self) -> float:
        """Curvature of the mean loss at most: a softmax has 1/2 at most, an example in cleaning the weight 1."""
        features = self.train[0]
        return float(torch.linalg.matrix_norm(features, 2)) ** 2 / len(features) / 2

    def inner_lr(self, x: Tensor) -> float:
        """1/L, for gradient descent; penalties that grow make it smaller."""
        return 1 / (self._curvature + (self.ridge if self.kind == "cleaning" else float(x.detach().max().exp())))

    def bilevel(self) -> bl.diagnostics.BilevelProblem:
        return bl.diagnostics.BilevelProblem(self.inner, self.outer, *self.start())


class Truth:
    """The same problem in float64 numpy, by formulas: accurate solutions, losses and hypergradients."""

    def __init__(self, task: Task):
        self.task = task
        self.features, self.val = (data[0].double().numpy() for data in (task.train, task.val))
        self.targets, self.val_targets = (np.eye(task.classes)[data[1].numpy()] for data in (task.train, task.val))
        self.shape = (self.features.shape[1], task.classes)
        self.weights = np.zeros(self.shape)

    def _scales(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each example, divided by their number, and the penalty of each feature; columns."""
        n, k = len(self.features), self.shape[0]
        if self.task.kind == "cleaning":
            return 1 / (1 + np.exp(-x))[:, None] / n, np.full((k, 1), self.task.ridge)
        return np.full((n, 1), 1 / n), np.exp(x)[:, None]

    def solve(self, x: np.ndarray, gtol: float = 1e-5) -> np.ndarray:
        """W*(x) by L-BFGS from the last solution, in variables scaled by the penalty; NaN where x overflows."""
        if self.task.kind == "penalties" and x.max() > LARGEST_LOG_PENALTY:
            return np.full(self.shape, np.nan)
        each, penalty = self._scales(x)
        scale = 1 / np.sqrt(penalty + 0.1)

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(self.shape) * scale
            logs = log_softmax(self.features @ weights, 1)
            loss = -(each * self.targets * logs).sum() + (penalty * weights**2).sum() / 2
            gradient = self.features.T @ (each * (np.exp(logs) - self.targets)) + penalty * weights
            return loss, (gradient * scale).ravel()

        settings = {"gtol": gtol, "ftol": 0.0, "maxiter": 5000, "maxfun": 10000, "maxcor": 20}
        start = (self.weights / scale).ravel()
        found = scipy.optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options=settings)
        self.weights = found.x.reshape(self.shape) * scale
        return self.weights

    def loss(self, x: np.ndarray) -> float:
        """The validation loss at W*(x)."""
        logs = log_softmax(self.val @ self.solve(x), 1)
        return float(-(self.val_targets * logs).sum() / len(self.val))

    def hypergradient(self, x: np.ndarray, rtol: float = 1e-8) -> np.ndarray:
        """By scipy's CG on the Hessian at W*(x)."""
        each, penalty = self._scales(x)
        weights = self.solve(x)
        chances = softmax(self.features @ weights, 1)

        def product(flat: np.ndarray) -> np.ndarray:
            v = flat.reshape(self.shape)
            logits = self.features @ v
            pushed = chances * (logits - (chances * logits).sum(1, keepdims=True))
            return (self.features.T @ (each * pushed) + penalty * v).ravel()

        size = weights.size
        hessian = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
        inverse = np.broadcast_to(1 / (penalty + 0.1), self.shape).ravel()
        jacobi = scipy.sparse.linalg.LinearOperator((size, size), matvec=lambda v: inverse * v, dtype=np.float64)
        errors = softmax(self.val @ weights, 1) - self.val_targets
        u, _ = scipy.sparse.linalg.cg(hessian, (self.val.T @ errors).ravel() / len(self.val), rtol=rtol, M=jacobi)
        u = u.reshape(self.shape)
        if self.task.kind == "penalties":
            return -np.exp(x) * (weights * u).sum(1)
        slopes = ((chances - self.targets) * (self.features @ u)).sum(1)
        chance = 1 / (1 + np.exp(-x))
        return -chance * (1 - chance) / len(x) * slopes


LARGEST_LOG_PENALTY = 80.0
"""Its exponential still fits float32, in which the contestants work."""


def adam(x: np.ndarray, lr: float) -> Callable[[np.ndarray], None]:
    """torch's Adam on an array, in place, for the reference and for libraries without torch."""
    shared = torch.from_numpy(x)
    optimizer = torch.optim.Adam([shared], lr=lr)

    def step(gradient: np.ndarray) -> None:
        shared.grad = torch.tensor(gradient, dtype=shared.dtype)
        optimizer.step()

    return step


def noisy_digits(root: str | None, train: int, val: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """MNIST or scikit-learn's digits, with a column of ones; half of the training labels become another class."""
    if root:
        from torchvision.datasets import MNIST

        data = MNIST(root, train=True)
        images, labels = data.data.flatten(1).float() / 255, data.targets
    else:
        from sklearn.datasets import load_digits

        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        images = images.float() / 16
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=random)[: train + val]
    features = torch.cat([images[chosen], torch.ones(len(chosen), 1)], 1)
    labels = labels[chosen].long()
    noisy = mislabel(labels[:train], 10, 0.5, random)
    return (features[:train], noisy), (features[train:], labels[train:])


def sparse_classes(samples: int, size: int, useful: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Gaussian features of which the first ``useful`` ones tell which of five classes it is; two data sets."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.zeros(size, 5)
    truth[:useful] = torch.randn(useful, 5, generator=random)
    sets = []
    for _ in range(2):
        features = torch.randn(samples, size, generator=random)
        sets.append((features, torch.multinomial((features @ truth).softmax(1), 1, generator=random)[:, 0]))
    return tuple(sets)
