"""Workload G: how long the tools let their users wait before they do anything."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from applications.measurements.benchmarks.contest import BEFORE, Contestant, Round, Workload, timed

FEW_SHOT = ["-m", "applications.few_shot"]
SMALL = ["--width", "64", "--tasks", "2", "--steps", "1", "--validate-every", "0"]
PROGRAMS = {
    "bilevel: import bilevel": ["-c", "import bilevel"],
    "bilevel: few_shot --help": [*FEW_SHOT, "--help"],
    "bilevel: few_shot, evaluation of 120 tasks": [*FEW_SHOT, *SMALL, "--eval-tasks", "120", "--out"],
}
"""One that ends with ``--out`` is given a folder, which goes with it."""

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
    with tempfile.TemporaryDirectory() as folder:
        given = [str(Path(folder) / "run")] if words[-1] == "--out" else []
        subprocess.run([sys.executable, *words, *given], env=environment, cwd=root, check=True, capture_output=True)
