"""Workload F: one meta-gradient of a few-shot training as people train, on small maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from applications.frame import memory
from applications.measurements.benchmarks.contest import Contestant
from applications.measurements.benchmarks.meta_step import MetaStep
from applications.measurements.benchmarks.peers_meta_step import contestants


@dataclass(frozen=True)
class TrainingStep(MetaStep):
    """Workload A with the settings that the few-shot application trains with: Conv4-64 with strides in place of pools,
    5 query images a class, lambda 1, gradient steps of 0.1, then 2 CG steps.

    Ours safeguards its steps there, which costs one more evaluation of the loss; the row "no safeguard" does what the
    peers do. No step raises a loss here, so that the gradients are the same.
    """

    inner_steps: int = 5

    letter: ClassVar[str] = "F"
    strength: ClassVar[float] = 1.0
    inner_lr: ClassVar[float] = 0.1
    cg_steps: ClassVar[int] = 2
    queries: ClassVar[int] = 5
    halve: ClassVar[Literal["pool", "stride"]] = "stride"

    def title(self) -> str:
        """See `Workload`."""
        name = "glyphs" if self.root is None else "Omniglot"
        return f"F: one training step of implicit MAML, {name} {self.ways}-way 1-shot, {self.tasks} tasks, strides"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        own = {
            "bilevel": lambda: self.trained(safeguard=True),
            "bilevel, no safeguard": lambda: self.trained(),
            "bilevel, one thread": lambda: self.trained(safeguard=True, threads=1),
        }
        return {**own, **contestants(self)}

    def trained(self, **changes: Any) -> Contestant:
        """The application in a process like that of its training, which keeps freed memory where it knows how to."""
        getattr(memory, "keep_freed", lambda: None)()
        return self.ours(**changes)
