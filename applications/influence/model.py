"""The network, its training, and its influences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def losses(outputs: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of each example."""
    return cross_entropy(outputs, batch[1], reduction="none")


@dataclass(frozen=True)
class Model:
    """A network of one hidden layer (tanh), or softmax regression where it has no units; in float64."""

    features: int
    classes: int
    hidden: int
    decay: float
    seed: int

    def start(self) -> Params:
        """Random params."""
        random = torch.Generator().manual_seed(self.seed)
        sizes = [self.features, *([self.hidden] if self.hidden else []), self.classes]
        params = {}
        for layer, (width, height) in enumerate(itertools.pairwise(sizes)):
            weight = torch.randn(width, height, generator=random, dtype=torch.float64) / width**0.5
            params[f"weight{layer}"], params[f"bias{layer}"] = weight, torch.zeros(height, dtype=torch.float64)
        return params

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Logits ``[b, classes]``."""
        z = batch[0] @ params["weight0"] + params["bias0"]
        return torch.tanh(z) @ params["weight1"] + params["bias1"] if self.hidden else z

    def penalty(self, params: Params) -> Tensor:
        return self.decay / 2 * torch.stack([leaf.square().sum() for leaf in params.values()]).sum()

    def fit(self, train: Batch, weights: Tensor | None = None, start: Params | None = None) -> Params:
        """Trained to a minimum; ``weights [n]`` of the examples, whose mean is over all n."""

        def objective(params: Params) -> Tensor:
            each = losses(self.outputs(params, train), train)
            return (each if weights is None else weights * each).mean() + self.penalty(params)

        solver = bl.LBFGS(max_steps=3000, gtol=1e-5)
        return bl.argmin(objective, start or self.start(), solver=solver, hypergrad=None, throw="ignore").value

    def influence(self, params: Params, train: Batch) -> bl.Influence:
        """With the Gauss-Newton matrix and the penalty's curvature."""
        solver = bl.CG(rtol=1e-3)
        return bl.Influence(self.outputs, losses, params, train, penalty=self.penalty, linear_solver=solver)
