"""The training runs: several small networks side by side, each with its own start and its own mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from applications.frame.data import load, split, standardised

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Features ``[n, d]`` and classes ``[n]`` of the three parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int

    @classmethod
    def read(cls, name: str, root: str | Path | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Data:
        """MNIST keeps its own test images, the rest 80 : 20; any other set is split 50 : 25 : 25.

        Features that are not images are standardised by the mean and deviation of the training part.

        Raises:
            UserError: as `load` and `split`.
        """
        examples = load(name, root)
        size = len(examples)
        if name == "mnist":
            rest, test = examples.official()
            train = int(0.8 * len(rest))
            parts = [*split(rest, (train, len(rest) - train), seed), test]
        else:
            train, validation = size // 2, size // 4
            parts = split(examples, (train, validation, size - train - validation), seed)
        first, second, third = (part.tensors(dtype) for part in standardised(*parts))
        return cls(first, second, third, examples.num_classes)


@dataclass(frozen=True)
class Networks:
    """``count`` networks with one hidden layer, all leaves stacked: ``[count, ...]``. One `bl.argmin` trains them all.

    Args:
        batch: examples of a mini-batch, drawn with replacement; 0: all examples in every step.
    """

    data: Data
    count: int = 4
    hidden: int = 32
    batch: int = 32

    def start(self, seed: int) -> Params:
        """Fresh weights (He et al. 2015), each network its own."""
        generator = torch.Generator().manual_seed(seed)
        features, classes = self.data.train[0].shape[1], self.data.num_classes

        def layer(inputs: int, outputs: int, gain: float) -> Tensor:
            weights = torch.randn(self.count, inputs, outputs, generator=generator)
            return (weights * (gain / inputs) ** 0.5).to(self.data.train[0].dtype)

        first, second = layer(features, self.hidden, 2.0), layer(self.hidden, classes, 1.0)
        biases = first.new_zeros(self.count, 1, self.hidden), first.new_zeros(self.count, 1, classes)
        return {"w1": first, "b1": biases[0], "w2": second, "b2": biases[1]}

    def train_loss(self, params: Params) -> Tensor:
        """One loss for each network ``[count]``, on a mini-batch of its own.

        The batch comes from PyTorch's default generator: where a hypergradient needs a step twice, the library draws
        the same numbers again.
        """
        features, classes = self.data.train
        if not self.batch:
            return losses(params, features, classes)
        chosen = torch.randint(len(features), (self.count, self.batch))
        return losses(params, features[chosen], classes[chosen])

    def validation_loss(self, params: Params) -> Tensor:
        """``[count]``."""
        return losses(params, *self.data.validation)


def outputs(params: Params, features: Tensor) -> Tensor:
    """Logits ``[count, n, classes]`` for features ``[n, d]``, or ``[count, n, d]``."""
    return torch.relu(features @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def losses(params: Params, features: Tensor, classes: Tensor) -> Tensor:
    """Mean cross entropy of each network ``[count]``."""
    logits = outputs(params, features)
    every = cross_entropy(logits.flatten(0, 1), classes.expand(logits.shape[:2]).flatten(), reduction="none")
    return every.view(len(logits), -1).mean(1)


def train(
    networks: Networks,
    lr: Sequence[float],
    momentum: float,
    seed: int,
    look: Callable[[int, Params], None] | None = None,
) -> Params:
    """A run as anyone would make it, by `torch.optim.SGD`, one learning rate for each step.

    Args:
        look: is shown the number of steps done and the params, after each step.
    """
    torch.manual_seed(seed)
    params = {name: leaf.requires_grad_() for name, leaf in networks.start(seed).items()}
    optimizer = torch.optim.SGD(params.values(), lr=lr[0], momentum=momentum)
    for step, rate in enumerate(lr, 1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        networks.train_loss(params).sum().backward()
        optimizer.step()
        if look:
            look(step, params)
    return {name: leaf.detach() for name, leaf in params.items()}


def seed_of(*numbers: int) -> int:
    """An independent seed for each tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
