"""What a run costs: seconds and memory, on the host and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .._torch import profiled_events

MEBIBYTE = 2**20


def median_seconds(run: Callable[[], object], repeats: int = 5, *, warm_up: bool = False) -> float:
    """The median of a few runs, each until the device has ended what it was given; before them one that is not timed.

    Args:
        warm_up: whether there is such a run.
    """
    if warm_up:
        run()
    seconds = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def peak_mib(run: Callable[[], object]) -> float:
    """Peak of the tensor memory that was live during a run, above that at its start, MiB."""
    if _on_gpu():
        wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        wait()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profiled_events(profile)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak / MEBIBYTE


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def wait() -> None:
    """Until the GPU, where one is in use, has ended what it was given."""
    if _on_gpu():
        torch.cuda.synchronize()
