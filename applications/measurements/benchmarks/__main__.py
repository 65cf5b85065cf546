"""``python -m applications.measurements.benchmarks``: workloads A to G, ours and the peers, side by side in one run."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from applications.frame import measurement, schema
from applications.frame.command import require_each_once
from applications.frame.device import select_device
from applications.frame.errors import UserError
from applications.frame.figures import OURS
from applications.frame.run_folder import RunFolder
from applications.measurements.benchmarks import report
from applications.measurements.benchmarks.contest import AS_BEFORE, BEFORE, timed
from applications.measurements.benchmarks.meta_step_task import FewShot
from applications.measurements.benchmarks.runner import contest
from applications.measurements.benchmarks.workloads import KINDS, NAMES

PACKAGES = ("torch", "torchopt", "jaxopt", "jax", "higher", "scipy")


@dataclass(frozen=True)
class Config:
    """Time contestants on fixed workloads; a gradient that is not that of the float64 reference has no time."""

    workloads: tuple[str, ...] = ("A", "B", "C-10-steps", "C-100-steps", "C-1000-steps", "D-cleaning", "D-penalties")
    """Workloads; also A-4-tasks, A-32-tasks, A-128-tasks, A-20-way, A-chunks, B-large, E-ridge-9, E-ridge-100,
    E-logistic-30, E-network, E-batch, F, G."""
    peer: Literal["all", "none"] = "all"
    """Run the other libraries that are installed, or ours alone."""
    only: tuple[str, ...] = ()
    """Contestants by name, instead of all."""
    data_root: Path | None = None
    """Folder with Omniglot and MNIST; without it glyphs and scikit-learn's digits."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the meta-steps of A and C are made; the other workloads are for CPUs."""
    rounds: int = 3
    """Turns of every contestant, each a process of its own."""
    runs: int = 2
    """Runs in a turn, after one that warms up."""
    timeout: float = 600.0
    """Seconds for a turn, after which it is given up."""
    before: Path | None = None
    """Another checkout, whose library and applications do ours once more, in turn."""
    against: Path | None = None
    """Results to compare with; the command fails where a figure of ours has grown by more than ``--allowed``."""
    allowed: float = 1.3
    """Growth that is nobody's fault."""
    out: Path = Path("runs/benchmarks")
    """Folder of results.json, tables.md and the pictures; the results of other workloads in it are kept."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for bad input, which is told in one message."""
    told, work = "Interrupted; the workloads that were done are in the folder.", partial(run, arguments=arguments)
    return measurement.main("measurements.benchmarks", arguments, Config, work, check, told)


def run(settings: Config, arguments: list[str]) -> int:
    """All workloads; the folder is written after each."""
    folder = RunFolder(settings.out)
    results = kept_results(folder, "results.json") if (settings.out / "results.json").exists() else {}
    for name in settings.workloads:
        kind, changes = NAMES[name]
        changes = dict(changes)
        if settings.data_root is not None and hasattr(KINDS[kind], "root"):
            changes["root"] = str(settings.data_root)
        if settings.device != "cpu":
            changes["device"] = settings.device
        workload = KINDS[kind](**changes)
        names = [n for n in workload.contestants() if settings.peer == "all" or n.startswith(OURS)]
        names = [n for n in names if not settings.only or n in settings.only]
        if settings.before is not None:
            os.environ[BEFORE] = str(settings.before.resolve())
            names = [n for name in names for n in ([name, name + AS_BEFORE] if name.startswith(OURS) else [name])]
        if not names:
            raise UserError(f"--only names no contestant of {name}: there are {', '.join(workload.contestants())}.")
        print(f"\n{workload.title()}", flush=True)
        entry: dict[str, Any] = {
            "title": workload.title(),
            "command": "python -m applications.measurements.benchmarks " + shlex.join(arguments),
            "machine": machine(settings.device),
            "matmul_gflops": matmul_gflops(settings.device),
            "flops": workload.flops(),
            "rows": [],
        }
        for row in contest(kind, changes, names, settings.rounds, settings.runs, settings.timeout):
            entry["rows"].append(row.to_json())
            print(f"  {row.name}: {row.note or f'{row.median:.3g} s'}", flush=True)
        kept = name if settings.device == "cpu" else f"{name}-{settings.device}"
        results[kept] = entry
        settings.out.mkdir(parents=True, exist_ok=True)
        folder.write_json("results.json", results)
        folder.write_bytes(f"{kept}.png", report.picture(entry))
        folder.write_text("tables.md", "\n".join(["# Tables\n", *map(report.table, results.values())]))
        print(report.table(entry), flush=True)
    return 0 if settings.against is None else compare(results, settings)


def compare(results: dict[str, Any], settings: Config) -> int:
    """Tell how the figures stand to the ones that were kept; 1 where one has grown too much."""
    assert settings.against is not None
    kept = kept_results(RunFolder(settings.against.parent), settings.against.name)
    found = report.changes({name: results[name] for name in settings.workloads}, kept)
    for name, ratio in found.items():
        print(f"{ratio:5.2f} times the kept figure: {name}{'  <- slower' if ratio > settings.allowed else ''}")
    if not found:
        raise UserError(f"--against {settings.against} has none of the figures of {', '.join(settings.workloads)}.")
    return int(max(found.values()) > settings.allowed)


def kept_results(folder: RunFolder, name: str) -> dict[str, Any]:
    """Workload -> what an earlier call measured, from its file."""
    found: dict[str, Any] = folder.read_json(name)
    schema.check(found, dict[str, report.Entry], folder.path / name, "file of results")
    return found


def check(settings: Config) -> None:
    """Bad options, told before anything runs."""
    require_each_once(settings, "workloads")
    unknown = [name for name in settings.workloads if name not in NAMES]
    if unknown:
        raise UserError(f"There is no workload {', '.join(unknown)}. There are {', '.join(NAMES)}.")
    select_device(settings.device)
    elsewhere = [name for name in settings.workloads if not issubclass(KINDS[NAMES[name][0]], FewShot)]
    if settings.device != "cpu" and elsewhere:
        raise UserError(f"--device {settings.device}: {', '.join(elsewhere)} is for CPUs. Name A or C by --workloads.")
    if settings.rounds < 1 or settings.runs < 1 or not settings.timeout > 0:
        raise UserError("--rounds, --runs and --timeout must be positive.")
    if settings.before is not None and not (settings.before / "bilevel").is_dir():
        raise UserError(f"--before {settings.before} is no checkout of bilevel.")
    if settings.against is not None and not settings.against.exists():
        raise UserError(f"--against {settings.against} does not exist.")
    if settings.data_root is not None and not settings.data_root.is_dir():
        raise UserError(f"--data-root {settings.data_root} is no folder.")


def machine(device: str) -> dict[str, Any]:
    """What the times depend on."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        "cpu": cpu,
        **gpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def matmul_gflops(device: str, repeats: int = 9) -> float:
    """The rate of a float32 matrix product on all threads, or on the GPU; the best of a few."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = [timed(lambda: a @ b)[0] for _ in range(repeats)]
    return 2 * size**3 / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
