"""What is learned: a learning rate at a few points of the run and a momentum, and the step rule that uses them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import bilevel as bl


@dataclass(frozen=True)
class Settings:
    """The hyperparameters, without bounds: Adam may move them freely.

    Attributes:
        log_lr: ``[points]``, the logarithm of the learning rate at points spread evenly from the first step to the
            last; in between it is interpolated linearly.
        logit: of the momentum, which is its sigmoid.
    """

    log_lr: Tensor
    logit: Tensor

    @classmethod
    def constant(cls, lr: float, momentum: float, points: int, dtype: torch.dtype = torch.float32) -> Settings:
        """One learning rate for all steps; both require grad."""
        logit = math.log(momentum / (1 - momentum))
        log_lr = torch.full((points,), math.log(lr), dtype=dtype)
        return cls(log_lr.requires_grad_(), torch.tensor(logit, dtype=dtype, requires_grad=True))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.log_lr, self.logit]

    def rule(self, steps: int) -> ScheduledSGD:
        """The step rule of a run of this many steps."""
        return ScheduledSGD(momentum=self.logit.sigmoid(), log_lr=self.log_lr, steps=steps)

    @torch.no_grad()
    def numbers(self, steps: int) -> tuple[list[float], float]:
        """The learning rate of each step and the momentum, for any optimizer."""
        rule = self.rule(steps)
        return [rule.rate(index).item() for index in range(steps)], float(self.logit.sigmoid())


@dataclass(frozen=True)
class ScheduledSGD(bl.SGD):
    """SGD with momentum whose learning rate runs through control points.

    ``bl.SGD(lr=tensor)`` has a learning rate for each step, so forward mode would carry one derivative for each. Here
    the hyperparameters are the control points, and it carries as many derivatives as there are of those
    (hyperparameter sharing: Micaelli and Storkey 2021).
    """

    lr: float = 1.0
    log_lr: Tensor = field(default_factory=lambda: torch.zeros(1))
    steps: int = 1

    def step(self, y: Tensor, g: Tensor, state: dict[str, Tensor], index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `bl.SGD`; from the origin and with ``lr = 1`` its step is the direction, sign reversed."""
        reverse, state = super().step(torch.zeros_like(y), g, state, index)
        return y + self.rate(index) * reverse, state

    def rate(self, index: int) -> Tensor:
        """The learning rate of step ``index``, from 0."""
        last = len(self.log_lr) - 1
        place = last * index / max(self.steps - 1, 1)
        left = min(int(place), max(last - 1, 0))
        weight = place - left
        return ((1 - weight) * self.log_lr[left] + weight * self.log_lr[min(left + 1, last)]).exp()
