"""How an example's loss is weighted: fixed rules, and the weight net with its hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame.tune import settings_usable
from applications.reweighting.networks import Mlp, Params, stacked

Inputs = Literal["loss", "loss-and-class"]
Method = Literal["unroll", "one-step", "sama", "neumann", "cg"]
Hypergrad = bl.Unroll | bl.OneStep | bl.SAMA | bl.Implicit
Predict = Callable[[Params], Tensor]

CPU = torch.device("cpu")
FLOOR = 1e-2
"""Added to the mean weight that a weighted loss is divided by: where all weights vanish, so does the loss."""
DAMPING = 1e-2
"""Damping of the Gauss-Newton matrix of one batch, which has far fewer rows than there are parameters."""
METHODS: dict[Method, Hypergrad] = {
    "unroll": bl.Unroll(),
    "one-step": bl.OneStep(),
    "sama": bl.SAMA(),
    "neumann": bl.Implicit(bl.Neumann(max_steps=5), damping=DAMPING),
    "cg": bl.Implicit(bl.CG(max_steps=5), damping=DAMPING),
}
"""All of them differentiate the look-ahead of `look_ahead`.

``"unroll"``: through the step itself, the algorithm of the paper. ``"one-step"``: the derivative of one more step at
the new point. ``"sama"``: the same by a difference of first derivatives. ``"neumann"`` and ``"cg"``: implicit, five
products with the damped Gauss-Newton matrix of the batch.
"""


def losses_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, ``[R, n]``."""
    return cross_entropy(outputs.movedim(-1, 1), labels, reduction="none")


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """``sum w l / sum w`` of each of R batches: only relative weights count, so that they are no step size."""
    return (weights * losses).mean(-1) / (weights.mean(-1) + FLOOR)


def focal_loss(losses: Tensor, gamma: float) -> Tensor:
    """``(1 - p)^gamma l`` with ``p = exp(-l)`` (Lin et al. 2017), ``[R]``; its derivative goes through both factors."""
    return ((1 - (-losses).exp()) ** gamma * losses).mean(-1)


class WeightNet:
    """``weight = sigmoid(net(loss))``, with one hidden layer of 100 (Shu et al. 2019); R of them.

    The last layer starts at zero: all weights are equal, and no random slope has to be unlearned.

    Args:
        inputs: the loss alone, or with the logarithm of the class's frequency, relative to the largest class.
    """

    def __init__(self, repeats: int, inputs: Inputs, seed: int, device: torch.device):
        self.inputs = inputs
        size = 1 if inputs == "loss" else 2
        self.module, self.params = stacked(lambda: Mlp(size, 100, 1), repeats, seed, device)
        with torch.no_grad():
            self.params["layers.1.weight"].zero_()

    def __call__(self, losses: Tensor, frequencies: Tensor) -> Tensor:
        """Weights ``[R, n]`` in (0, 1) from losses, as numbers without a gradient, and frequencies in (0, 1]."""
        features = [losses.detach()]
        if self.inputs == "loss-and-class":
            features.append(frequencies.log())
        scores: Tensor = bl.nn.functional_call(self.module, self.params, (torch.stack(features, -1),))
        return scores.squeeze(-1).sigmoid()


def of_the_step(hypergrad: Hypergrad, lr: float, batch: BatchLoss) -> Hypergrad:
    """The method for a look-ahead of this step size: one step more is as long, and implicit differentiation has the
    Gauss-Newton matrix of the batch."""
    if isinstance(hypergrad, bl.OneStep):
        return bl.OneStep(lr)
    if not isinstance(hypergrad, bl.Implicit):
        return hypergrad
    solver = hypergrad.linear_solver
    if isinstance(solver, bl.Neumann):
        solver = replace(solver, alpha=lr)
    return replace(hypergrad, linear_solver=solver, operator=bl.GaussNewton(batch.outputs, batch.loss))


class BatchLoss:
    """The weighted training loss of one batch as a function of the classifiers' parameters, ``[R]``."""

    def __init__(self, predict: Predict, labels: Tensor, frequencies: Tensor, net: WeightNet):
        self.outputs, self.labels, self.frequencies, self.net = predict, labels, frequencies, net

    def loss(self, outputs: Tensor) -> Tensor:
        losses = losses_of(outputs, self.labels)
        return weighted_mean(self.net(losses, self.frequencies), losses)

    def __call__(self, params: Params) -> Tensor:
        return self.loss(self.outputs(params))


def rehearse(hypergrad: Hypergrad) -> None:
    """One look-ahead of a classifier of a few numbers: what cannot differentiate it is told before any data are read.

    Raises:
        UserError: it cannot.
    """
    module, params = stacked(lambda: Mlp(2, 2, 2), 1, 0, CPU)
    net, images, labels = WeightNet(1, "loss", 1, CPU), torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long)
    batch = BatchLoss(lambda params: bl.nn.functional_call(module, params, (images,)), labels, torch.ones(1, 2), net)
    with settings_usable():
        ahead = look_ahead(params, batch, hypergrad, 0.1)
        torch.autograd.grad(losses_of(batch.outputs(ahead.value), labels).sum(), list(net.params.values()))


def look_ahead(params: Params, batch: BatchLoss, hypergrad: Hypergrad, lr: float) -> bl.Solution:
    """One step of gradient descent on the weighted loss, differentiable towards the weight net."""
    step = bl.Steps(bl.SGD(lr), max_steps=1)
    return bl.argmin(batch, params, solver=step, hypergrad=of_the_step(hypergrad, lr, batch), throw="ignore")
