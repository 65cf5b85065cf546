"""What can be chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import bilevel as bl
from applications.frame.command import DataKnobs, SolverKnobs, require, require_at_least_one, require_positive
from applications.frame.tune import rehearse_minimum
from applications.learned_optimizer_settings.learn import MOST_POINTS, ways


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """Learn the learning rate at a few points of a run, and the momentum, by the validation loss at its end."""

    steps: int = 200
    """Steps of SGD in a training run."""
    hidden: int = 32
    """Units of the network's hidden layer."""
    batch: int = 32
    """Examples of a mini-batch."""
    points: int = 6
    """Control points of the schedule; it is piecewise linear in the logarithm."""
    start_lr: float = 0.05
    """Learning rate that the schedule starts from."""
    start_momentum: float = 0.9
    """Momentum to start from."""
    hypergrad: Literal["unroll", "checkpoint", "forward"] = "unroll"
    """The same derivative: fastest; with memory of 2 sqrt(steps) steps; with memory of one step."""
    outer_steps: int = 40
    """Steps of Adam on the settings, and trials of each baseline."""
    outer_lr: float = 0.2
    """Learning rate of Adam on the settings, which are logarithms; it falls to 0 like a cosine."""
    networks: int = 4
    """Training runs in each outer step and in each trial; they run side by side."""
    windows: tuple[int, ...] = (20,)
    """Truncated hypergradients to compare with: steps that each one looks ahead."""
    fresh: int = 32
    """Networks, with starts and mini-batches of their own, on which all settings are compared at the end."""

    solver_settings = ("hypergrad", "outer_lr")

    length = "outer_steps"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        method, _ = ways(self.hypergrad, self.outer_lr, settings)
        rehearse_minimum({"solver": bl.Steps(bl.SGD(0.1), max_steps=2), "hypergrad": method})

    def replaced(self) -> Mapping[str, Collection[str]]:
        """See `SolverKnobs`."""
        return {"hypergrad": ("hypergrad",), "outer_lr": ("outer_lr",)}

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return ("windows",)

    def check(self) -> None:
        """See `SolverKnobs`."""
        require_at_least_one(self, "hidden", "batch", "outer_steps", "networks")
        require(self.steps >= 2, f"--steps is {self.steps}: at least 2 are needed.")
        require(self.fresh >= 2, f"--fresh is {self.fresh}: at least 2 are needed for a standard error.")
        most = min(self.steps, MOST_POINTS)
        require(1 <= self.points <= most, f"--points is {self.points}: a schedule has 1 to {most} of them here.")
        require_positive(self, "start_lr", "outer_lr")
        require(0 < self.start_momentum < 1, f"--start-momentum is {self.start_momentum}: it lies between 0 and 1.")
        for window in self.windows:
            require(
                1 <= window < self.steps,
                f"--windows has {window}: from 1 to less than the {self.steps} steps of a run make a window.",
            )
        require(len(set(self.windows)) == len(self.windows), "--windows has a number twice: leave one out.")
