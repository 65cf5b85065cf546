"""Workload C: memory of a meta-gradient against the number of inner steps, beside a library that unrolls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import bilevel as bl
from applications.frame.figures import OURS
from applications.measurements.benchmarks.contest import Contestant, Round, timed
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
        from applications.few_shot.benchmark import UNROLLED  # an earlier commit, which --before loads, has none

        others = {"MAML": bl.Unroll(), **dict(UNROLLED.values())}
        ways = {f"{OURS}, {name}": method for name, method in others.items()}
        return {
            OURS: lambda: self.ours(),
            **{name: lambda method=method: self.maml(method) for name, method in ways.items()},  # type: ignore[misc]
            "higher": lambda: task_by_task(self, higher),
        }

    def maml(self, hypergrad: Any) -> Contestant:
        """Ours through the steps, as `higher` goes."""
        learner, episodes = self.problem(method="maml")
        learner = replace(learner, chosen={"hypergrad": hypergrad})
        return lambda: Round(timed(lambda: self._gradient(learner, episodes))[0])
