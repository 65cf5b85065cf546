"""Workload G: how long the tools let their users wait before they do anything."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from applications.measurements.benchmarks.contest import BEFORE, Contestant, Round, Workload, timed

PROGRAMS = {
    "bilevel: import bilevel": ["-c", "import bilevel"],
    "bilevel: few_shot --help": ["-m", "applications.few_shot", "--help"],
}
FLOOR = ["-c", "import torch"]
"""What nobody can be faster than, in turn with each program."""


@dataclass(frozen=True)
class Latency(Workload):
    """Seconds from the start of a process to its end, and beside them those of ``import torch``.

    Args:
        repeats_of_each: processes of both in a run.
    """

    repeats_of_each: int = 3

    letter: ClassVar[str] = "G"
    warm_up: ClassVar[bool] = False

    def title(self) -> str:
        """See `Workload`."""
        return "G: latency of the tools, from the start of a process to its end"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return {name: partial(partial, wait, words, self.repeats_of_each) for name, words in PROGRAMS.items()}


def wait(words: list[str], repeats: int) -> Round:
    """The median time of a program, and the median of its ratio to the floor."""
    times = [tuple(timed(partial(start, program))[0] for program in (words, FLOOR)) for _ in range(repeats)]
    facts: dict[str, Any] = {"ratio": statistics.median(one / floor for one, floor in times), "to": "`import torch`"}
    return Round(statistics.median(one for one, _ in times), None, facts)


def start(words: list[str]) -> None:
    """One process, of this checkout or of that before."""
    root = os.environ.get(BEFORE) or str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, *words], env=environment, cwd=root, check=True, capture_output=True)
