"""``python -m applications.measurements.gpu.paper RUN SECONDS DEVICE [option ...]``: a training for so long.

It begins or goes on, is asked to stop when four fifths of the time are over, and is evaluated where it stands; the next
call goes on from there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

STOPPING = 60.0
"""Seconds to end a step and write the checkpoint, at most."""


def main(run: str, seconds: str, device: str, *options: str) -> int:
    """The exit code of what failed, 0 where nothing did; options are those of a new training."""
    few_shot, path = [sys.executable, "-m", "applications.few_shot"], Path(run)
    where = ["--resume", run] if (path / "config.json").exists() else ["--out", run, "--device", device, *options]
    ended = trained([*few_shot, *where], 0.8 * float(seconds))
    if ended not in (0, 128 + signal.SIGTERM):
        return ended
    tasks = ["--eval-tasks", "20"] if device == "cpu" else []
    return subprocess.run([*few_shot, "evaluate", run, "--device", device, *tasks]).returncode


def trained(command: list[str], seconds: float) -> int:
    """The exit code of a training that is asked to stop after so many seconds."""
    with subprocess.Popen(command) as training:
        try:
            return training.wait(seconds)
        except subprocess.TimeoutExpired:
            training.send_signal(signal.SIGTERM)
            return training.wait(STOPPING)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
