"""Step sizes: a number, or a function of the step number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

StepSize = float | Callable[[int], float]
"""A constant, or ``step_size(t)`` for the steps t = 0, 1, ...; 0 or more, and 0 makes no step."""


@dataclass(frozen=True)
class Decay:
    """``lr / (1 + t / delay) ** power`` at step t: what mini-batches without variance reduction need to converge.

    Sums of the step sizes must diverge and those of their squares converge for the iterates to settle (Robbins
    and Monro 1951): ``power`` in (1/2, 1]. A slower decay forgets a bad start sooner.

    Args:
        lr: the first step size, 0 or more.
        power: 0 is a constant.
        delay: steps before the decay is felt.
    """

    lr: float
    power: float = 0.5
    delay: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("lr", self.lr)
        check_positive("delay", self.delay)
        if not 0 <= self.power <= 1:
            raise ValueError(f"power is {self.power}: a decay between 0 (constant) and 1 (fastest) can converge.")

    def __call__(self, step: int) -> float:
        return float(self.lr / (1 + step / self.delay) ** self.power)


class TorchSchedule:
    """The step sizes of a scheduler of `torch.optim.lr_scheduler`, as a function of the step number.

        inner_lr = TorchSchedule(0.1, CosineAnnealingLR, T_max=1000)
        outer_lr = TorchSchedule(0.1, lambda optimizer: SequentialLR(optimizer, [...], milestones=[100]))

    The scheduler runs on an optimizer of its own, once for each step number, so a method that is resumed, or a step
    that is tried again, has the sizes that it would have had.

    Args:
        lr: the step size that the scheduler starts from.
        scheduler: a class of `torch.optim.lr_scheduler`, or a function that makes one for a given optimizer.
        settings: passed on to ``scheduler``.

    Raises:
        TypeError: it makes no scheduler, or one that waits for a metric (``ReduceLROnPlateau``).
    """

    def __init__(self, lr: float, scheduler: Callable[..., LRScheduler], **settings: Any):
        self._optimizer: Optimizer = torch.optim.SGD([torch.zeros(1, device="cpu")], lr=check_not_negative("lr", lr))
        self._scheduler = scheduler(self._optimizer, **settings)
        if not isinstance(self._scheduler, LRScheduler) or isinstance(self._scheduler, ReduceLROnPlateau):
            raise TypeError(
                f"scheduler makes a {type(self._scheduler).__name__}: one of torch.optim.lr_scheduler that follows "
                "the number of steps alone is needed. With a metric, set the method's inner_lr or outer_lr yourself."
            )
        self._sizes = [self._now()]

    def __call__(self, step: int) -> float:
        while len(self._sizes) <= step:
            self._optimizer.step()
            self._scheduler.step()
            self._sizes.append(self._now())
        return self._sizes[step]

    def _now(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])


LONGEST_WARM_UP = 10_000
"""Steps after which a schedule that still does not fall counts as having no peak."""


def peak(step_size: StepSize) -> float:
    """The constant, or the first peak of a schedule: where a warm-up leads; that of a decay is its first value."""
    if not callable(step_size):
        return step_size
    highest = step_size(0)
    for step in range(1, LONGEST_WARM_UP):
        try:
            following = step_size(step)
        except Exception:  # a schedule may end, in an error of any kind, and then its last step is its peak
            break
        if not following >= highest:
            break
        highest = following
    return highest


ROUNDING = 1e-12
"""What a step size may fall below 0."""


def size_at(name: str, step_size: StepSize, step: int) -> float:
    """The step size of one step, checked, and named in the error."""
    if not callable(step_size):
        return check_not_negative(name, step_size)
    size = step_size(step)
    try:
        # Where a schedule ends at 0, rounding may leave it just below: 0.7 - 10 * 0.07 is -1e-16.
        return check_not_negative(name, 0.0 if _is_number(size) and -ROUNDING < size < 0 else size)
    except ValueError as error:
        raise ValueError(f"At step {step}, {error}") from error


def check_positive(name: str, value: float) -> float:
    """A positive finite float."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: a positive finite number is needed.")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """A finite float, 0 or more."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: a finite number is needed, 0 or more.")
    return float(value)


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: a whole number of at least {least} is needed.")
    return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
