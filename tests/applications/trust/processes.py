"""Commands of the applications in children of this process, which has imported what they need: a start costs little."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil

from applications.frame import run

ROOT = Path(__file__).parents[3]
OVER, WAITED = signal.SIGPROF, 60
"""The signal that ends a child which used up its time of the processor, and the seconds that any may take."""
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a child leaves becomes a child of this process
LOADED_LATE = ("torch._dynamo", "matplotlib.pyplot", "scipy.stats", "applications.frame.tune.report")
"""What commands import when they need it, and each child would anew."""
TRACEBACK = 99
"""The exit code of a child that ended by an error that nobody caught."""


def start(application: str, arguments: Sequence[str], log: Path, seconds: float = 0, save_often: bool = False) -> int:
    """The number of a child that runs ``python -m applications.APPLICATION``.

    Args:
        log: what it prints. seconds: of the processor, after which it is killed by `OVER`; 0: never.
        save_often: a checkpoint after every step.
    """
    for module in (f"applications.{application}.__main__", *LOADED_LATE):
        importlib.import_module(module)
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
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(WAITED if seconds else 0)  # of one that waits for processes of its own
        if save_often:
            run.CHECKPOINT_SECONDS = 0.0
        code = _code(application, arguments)
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


def finish(application: str, arguments: Sequence[str], log: Path, seconds: float = 0) -> int:
    """Run a command to its end; where its time is limited, the processes that it left are ended too."""
    code = wait(start(application, arguments, log, seconds))
    for left in psutil.Process().children() if seconds else ():
        left.kill()
        left.wait()
    return code


def kill_after(child: int, seconds: float) -> None:
    """Kill it when it has used so much of the processor, unless it has ended before."""
    wait_for(child, seconds)
    os.kill(child, signal.SIGKILL)  # nobody has waited for it, so that its number is still its own
    wait(child)


def processor_seconds(child: int) -> float:
    """What it used of the processor."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(child: int, seconds: float) -> None:
    """Until it has used so much of the processor, or has ended."""
    while processor_seconds(child) < seconds and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


def _code(application: str, arguments: Sequence[str]) -> int:
    module = f"applications.{application}.__main__"
    sys.argv, _ = [module, *arguments], sys.modules.pop(module)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    return 0
