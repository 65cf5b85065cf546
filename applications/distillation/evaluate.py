"""What a network makes of the test set after it was trained on a few images, learned or not, or on all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.distillation.data import Images, Parts
from applications.distillation.inner import Inner
from applications.distillation.networks import Params, accuracy, initial, outputs

ADAM_STEPS, ADAM_RATE = 200, 3e-3
"""Steps and rate of the ordinary training of a network on a few images: they are fitted by then."""


def test_accuracy(inner: Inner, images: Tensor, labels: Tensor, seeds: Sequence[int], test: Images) -> list[float]:
    """Test accuracies of the networks drawn by the seeds, each trained on the images by ``inner``."""
    found = []
    for seed in seeds:
        fit = inner.train(initial(inner.network, seed), images, labels, follow=False)
        found.append(accuracy(inner.network, fit.value, *test))
    return found


def by_adam(inner: Inner, images: Tensor, labels: Tensor, seeds: Sequence[int], test: Images) -> list[float]:
    """The same with ordinary training, no pull to the initialisation: do the images serve a training they never saw?"""

    def loss(params: Params) -> Tensor:
        return cross_entropy(outputs(inner.network, params, images), labels)

    solver = bl.TorchOptim(torch.optim.Adam, lr=ADAM_RATE, max_steps=ADAM_STEPS)
    found = []
    for seed in seeds:
        fit = bl.argmin(loss, initial(inner.network, seed), solver=solver, hypergrad=None)
        found.append(accuracy(inner.network, fit.value, *test))
    return found


def on_all_images(network: nn.Module, parts: Parts, seed: int, steps: int, batch: int = 128) -> float:
    """Test accuracy after Adam, its step size falling to zero, on batches of all training images: the ceiling."""
    params = {name: value.requires_grad_() for name, value in initial(network, seed).items()}
    generator = torch.Generator().manual_seed(seed)
    x, y = parts.train
    optimizer = torch.optim.Adam(params.values(), lr=ADAM_RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(y), (batch,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(outputs(network, params, x[chosen]), y[chosen]).backward()
        optimizer.step()
        falling.step()
    return accuracy(network, params, *parts.test)


def summary(found: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None
