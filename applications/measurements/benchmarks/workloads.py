"""The workloads by name: what ``--workloads`` takes."""

from __future__ import annotations

from typing import Any

from applications.measurements.benchmarks.chunks import Chunks
from applications.measurements.benchmarks.contest import Workload
from applications.measurements.benchmarks.hyperparameters import Hyperparameters
from applications.measurements.benchmarks.latency import Latency
from applications.measurements.benchmarks.meta_step import MetaStep
from applications.measurements.benchmarks.small import SmallProblem
from applications.measurements.benchmarks.small_task import NAMES as SMALL
from applications.measurements.benchmarks.solutions import Solutions
from applications.measurements.benchmarks.training_step import TrainingStep
from applications.measurements.benchmarks.unrolling import Unrolling

KINDS: dict[str, type[Workload]] = {
    kind.__name__: kind
    for kind in (MetaStep, Hyperparameters, Unrolling, Solutions, SmallProblem, TrainingStep, Latency, Chunks)
}

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "A": ("MetaStep", {}),
    "A-4-tasks": ("MetaStep", {"tasks": 4}),
    "A-32-tasks": ("MetaStep", {"tasks": 32}),
    "A-128-tasks": ("MetaStep", {"tasks": 128}),
    "A-chunks": ("Chunks", {}),
    "A-20-way": ("MetaStep", {"ways": 20}),
    "B": ("Hyperparameters", {}),
    "B-large": ("Hyperparameters", {"num_examples": 20_000, "num_features": 10_000}),
    "C-10-steps": ("Unrolling", {"inner_steps": 10}),
    "C-100-steps": ("Unrolling", {"inner_steps": 100}),
    "C-1000-steps": ("Unrolling", {"inner_steps": 1000}),
    "D-cleaning": ("Solutions", {"problem": "cleaning", "limit": 8.0}),
    "D-penalties": ("Solutions", {"problem": "penalties", "limit": 8.0}),
    **{f"E-{name}": ("SmallProblem", {"problem": name}) for name in SMALL},
    "F": ("TrainingStep", {}),
    "G": ("Latency", {}),
}
