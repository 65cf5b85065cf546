"""A curve against time: points that lie ever further apart, measured while the clock stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bilevel import SolveError

Point = dict[str, Any]


def trace(
    step: Callable[[], float],
    measure: Callable[[], dict[str, float]],
    seconds: float,
    *,
    growth: float = 1.1,
    clock: Callable[[], float] = time.perf_counter,
    finished: Callable[[Point], bool] = lambda point: False,
) -> list[Point]:
    """Points at steps that grow by a factor until the time is over.

    A method that diverges stops with what it had, and ``"stopped"`` in its last point says why.

    Args:
        step: makes one; returns its cost in passes over a data set.
        measure: what a point has beside ``"step"``, ``"passes"`` and ``"seconds"``; its own time does not count.
        growth: that factor: 1.1 or, where a measurement is dear, more.
        clock: such as `time.process_time`, which other programs on the machine do not disturb.
        finished: whether a point is good enough to stop at.
    """
    points: list[Point] = [{"step": 0, "passes": 0.0, "seconds": 0.0, **measure()}]
    elapsed, passes, done, next_point = 0.0, 0.0, 0, 1
    while elapsed < seconds:
        begin = clock()
        try:
            while True:
                passes += step()
                done += 1
                if done >= next_point or elapsed + clock() - begin >= seconds:
                    break
        except SolveError as error:
            points[-1]["stopped"] = str(error)
            break
        elapsed += clock() - begin
        points.append({"step": done, "passes": passes, "seconds": elapsed, **measure()})
        if finished(points[-1]):
            break
        next_point = max(done + 1, int(growth * done))
    return points
