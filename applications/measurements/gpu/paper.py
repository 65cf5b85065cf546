"""``python -m applications.measurements.gpu.paper RUN SECONDS DEVICE [option ...]``: a training for so long.

It begins or goes on, is asked to stop when four fifths of the time are over (in a rehearsal on a CPU after a few
steps), and is evaluated where it stands; the next call goes on from there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

STOPPING = 60.0
"""Seconds to end a step and write the checkpoint, at most."""

REHEARSED_STEPS = 3
"""Steps that a training makes in a rehearsal, if there is time for them."""


def main(run: str, seconds: str, device: str, *options: str) -> int:
    """The exit code of what failed, 0 where nothing did; options are those of a new training."""
    few_shot, path = [sys.executable, "-m", "applications.few_shot"], Path(run)
    where = ["--resume", run] if (path / "config.json").exists() else ["--out", run, "--device", device, *options]
    metrics = path / "metrics.jsonl" if device == "cpu" else None
    ended = trained([*few_shot, *where], 0.8 * float(seconds), metrics)
    if ended not in (0, 128 + signal.SIGTERM):
        return ended
    tasks = ["--eval-tasks", "20"] if device == "cpu" else []
    return subprocess.run([*few_shot, "evaluate", run, "--device", device, *tasks]).returncode


def trained(command: list[str], seconds: float, metrics: Path | None = None) -> int:
    """The exit code of a training that is asked to stop after so many seconds, or so many rows of its ``metrics``."""
    enough = _rows(metrics) + REHEARSED_STEPS
    deadline = time.monotonic() + seconds
    with subprocess.Popen(command) as training:
        while training.poll() is None and time.monotonic() < deadline and _rows(metrics) < enough:
            time.sleep(0.2)
        if training.poll() is None:
            training.send_signal(signal.SIGTERM)
        return training.wait(STOPPING)


def _rows(metrics: Path | None) -> int:
    return metrics.read_text().count("\n") if metrics is not None and metrics.exists() else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
