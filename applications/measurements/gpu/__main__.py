"""``python -m applications.measurements.gpu --minutes 8 --out DIR``: all that a GPU is asked for, in one call."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from applications.frame import measurement, schema
from applications.frame.command import require, require_each_once, require_positive
from applications.frame.device import select_device
from applications.frame.run_folder import RunFolder
from applications.measurements.gpu.parts import PARTS

SHARES = {
    "tests": 0.08,
    "captured": 0.08,
    "linear": 0.04,
    "precision": 0.06,
    "training-float32": 0.1,
    "training-tf32": 0.1,
    "training-bf16": 0.1,
    "peers-A": 0.12,
    "peers-C": 0.06,
    "peers-F": 0.08,
    "memory": 0.05,
    "large": 0.05,
}
"""The part of the time that each may take at most, in this order; what is left is for the paper's training."""

REHEARSED = 150.0
"""Seconds that a part may take at least in a rehearsal: a busy CPU needs many of them to start a process."""

TOLD = 4000
"""Characters of what a part printed that are kept."""


@dataclass(frozen=True)
class Config:
    """Measure on a GPU; each part is a process of its own, and results.json is written after each."""

    minutes: float = 8.0
    """All in all."""
    out: Path = Path("runs/gpu")
    """Folder of results.json, of what the parts wrote, and of the training, which a second call resumes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; cpu is a rehearsal with small sizes."""
    parts: tuple[str, ...] = (*SHARES, "paper")
    """Some of the parts."""
    preset: str = "paper-omniglot-5way-1shot"
    """The training of the part paper, of the few-shot application."""
    data_root: Path | None = None
    """Folder with Omniglot; without it glyphs, which are built in."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for bad input, which is told in one message."""
    told = "Interrupted; what was measured is in the folder."
    return measurement.main("measurements.gpu", arguments, Config, partial(run, arguments=arguments), check, told)


def check(settings: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    known = (*SHARES, "paper")
    require_each_once(settings, "parts")
    unknown = [part for part in settings.parts if part not in known]
    require(not unknown, f"--parts {' '.join(unknown)}: there are {', '.join(known)}.")
    require_positive(settings, "minutes")


def run(settings: Config, arguments: list[str]) -> int:
    """All parts; 1 where one failed."""
    device, begin = select_device(settings.device).type, time.monotonic()
    seconds, folder = 60 * settings.minutes, RunFolder(settings.out)
    settings.out.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    results: dict[str, Any] = {**_machine(device, arguments), "parts": known}
    for part in settings.parts:
        left = seconds - (time.monotonic() - begin)
        budget = left if part == "paper" else min(left, SHARES[part] * seconds)
        budget = max(budget, REHEARSED / 2) if device == "cpu" and part == "paper" else budget
        limit = max(budget, REHEARSED) if device == "cpu" or part == "paper" else budget  # that one ends by itself
        place = _place(settings, part)
        found = _in_own_process(_command(settings, part, device, budget), device, limit)
        found |= _trained(place)
        results["parts"][part] = found
        folder.write_json("results.json", results)
        print(f"{part}: {found['status']} in {found['seconds']:.0f} s", flush=True)
    return int(any(results["parts"][part]["status"] == "failed" for part in settings.parts))


def _known(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The parts that an earlier call measured."""
    path = folder.path / "results.json"
    if not path.exists():
        return {}
    found = folder.read_json(path.name)
    parts: Any = found.get("parts") if isinstance(found, dict) else found
    schema.check(parts, dict[str, dict[str, Any]], path, "file of results")
    return parts


def _trained(path: Path) -> dict[str, Any]:
    """What a training left in its folder: how far it came, and its evaluation where there was time for one."""
    folder = RunFolder(path)
    steps = folder.metrics()[-1:] if (path / "metrics.jsonl").exists() else []
    evaluations = sorted(path.glob("evaluation*.json"), key=lambda file: file.stat().st_mtime)
    return {
        **({"last_step": steps[0]} if steps else {}),
        **({"evaluation": folder.read_json(evaluations[-1].name)} if evaluations else {}),
    }


def _machine(device: str, arguments: list[str]) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if device == "cuda" else None
    packages = ("torch", "numpy", "scipy", "torchopt", "higher", "jaxopt", "jax", "torchvision")
    return {
        "command": "python -m applications.measurements.gpu " + shlex.join(arguments),
        "machine": card or platform.processor() or platform.machine(),
        "device": device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _command(settings: Config, part: str, device: str, seconds: float) -> list[str]:
    python = [sys.executable, "-m"]
    few_shot = [*python, "applications.few_shot", "--device", device]
    data = [] if settings.data_root is None else ["--data", "omniglot", "--data-root", str(settings.data_root)]
    capture = ["--capture"] if device == "cuda" else []
    if part in PARTS:
        place = [] if settings.data_root is None else [str(settings.data_root)]
        return [*python, "applications.measurements.gpu.parts", part, device, str(seconds), *place]
    if part == "tests":
        return [*python, "pytest", "-q", "-n", "0", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider"]
    if part.startswith("training-"):
        small = ["--width", "4", "--tasks", "2", "--inner-steps", "2"] if device == "cpu" else ["--width", "64"]
        precision = part.removeprefix("training-") if device == "cuda" else "float32"
        minutes = str(max(0.01, 0.8 * seconds / 60))  # the evaluation comes after it
        return [
            *(*few_shot, *data, *small, *capture, "--precision", precision, "--minutes", minutes),
            *("--steps", "1000000", "--eval-tasks", "20" if device == "cpu" else "600", "--out"),
            str(_place(settings, part)),
        ]
    small = ["--width", "4", "--tasks", "2", "--inner-steps", "2"] if device == "cpu" else []
    return [
        *(*python, "applications.measurements.gpu.paper", str(_place(settings, part)), str(seconds), device),
        *("--preset", settings.preset, *(data or ["--data", "glyphs"]), *capture, *small),
    ]


def _place(settings: Config, part: str) -> Path:
    """The folder of a training: the paper's goes on in a second call, the others begin anew."""
    path, count = settings.out / part, 2
    while part != "paper" and path.exists():
        path, count = settings.out / f"{part}-{count}", count + 1
    return path


def _in_own_process(command: list[str], device: str, seconds: float) -> dict[str, Any]:
    """What a part printed as JSON on its last line, or the end of what it printed; one that fails costs only itself."""
    begin = time.monotonic()
    environment = {**os.environ, "BILEVEL_TEST_DEVICE": device}
    if seconds <= 1:
        return {"status": "no time left", "seconds": 0.0, "command": shlex.join(command)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what it starts can be ended with it
    ) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
            status = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            _end(process.pid)
            printed, status = process.communicate()[0], "out of time"
        finally:
            _end(process.pid)
    result: dict[str, Any] = {
        "status": status,
        "seconds": time.monotonic() - begin,
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
    }
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    rows = [row for row in map(_row, lines) if row is not None]
    return {**result, "rows": rows} if rows else {**result, "printed": printed[-TOLD:]}


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
