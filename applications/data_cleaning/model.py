"""The classifiers, and how they are fitted: softmax regression and a network of one hidden layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.data_cleaning.task import Labelled, Task

ModelName = Literal["softmax", "mlp"]
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A classifier ``logits = net(features)`` under an L2 penalty on all its parameters.

        loss(params) = mean_i weight_i cross_entropy_i(params) + ridge / 2 |params|^2

    The softmax regression starts at zero and has one minimum; the network starts at random and has many.
    """

    net: nn.Module
    ridge: float

    @classmethod
    def make(cls, name: ModelName, task: Task, hidden: int, ridge: float, seed: int) -> Model:
        num_features, num_classes = task.train.features.shape[1], task.num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if name == "mlp":
                layers = nn.Linear(num_features, hidden), nn.Tanh(), nn.Linear(hidden, num_classes)
                return cls(nn.Sequential(*layers), ridge)
            linear = nn.Linear(num_features, num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return cls(linear, ridge)

    def start(self) -> Params:
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}

    def logits(self, params: Params, features: Tensor) -> Tensor:
        found: Tensor = bl.nn.functional_call(self.net, params, (features,))
        return found

    def penalty(self, params: Params) -> Tensor:
        return self.ridge / 2 * torch.stack([value.square().sum() for value in params.values()]).sum()

    def loss(self, params: Params, data: Labelled, weights: Tensor | None = None) -> Tensor:
        return mean_loss(self.logits(params, data.features), data.labels, weights) + self.penalty(params)

    def fit(self, data: Labelled, weights: Tensor | None = None) -> Params:
        """The minimum by L-BFGS from the start, for fixed weights: every model whose accuracy is told is this.

        A fit that does not get there is a `bilevel.SolveWarning`.
        """
        fit = bl.argmin(self.loss, self.start(), data, weights, solver=SOLVER, hypergrad=None)
        found: Params = fit.value
        return found

    def accuracy(self, params: Params, data: Labelled) -> float:
        """In percent."""
        with torch.no_grad():
            right = self.logits(params, data.features).argmax(1) == data.labels
        return 100 * right.double().mean().item()


SOLVER = bl.LBFGS(gtol=1e-3, max_steps=500)
"""Gradients are of order one at the start; a tighter tolerance changes the class of a test example here and there."""


def mean_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy; each example may have a weight (the mean still divides by their number)."""
    if weights is None:
        return cross_entropy(logits, labels)
    return (weights * cross_entropy(logits, labels, reduction="none")).mean()
