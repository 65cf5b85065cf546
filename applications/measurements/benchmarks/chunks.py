"""Workload A-chunks: memory and time of a meta-step against the tasks that are worked on at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from applications.measurements.benchmarks.contest import Contestant
from applications.measurements.benchmarks.meta_step import MetaStep

THREADS, SIZES = (1, 2), (1, 2, 4, 8)


@dataclass(frozen=True)
class Chunks(MetaStep):
    """Workload A by ours alone, whose gradients are checked there: threads, and tasks in the tensor program of each."""

    tolerance: ClassVar[float | None] = None

    def title(self) -> str:
        """See `Workload`."""
        return f"{super().title()}: memory and time against tasks at a time"

    def reference(self) -> None:
        """None is needed."""

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return {
            f"bilevel, {threads} x {size}": lambda threads=threads, size=size: self.ours(  # type: ignore[misc]
                threads=threads, chunk_size=size
            )
            for threads in THREADS
            for size in SIZES
        }
