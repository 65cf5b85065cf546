"""Commands of the applications in children of this process, which has imported what they need: a start costs little."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from applications.frame import run

APPLICATIONS = (
    "few_shot",
    "data_cleaning",
    "search",
    "distillation",
    "reweighting",
    "equilibrium",
    "learned_optimizer_settings",
    "regularization",
    "sparse_regression",
)
ROOT = Path(__file__).parents[3]
TRACEBACK = 99
"""The exit code of a child that ended by an error that nobody caught."""


def start(application: str, arguments: Sequence[str], log: Path, seconds: int = 0, save_often: bool = False) -> int:
    """The number of a child that runs the command.

    Args:
        log: what it prints. seconds: after which it is killed; 0: never.
        save_often: a checkpoint after every step.
    """
    module = importlib.import_module(f"applications.{application}.__main__")
    child = os.fork()
    if child:
        return child
    code = TRACEBACK
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        # A folder that an option names without its place, such as --out=1e308, is made there and not in the checkout.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        os.chdir(log.parent)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.alarm(seconds)
        if save_often:
            run.CHECKPOINT_SECONDS = 0.0
        code = _code(module, application, list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code; of one that was killed, less the number of the signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def finish(application: str, arguments: Sequence[str], log: Path, seconds: int = 0) -> int:
    """Run a command to its end."""
    return wait(start(application, arguments, log, seconds))


def kill_after(child: int, seconds: float) -> bool:
    """Whether it was killed, and had not ended before."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def processor_seconds(child: int) -> float:
    """What it used of the processor."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(child: int, seconds: float) -> None:
    """Until it has used so much of the processor."""
    while processor_seconds(child) < seconds:
        time.sleep(0.1)


def _code(module: Any, application: str, arguments: list[str]) -> int:
    try:
        if application == "few_shot":
            return module.main(arguments)
        return module.main(application, arguments, module.Config, module.story, getattr(module, "tunable", None))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
