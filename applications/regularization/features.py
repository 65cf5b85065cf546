"""A penalty for each feature of a logistic regression, or for each group of features that are alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame.data import Examples
from applications.frame.run import Row
from applications.regularization.search import Params, Search, accuracy

Part = tuple[Tensor, Tensor]
SETTINGS: dict[str, Any] = {
    "solver": bl.LBFGS(gtol=1e-6, max_steps=1000),
    "hypergrad": bl.Implicit(bl.CG(rtol=1e-2, max_steps=300, preconditioner=bl.Jacobi(3))),
}
"""Solvers of the minimum, and of its adjoint: two digits, enough for a direction, with penalties far apart."""


@dataclass(frozen=True)
class Regression:
    """Multinomial logistic regression without intercept, ``W`` [d, classes], in float64.

    ``g(W, x) = cross-entropy(X W, y) + 1/2 sum_k exp(x_k) |W_k|^2``, strongly convex for any log-penalties x [d];
    ``x = -log(C n)`` for every feature is scikit-learn's `LogisticRegression(C)` on n examples. Penalties for each
    feature: Grazzi et al. 2020, section 5.

    ``X`` is dense or a CSR tensor: PyTorch multiplies CSR by dense, and differentiates that twice in reverse mode, all
    that ``Implicit(operator="graph")``, the default, needs. ``operator="func"`` cannot be taken: `torch.func` refuses
    CSR tensors.
    """

    train: Part
    validation: Part
    test: Part
    num_classes: int

    @classmethod
    def of(cls, train: Examples, validation: Examples, test: Examples) -> Regression:
        return cls(tensors(train), tensors(validation), tensors(test), train.num_classes)

    @property
    def num_features(self) -> int:
        return self.train[0].shape[1]

    def training_loss(self, params: Params, log_penalties: Tensor) -> Tensor:
        """``g``."""
        penalty = (log_penalties.exp() * params["weight"].square().sum(1)).sum() / 2
        return loss(params, self.train) + penalty

    def solve(self, params: Params, log_penalties: Tensor, settings: Mapping[str, Any] | None = None) -> bl.Solution:
        """The minimum of ``g``; ``settings`` in place of `SETTINGS` may stop short of it."""
        chosen = {**SETTINGS, **(settings or {})}
        throw: Any = "ignore" if settings else "warn"
        return bl.argmin(self.training_loss, params, log_penalties, **chosen, throw=throw)

    def fitted(self, log_penalties: Tensor) -> Row:
        """Validation loss and `measure` of a minimum from the start by `SETTINGS`: what these penalties are worth."""
        params = self.solve(self.start(), log_penalties.detach(), SETTINGS).value
        return {"validation_loss": loss(params, self.validation).item(), **self.measure(params)}

    def measure(self, params: Params) -> Row:
        return {
            "training_loss": loss(params, self.train).item(),
            "validation_accuracy": accuracy(logits(params, self.validation), self.validation[1]),
            "test_loss": loss(params, self.test).item(),
            "test_accuracy": accuracy(logits(params, self.test), self.test[1]),
        }

    def start(self) -> Params:
        return {"weight": torch.zeros(self.num_features, self.num_classes, dtype=torch.float64)}

    def groups(self, count: int) -> Tensor:
        """A group for each feature ``[d]``: ``count`` groups of one size, features alike in mean square together.

        For tf-idf, words that are equally frequent; no label is looked at.
        """
        x, ones = self.train[0], torch.ones(len(self.train[1]), 1, dtype=torch.float64)
        square = x * x
        rank = (square.t() @ ones).squeeze(1).argsort(stable=True).argsort()
        return rank * count // self.num_features

    def search(
        self,
        num_penalties: int,
        log_penalty: float,
        steps: int,
        lr: float,
        settings: Mapping[str, Any] | None = None,
    ) -> Search:
        """Learn that many penalties, all from the same start; with ``settings`` in place of `SETTINGS`."""
        groups = self.groups(num_penalties)
        x = torch.full((num_penalties,), log_penalty, dtype=torch.float64, requires_grad=True)
        return Search(
            {"log_penalties": x},
            self.start(),
            solve=lambda params, step: self.solve(params, x[groups], settings),
            validation_loss=lambda params: loss(params, self.validation),
            measure=lambda params: {**self.measure(params), "log_penalty": x.mean().item()},
            steps=steps,
            lr=lr,
        )


def logits(params: Params, part: Part) -> Tensor:
    return part[0] @ params["weight"]


def loss(params: Params, part: Part) -> Tensor:
    return cross_entropy(logits(params, part), part[1])


def tensors(examples: Examples) -> Part:
    """Features, dense or as a CSR tensor, and classes."""
    if not examples.sparse:
        return examples.tensors(torch.float64)
    x = scipy.sparse.csr_array(examples.features).sorted_indices()
    index, pointer = (torch.from_numpy(part.astype(np.int64)) for part in (x.indices, x.indptr))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        features = torch.sparse_csr_tensor(pointer, index, torch.from_numpy(x.data), x.shape, check_invariants=True)
    return features, torch.from_numpy(examples.targets)


COSTS = tuple(float(c) for c in np.logspace(-2, 6, 17))
"""The grid of scikit-learn's C."""


def shared_penalties(train: Examples, validation: Examples, test: Examples) -> list[Row]:
    """What one penalty can do, by scikit-learn: none; the best of a grid; that one with all labels in the training set.

    The last knows as much as penalties that are learned on the validation labels do.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    def row(name: str, cost: float, *parts: Examples) -> Row:
        stack = scipy.sparse.vstack if train.sparse else np.vstack
        features, targets = stack([part.features for part in parts]), np.concatenate([part.targets for part in parts])
        model = LogisticRegression(C=cost, fit_intercept=False, tol=1e-6, max_iter=2000).fit(features, targets)
        losses = [log_loss(part.targets, model.predict_proba(part.features)) for part in (train, validation, test)]
        return {
            "penalties": name,
            "log_penalty": -float(np.log(cost * len(targets))),
            "training_loss": losses[0],
            "validation_loss": losses[1],
            "validation_accuracy": 100 * model.score(validation.features, validation.targets),
            "test_loss": losses[2],
            "test_accuracy": 100 * model.score(test.features, test.targets),
        }

    name = f"one, the best of {len(COSTS)} (scikit-learn)"
    best = min((row(name, cost, train) for cost in COSTS), key=lambda found: found["validation_loss"])
    cost = float(np.exp(-best["log_penalty"])) / (len(train) + len(validation))
    both = row("that one, trained on the validation examples too", cost, train, validation)
    return [row("none (scikit-learn)", np.inf, train), best, both]


FIRST_LOG_PENALTY, PENALTY_LR = -10.0, 0.6
"""Where the log-penalties start, and Adam's step on several."""
