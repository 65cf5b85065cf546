"""A weight decay for each weight of a network: as many hyperparameters as weights (Lorraine, Vicol, Duvenaud 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame.run import Row
from applications.regularization.search import Params, Search, accuracy

Part = tuple[Tensor, Tensor]
Sharing = Literal["weight", "layer"]
"""What has a decay of its own: each weight, or each weight matrix and each bias."""


class Network:
    """A network of two hidden layers, its examples, and decays that are shared or not.

    ``g(w, x) = cross-entropy + 1/2 sum_i exp(x_i) w_i^2``. The inner problem is not convex and not solved: five steps
    of gradient descent with momentum go on where the last ended. The hypergradient is the truncated Neumann series of
    Lorraine et al., its step the learning rate. It diverges where the curvature is negative, or above 2 / lr; its sum
    up to there is taken, and the record tells.
    """

    def __init__(self, train: Part, hidden: int, num_classes: int, seed: int):
        self.train = train
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(train[0].shape[1], hidden),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden, num_classes),
            )

    @property
    def start(self) -> Params:
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def decays(self, sharing: Sharing) -> Params:
        """Log-decays that broadcast with the parameters."""
        shapes = {name: decay_shape(p, sharing) for name, p in self.net.named_parameters()}
        return {name: torch.full(shape, LOG_DECAY, requires_grad=True) for name, shape in shapes.items()}

    def training_loss(self, params: Params, log_decays: Params, part: Part | None = None) -> Tensor:
        """``g``."""
        decay = sum(((log_decays[name].exp() * p.square()).sum() for name, p in params.items()), torch.zeros(()))
        return self.loss(params, part or self.train) + decay / 2

    def solve(
        self,
        params: Params,
        log_decays: Params,
        train: Part | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> bl.Solution:
        """Some steps from ``params``; by ``settings`` in place of `SETTINGS`."""
        chosen = {**SETTINGS, **(settings or {})}
        return bl.argmin(self.training_loss, params, log_decays, train, **chosen, throw="ignore")

    def loss(self, params: Params, part: Part) -> Tensor:
        return cross_entropy(self.logits(params, part), part[1])

    def logits(self, params: Params, part: Part) -> Tensor:
        logits: Tensor = functional_call(self.net, params, (part[0],))
        return logits

    def search(
        self,
        sharing: Sharing,
        validation: Part,
        test: Part,
        steps: int,
        settings: Mapping[str, Any] | None = None,
    ) -> Search:
        """Learn the decays on the validation examples; the test examples are only watched."""
        decays = self.decays(sharing)

        parts = {"training": self.train, "validation": validation, "test": test}

        return Search(
            decays,
            self.start,
            solve=lambda params, step: self.solve(params, decays, settings=settings),
            validation_loss=lambda params: self.loss(params, validation),
            measure=lambda params: self.accuracies(params, parts),
            steps=steps,
            lr=DECAY_LR,
            most=MOST_LOG_DECAY,
        )

    def train_on(self, train: Part, test: Part, steps: int) -> Row:
        """As long a training on other examples, all decays as at the start: what the labels are worth as training."""
        params = self.train_with(self.decays("layer"), train, steps)
        return self.accuracies(params, {"training": train, "test": test})

    def train_with(self, log_decays: Params, train: Part, steps: int) -> Params:
        """A training from the start with fixed decays, as long as that many steps of a search; by `SETTINGS`."""
        params = self.start
        for _ in range(steps):
            found = self.solve(params, log_decays, train).value
            params = {name: p.detach() for name, p in found.items()}
        return params

    def accuracies(self, params: Params, parts: dict[str, Part]) -> Row:
        """``NAME_accuracy`` for each part, in percent."""
        with torch.no_grad():
            return {f"{name}_accuracy": accuracy(self.logits(params, p), p[1]) for name, p in parts.items()}


LR, INNER_STEPS, NEUMANN_STEPS = 0.1, 5, 5
SETTINGS: dict[str, Any] = {
    "solver": bl.GradientDescent(lr=LR, max_steps=INNER_STEPS, momentum=0.9),
    "hypergrad": bl.Implicit(bl.Neumann(alpha=LR, max_steps=NEUMANN_STEPS)),
}
LOG_DECAY, MOST_LOG_DECAY, DECAY_LR = -7.0, 2.0, 1.7
"""Where the log-decays start, how far they may go (gradient descent diverges where a decay is above 2 / lr), and Adam's
step on them."""


def decay_shape(parameter: Tensor, sharing: Sharing) -> tuple[int, ...]:
    """Shape of the decays of one parameter."""
    return tuple(parameter.shape) if sharing == "weight" else (1,) * parameter.dim()
