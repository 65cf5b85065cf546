"""Workload E: one hypergradient of a small problem, where the time of the library itself is what users wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from applications.measurements.benchmarks.contest import Contestant, Workload
from applications.measurements.benchmarks.peers_small import contestants
from applications.measurements.benchmarks.small_task import NAMES, Small, small


@dataclass(frozen=True)
class SmallProblem(Workload):
    """The inner solve from its start and the backward pass, in float64, of a problem with known derivatives.

    Args:
        problem: of `small_task.NAMES`. seed: of everything that is drawn.
    """

    problem: str = "ridge-9"
    seed: int = 0

    letter: ClassVar[str] = "E"
    tolerance: ClassVar[float | None] = 1e-4
    warm_up: ClassVar[bool] = False  # a contestant does it when it is built; its memory says nothing

    def title(self) -> str:
        """See `Workload`."""
        model, batch, size, examples = NAMES[self.problem]
        what = {"ridge": "ridge regression", "logistic": "logistic regression", "network": "a 4-8-1 network"}[model]
        many = f"{batch[0]} times " if batch else ""
        return (
            f"E: one hypergradient, solve and backward: {many}{what}, {size} params, {examples} examples, CPU seconds"
        )

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return contestants(self.task)

    def task(self) -> Small:
        """The same in every process."""
        return small(self.problem, self.seed)

    def reference(self) -> np.ndarray:
        """See `Workload`: Newton's method with dense Hessians, in NumPy."""
        return self.task().hypergradient()
