"""A contestant in a process of its own: ``... benchmarks.worker WORKLOAD SETTINGS NAME FOLDER RUNS``.

It prepares the problem, does the work once to warm up, then ``RUNS`` times more, and writes what it found into
``FOLDER``: ``rounds.json``, and ``answer.npy`` where the workload has an answer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.frame import memory
from applications.measurements.benchmarks.contest import NotHere
from applications.measurements.benchmarks.workloads import KINDS


def main(kind: str, settings: str, name: str, folder: str, runs: str) -> None:
    """Where the contestant is not installed, its message is in ``rounds.json``."""
    workload = KINDS[kind](**json.loads(settings))
    try:
        contestant = workload.contestants()[name]()
    except NotHere as error:
        write(Path(folder), {"not_here": str(error)})
        return
    device, rounds = torch.device(workload.device), []
    if workload.warm_up:
        contestant()
    before = memory.reset_peak(device)
    for _ in range(int(runs)):
        rounds.append(contestant())
    found = {
        "rounds": [{**asdict(one), "answer": None} for one in rounds],
        "peak_mib": memory.peak(device) - before,
        "resident_mib": memory.peak(device),
        "threads": torch.get_num_threads(),
    }
    if rounds[-1].answer is not None:
        np.save(Path(folder) / "answer.npy", rounds[-1].answer)
    write(Path(folder), found)


def write(folder: Path, found: dict[str, Any]) -> None:
    (folder / "rounds.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
