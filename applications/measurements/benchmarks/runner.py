"""Contests: every contestant in processes of its own, one at a time, in turn."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from applications.frame import memory
from applications.measurements.benchmarks.contest import AS_BEFORE, BEFORE, Workload, missing
from applications.measurements.benchmarks.workloads import KINDS

SUBSTITUTED = """
import sys
sys.path[0] = sys.argv.pop(1)
import applications.measurements.benchmarks as package
package.__path__[:] = [sys.argv.pop(1)]
from applications.measurements.benchmarks.worker import main
main(*sys.argv[1:])
"""
"""The worker of these benchmarks, with the library and the applications of another checkout."""


@dataclass
class Row:
    """A contestant's results.

    Attributes:
        seconds: of every run. error: lower quartile of the relative errors over tasks; None: no answer.
        beyond: tasks whose error is above the tolerance, of ``checked``.
        peak_mib: above what the process held at rest. note: why there is no result.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    beyond: int = 0
    checked: int = 0
    peak_mib: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.inf

    def to_json(self) -> dict[str, Any]:
        """Infinite times are null: JSON has none."""
        finite = [second if math.isfinite(second) else None for second in self.seconds]
        return {**asdict(self), "seconds": finite}


def contest(
    kind: str, settings: dict[str, Any], names: Sequence[str], rounds: int, runs: int, timeout: float
) -> Iterator[Row]:
    """Run the named contestants; a row is yielded as soon as it is complete, wrong answers without a time.

    Args:
        rounds: how often everybody has a turn; a turn is a process with a warm-up and ``runs`` runs.
        timeout: seconds for a turn.
    """
    workload = KINDS[kind](**settings)
    reference = workload.reference()
    if not workload.repeats:
        rounds = runs = 1
    rows = {name: Row(name, note=missing(name)) for name in names}
    for turn in range(rounds):
        for row in rows.values():
            if not row.note:
                _turn(workload, kind, settings, row, runs, timeout, reference)
            if turn == rounds - 1:
                if not row.note and workload.warm_up:
                    _measure_memory(kind, settings, row, timeout)
                yield row


def _turn(
    workload: Workload,
    kind: str,
    settings: dict[str, Any],
    row: Row,
    runs: int,
    timeout: float,
    reference: np.ndarray | None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = _work(kind, settings, row.name, Path(folder), runs, timeout)
        if "note" in found:
            row.note = found["note"]
            return
        if workload.tolerance is not None and reference is not None:
            errors = relative_errors(np.load(Path(folder) / "answer.npy"), reference)
            row.error, row.checked = float(np.quantile(errors, 0.25)), len(errors)
            row.beyond = int((~(errors <= workload.tolerance)).sum())
            if not row.error <= workload.tolerance:
                row.note = f"wrong: relative error {row.error:.1e}"
                row.seconds = []
                return
    row.seconds += [one["seconds"] for one in found["rounds"]]
    row.facts = {**found["rounds"][-1]["facts"], "threads": found["threads"], "resident_mib": found["resident_mib"]}


def _measure_memory(kind: str, settings: dict[str, Any], row: Row, timeout: float) -> None:
    with tempfile.TemporaryDirectory() as folder, memory.environment(memory.RETURN_FREED):
        row.peak_mib = _work(kind, settings, row.name, Path(folder), 1, 4 * timeout).get("peak_mib")


def relative_errors(answer: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Error of each task, ``||a - b|| / ||b||``, to the nearest of several references; a flat answer is one task."""
    answer, reference = np.atleast_2d(answer), np.atleast_2d(reference)
    if answer.shape != reference.shape[-2:]:
        return np.full(reference.shape[-2], np.inf)
    errors = np.linalg.norm(answer - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return errors.min(0) if errors.ndim == 2 else errors


def _work(kind: str, settings: dict[str, Any], name: str, folder: Path, runs: int, timeout: float) -> dict[str, Any]:
    program, others = ["-m", "applications.measurements.benchmarks.worker"], dict(os.environ)
    if name.endswith(AS_BEFORE):
        name, program = (
            name.removesuffix(AS_BEFORE),
            ["-c", SUBSTITUTED, os.environ[BEFORE], str(Path(__file__).parent)],
        )
    else:
        others.pop(BEFORE, None)
    command = [sys.executable, *program, kind, json.dumps(settings), name, str(folder), str(runs)]
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**others, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"note": f"not done after {timeout:.0f} s"}
    try:
        found: dict[str, Any] = json.loads((folder / "rounds.json").read_text())
    except FileNotFoundError:
        lines = done.stderr.strip().splitlines()
        if done.returncode < 0:
            return {"note": f"killed by signal {-done.returncode}: out of memory, perhaps"}
        return {"note": f"failed: {lines[-1] if lines else done.returncode}"}
    return {"note": found["not_here"]} if "not_here" in found else found
