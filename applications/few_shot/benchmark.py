"""Peak memory and time of one meta-gradient against the number of inner steps, each in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import bilevel as bl
from applications.few_shot import data, plots
from applications.few_shot.config import Config, Method
from applications.few_shot.methods import meta_step
from applications.few_shot.train import METHOD_NAMES, create_learner, create_sampler, set_up_device
from applications.frame import measurement, memory
from applications.frame.command import PLACE, require, require_each_once
from applications.frame.errors import UserError
from applications.frame.run import CLOCKS
from applications.frame.run_folder import RunFolder

DEFAULTS = Config(inner_lr=0.01, queries=15, cg_steps=5, width=64, safeguard=False)

UNROLLED: dict[str, tuple[str, Any]] = {
    "maml-checkpoint": ("MAML, checkpoints", bl.Unroll(checkpoint=True)),
    "maml-mixed": ("MAML, mixed mode", bl.Unroll(mode="mixed")),
    "maml-mixed-checkpoint": ("MAML, mixed mode, checkpoints", bl.Unroll(checkpoint=True, mode="mixed")),
    "maml-tree": ("MAML, tree of checkpoints", bl.Unroll(checkpoint="tree")),
    "maml-forward": ("MAML, forward gradient", bl.ForwardGradient(to_init=True)),
}
"""Other ways to the gradient of MAML's steps; the last is an estimate along one random direction."""
NAMES = {**METHOD_NAMES, **{way: name for way, (name, _) in UNROLLED.items()}}
Way = Method | Literal["maml-checkpoint", "maml-mixed", "maml-mixed-checkpoint", "maml-tree", "maml-forward"]


@dataclass(frozen=True)
class Benchmark:
    """Measure methods at growing numbers of inner steps, on episodes of one data set."""

    methods: tuple[Way, ...] = ("imaml", "maml")
    """Methods to compare; MAML in several ways."""
    inner_steps: tuple[int, ...] = (10, 100, 1000)
    """Numbers of inner steps."""
    tasks: int = 2
    """Tasks in a meta-gradient."""
    repeats: int = 3
    """Meta-gradients that are timed; the median counts."""
    clock: Literal["wall", "cpu"] = "wall"
    """What seconds are: of the wall, or of work, which other programs on the machine do not lengthen."""
    out: Path = Path("runs/few_shot-benchmark")
    """Folder of the table (benchmark.json, table.md) and the plot (memory.png); earlier ones are replaced."""
    config: Config = DEFAULTS
    """Everything else, as in train."""


@dataclass(frozen=True)
class Measurement:
    """One row.

    Attributes:
        peak_mib: peak memory of a meta-gradient above what the process held before it, MiB; None: not run.
        seconds: median time of a meta-gradient; None: not run.
        note: why it was not run.
    """

    method: str
    inner_steps: int
    peak_mib: float | None
    seconds: float | None
    note: str = ""


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("few_shot benchmark", arguments, Benchmark, partial(run, arguments=arguments), check)


def check(settings: Benchmark) -> None:
    """Refuse what cannot be run, before anything is."""
    few = min(settings.inner_steps, default=0) < 1 or min(settings.repeats, settings.tasks) < 1
    require(not few, "--inner-steps, --repeats and --tasks must be at least 1.")
    require_each_once(settings, "methods", "inner_steps")
    given = [name for name in ("preset", *PLACE) if getattr(settings.config, name) != getattr(DEFAULTS, name)]
    require(not given, f"benchmark has no --config.{' and no --config.'.join(given)}.")
    settings.config.check()


def run(settings: Benchmark, arguments: list[str]) -> None:
    """Measure, print the table and write table, figures and plot."""
    device = set_up_device(settings.config)
    data.load(settings.config.data, settings.config.data_root, split=settings.config.split)  # cached for the processes
    rows: list[Measurement] = []
    for method in settings.methods:
        for steps in sorted(settings.inner_steps):
            rows.append(_in_own_process(settings, method, steps, rows))
            print(_line(rows[-1], settings.tasks), flush=True)
    folder = RunFolder(settings.out)
    threads = settings.config.threads or torch.get_num_threads()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {threads}"
    folder.write_json(
        "benchmark.json",
        {
            "command": "python -m applications.few_shot benchmark " + " ".join(arguments),
            "machine": machine,
            "torch": torch.__version__,
            "tasks": settings.tasks,
            "rows": [asdict(row) for row in rows],
        },
    )
    table = "\n".join([HEADER, *(_line(row, settings.tasks) for row in rows)]) + "\n"
    folder.write_text("table.md", table)
    folder.write_bytes("memory.png", plots.memory([asdict(row) for row in rows], NAMES, machine))
    print(f"\nTable, figures and plot are in {settings.out}")


HEADER = "| method | inner steps | peak memory (MiB) | seconds | tasks/s |\n| --- | ---: | ---: | ---: | ---: |"


def _line(row: Measurement, tasks: int) -> str:
    start = f"| {NAMES[row.method]} | {row.inner_steps} |"
    if row.peak_mib is None or row.seconds is None:
        return f"{start} {row.note} | | |"
    return f"{start} {row.peak_mib:.0f} | {row.seconds:.2f} | {tasks / row.seconds:.2f} |"


def _in_own_process(settings: Benchmark, method: Way, steps: int, rows: list[Measurement]) -> Measurement:
    unrolled = method in UNROLLED
    chosen = {"hypergrad": UNROLLED[method][1]} if unrolled else {}
    name: Any = "maml" if unrolled else method
    config = replace(settings.config, method=name, inner_steps=steps, tasks=settings.tasks)
    needed, available = _extrapolate(method, steps, rows), _available_mib(settings)
    if needed > 0.8 * available:
        note = f"not run: about {needed:.0f} needed, {available:.0f} there"
        return Measurement(method, steps, None, None, note)
    try:
        peak, seconds = memory.peak_and_seconds(measure, config, chosen, settings.clock, repeats=settings.repeats)
    except (BrokenProcessPool, torch.OutOfMemoryError):
        return Measurement(method, steps, None, None, "out of memory")
    return Measurement(method, steps, peak, seconds)


def _extrapolate(method: str, steps: int, rows: list[Measurement]) -> float:
    """Peak memory expected from the last two rows of the method, MiB; 0 where there are not two."""
    known = [(row.inner_steps, row.peak_mib) for row in rows if row.method == method and row.peak_mib is not None]
    if len(known) < 2:
        return 0.0
    (fewer, low), (more, high) = known[-2:]
    return high + max(0.0, high - low) / (more - fewer) * (steps - more)


def _available_mib(settings: Benchmark) -> float:
    if set_up_device(settings.config).type == "cuda":
        return torch.cuda.mem_get_info()[0] / memory.MEBIBYTE
    try:
        import psutil
    except ImportError as error:
        raise UserError("The benchmark needs psutil: pip install psutil.") from error
    return psutil.virtual_memory().available / memory.MEBIBYTE


def measure(config: Config, chosen: Mapping[str, Any], clock: str, repeats: int) -> tuple[float, float]:
    """Peak MiB above the start and median seconds of a meta-gradient; meant for a fresh process."""
    now = CLOCKS[clock]
    device = set_up_device(config)
    classes = data.load(config.data, config.data_root, split=config.split).train
    learner = create_learner(config, classes, device, chosen)
    with torch.no_grad():  # away from the zero head, where CG needs hardly a step
        for param in learner.meta.values():
            param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).to(param)
    sampler = create_sampler(config, classes, "train", config.queries, device)
    few = replace(learner, config=replace(config, inner_steps=1))
    meta_step(few, sampler.episodes(config.tasks, 0)).objective.backward()  # libraries allocate on their first use
    peak, seconds = 0.0, []
    for repeat in range(repeats):
        episodes = sampler.episodes(config.tasks, repeat)
        before = memory.reset_peak(device)
        begin = now()
        meta_step(learner, episodes).objective.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(now() - begin)
        peak = max(peak, memory.peak(device) - before)
    return peak, statistics.median(seconds)
