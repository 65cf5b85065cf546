"""Step sizes: a number, or a function of the step number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

StepSize = float | Callable[[int], float]
"""A constant, or ``step_size(t)`` for the steps t = 0, 1, ..."""


@dataclass(frozen=True)
class Decay:
    """``lr / (1 + t / delay) ** power`` at step t: what mini-batches without variance reduction need to converge.

    Sums of the step sizes must diverge and those of their squares converge for the iterates to settle (Robbins
    and Monro 1951): ``power`` in (1/2, 1]. A slower decay forgets a bad start sooner.

    Args:
        lr: the first step size.
        power: 0 is a constant.
        delay: steps before the decay is felt.
    """

    lr: float
    power: float = 0.5
    delay: float = 1.0

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_positive("delay", self.delay)
        if not 0 <= self.power <= 1:
            raise ValueError(f"power is {self.power}: a decay between 0 (constant) and 1 (fastest) can converge.")

    def __call__(self, step: int) -> float:
        return self.lr / (1 + step / self.delay) ** self.power


def size_at(name: str, step_size: StepSize, step: int) -> float:
    """The step size of one step; a schedule's answer is checked, and named in the error."""
    return check_positive(name, step_size(step)) if callable(step_size) else float(step_size)


def check_step_size(name: str, step_size: StepSize) -> None:
    """Refuse a constant, or the first value of a schedule, that cannot be a step size."""
    size_at(name, step_size, 0) if callable(step_size) else check_positive(name, step_size)


def check_positive(name: str, value: float) -> float:
    """A positive finite float."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: a positive finite number is needed.")
    return float(value)


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: a whole number of at least {least} is needed.")
    return value
