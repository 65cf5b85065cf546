"""Workload C: memory of a meta-gradient against the number of inner steps, beside a library that unrolls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from applications.measurements.benchmarks.contest import Contestant
from applications.measurements.benchmarks.meta_step_task import FewShot
from applications.measurements.benchmarks.peers_meta_step import higher, task_by_task


@dataclass(frozen=True)
class Unrolling(FewShot):
    """Two tasks of workload A. `higher` differentiates the steps: its gradient is another one, and none is compared.

    The clock and the gradient of the implicit method are those of workload A.
    """

    tasks: int = 2
    inner_steps: int = 10

    letter: ClassVar[str] = "C"
    tolerance: ClassVar[float | None] = None
    repeats: ClassVar[bool] = False

    def title(self) -> str:
        """See `Workload`."""
        return f"C: memory of a meta-gradient through {self.inner_steps} inner steps, {self.tasks} tasks"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return {"bilevel": lambda: self.ours(), "higher": lambda: task_by_task(self, higher)}
