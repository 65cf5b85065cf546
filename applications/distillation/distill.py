"""The outer loop: images that lower the loss, on real ones, of the network that was trained on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.distillation.data import Images, Parts
from applications.distillation.inner import Inner
from applications.distillation.networks import Params, accuracy, initial, outputs
from applications.frame.checkpoint import restore_optimizer
from applications.frame.run import Row

FIRST_NETWORK = 1_000_000
"""Seeds from here on draw the networks of distillation; those below are for evaluation only."""


@dataclass(frozen=True)
class Schedule:
    """Adam on batches of real images, its step size falling to zero along a half cosine.

    Attributes:
        batch: real images of a step.
        fresh: a new initialisation at every step; otherwise always that of the seed.
        warm: the inner solver starts from the last solution: for problems with one minimum, where it saves time.
        validate_every: steps between validations.
    """

    steps: int
    lr: float
    batch: int
    seed: int
    fresh: bool = False
    warm: bool = False
    validate_every: int = 10

    def lr_at(self, step: int) -> float:
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class Distillation:
    """A `Training` of the images: ``min over images of  E[cross-entropy of the trained network on real images]``."""

    def __init__(self, inner: Inner, images: Tensor, labels: Tensor, parts: Parts, schedule: Schedule):
        self.inner, self.labels, self.parts, self.schedule = inner, labels, parts, schedule
        self.steps = schedule.steps
        self.images = images.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images])
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.step = 0
        self.fit: bl.Solution | None = None
        self.warm: Params | None = initial(inner.network, schedule.seed) if schedule.warm else None

    def rows(self) -> Iterator[Row]:
        while self.step < self.steps:
            fit = self.fit = self.inner.train(self.start(), self.images, self.labels, guess=self.warm)
            x, y = self.real_batch()
            loss = cross_entropy(outputs(self.inner.network, fit.value, x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = self.schedule.lr_at(self.step)
            self.optimizer.step()
            self.step += 1
            if self.warm is not None:
                self.warm = {name: param.detach() for name, param in fit.value.items()}
            row = {
                "step": self.step,
                "loss": loss.item(),
                "inner_steps": int(fit.stats["num_steps"]),
                "inner_residual": fit.stats["residual_norm"].item(),
            }
            if fit.adjoint is not None:
                row["products"] = int(fit.adjoint.stats["num_steps"])
                row["adjoint_relative_residual"] = fit.adjoint.stats["relative_residual"].item()
            if self.step == 1 or self.step % self.schedule.validate_every == 0 or self.step == self.steps:
                row["validation"] = accuracy(self.inner.network, self.trained(), *self.parts.validation)
            yield row

    def start(self) -> Params:
        """The initialisation of this step."""
        seed = FIRST_NETWORK * (1 + self.schedule.seed) + self.step if self.schedule.fresh else self.schedule.seed
        return initial(self.inner.network, seed)

    def real_batch(self) -> Images:
        """Real training images: all of them where they fit into a batch."""
        train = self.parts.train
        if len(train.y) <= self.schedule.batch:
            return train
        chosen = torch.randint(len(train.y), (self.schedule.batch,), generator=self.generator)
        return Images(train.x[chosen], train.y[chosen])

    def trained(self) -> Params:
        """The network of the seed, trained on the images as they are now."""
        start = initial(self.inner.network, self.schedule.seed)
        value: Params = self.inner.train(start, self.images.detach(), self.labels, follow=False, guess=self.warm).value
        return value

    def state(self) -> dict[str, Any]:
        return {
            "images": self.images.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "warm": self.warm,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.images.copy_(state["images"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.warm, self.step = state["warm"], state["step"]
