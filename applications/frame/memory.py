"""Peak memory of a process, on the CPU by the system's own count and on a GPU by PyTorch's."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

MEBIBYTE = 2**20
T = TypeVar("T")

RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give freed tensors back at once: resident memory is then live memory. Slower, so not for the clock."""


def keep_freed() -> None:
    """Let glibc keep what is freed, for the next tensor: else a large one is new pages, which the system fills with
    zeros. Where the environment says what glibc shall do (``MALLOC_...``), and with another C library, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter, value in KEPT.items():
        mallopt(parameter, value)


KEPT = {-1: 2**30, -2: 2**26, -3: 2**30}
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes: what is free at the end of the heap before any is
given back, how much the heap grows by, and how large a tensor apart from it is."""


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """For the processes that are started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a fresh Python process: memory and clock see nothing else.

    Raises:
        BrokenProcessPool: the process was killed, for memory mostly.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BaseException:  # a signal: the pool would wait for the function to end
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _end_with_parent() -> None:
    """A process that waits for work would outlive the one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def peak_and_seconds(measure: Callable[..., tuple[float, float]], *arguments: Any, repeats: int) -> tuple[float, float]:
    """Peak of one repeat where freed memory goes back at once, and seconds of so many where it does not.

    ``measure(*arguments, repeats)`` gives both; each counts from a fresh process of its own.

    Raises:
        BrokenProcessPool: see `in_own_process`.
    """
    with environment(RETURN_FREED):
        peak, _ = in_own_process(measure, *arguments, 1)
    return peak, in_own_process(measure, *arguments, repeats)[1]


def reset_peak(device: torch.device) -> float:
    """Forget earlier peaks; what the process holds now, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MEBIBYTE
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak(device)


def peak_of(device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
    """What ``run`` returns, and the peak memory above what was held before, MiB."""
    before = reset_peak(device)
    return run(), peak(device) - before


def peak(device: torch.device) -> float:
    """Peak memory since the reset, MiB; where the system has no reset, since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MEBIBYTE
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MEBIBYTE if sys.platform == "darwin" else 1024)
