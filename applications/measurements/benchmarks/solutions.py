"""Workload D: seconds from a fixed start to a given validation loss, for data cleaning and per-feature penalties."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

import bilevel as bl
from applications.measurements.benchmarks.contest import Contestant, Round, Workload
from applications.measurements.benchmarks.ours_solutions import ours
from applications.measurements.benchmarks.peers_solutions import peers
from applications.measurements.benchmarks.solutions_task import Begin, Task, Truth, adam, noisy_digits, sparse_classes


@dataclass(frozen=True)
class Solutions(Workload):
    """Seconds until the validation loss has made ``part`` of the way that a long accurate run makes.

    Args:
        problem: ``"cleaning"``: digits of which half of the training labels are wrong, one weight for each training
            example. ``"penalties"``: 20 of 500 features tell the class, one penalty for each.
        root: folder of torchvision's MNIST, for cleaning; None: scikit-learn's digits.
        cache: folder that keeps the target, so that all processes run to the same one.
        limit: seconds for one run, without those of the measurements.
        small: a few seconds in all, for tests.
    """

    problem: Literal["cleaning", "penalties"] = "cleaning"
    root: str | None = None
    cache: str = "runs/benchmarks/cache"
    limit: float = 20.0
    part: float = 0.95
    small: bool = False
    seed: int = 0

    letter: ClassVar[str] = "D"
    warm_up: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def title(self) -> str:
        task = self.task
        data = "features" if self.problem == "penalties" else "MNIST" if self.root else "digits"
        return (
            f"Time to a solution, {self.problem}: {task.size} hyperparameters, {task.start()[0].numel()} weights, "
            f"{len(task.train[0])} training and {len(task.val[0])} validation examples ({data})"
        )

    @cached_property
    def task(self) -> Task:
        if self.problem == "penalties":
            train, val = sparse_classes(*((200, 40, 5) if self.small else (2000, 500, 20)), seed=self.seed)
            return Task("penalties", train, val, 5, 0.0, outer_lr=1.0, sgd_lr=train[0].shape[1] / 25)
        sizes = (200, 200) if self.small else (2500, 2500) if self.root else (800, 800)
        train, val = noisy_digits(self.root, *sizes, seed=self.seed)
        return Task("cleaning", train, val, 10, 1e-2, outer_lr=1.0, sgd_lr=len(train[0]) / 2)

    def reference(self) -> None:
        """No gradient is compared; this computes and keeps the target."""
        self.target()

    def target(self) -> dict[str, float]:
        """``start``, ``best`` and ``target``: losses of 40 steps of Adam with exact hypergradients; kept in a file."""
        settings = {**asdict(self), "cache": None, "limit": None, "root": self.root is not None}
        key = hashlib.sha256(json.dumps([settings, REFERENCE_STEPS, self.title()]).encode()).hexdigest()[:12]
        path = Path(self.cache) / f"solutions-{self.problem}-{key}.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text())
            return found
        truth, x, losses = Truth(self.task), np.zeros(self.task.size), []
        step = adam(x, self.task.outer_lr)
        for _ in range(REFERENCE_STEPS):
            losses.append(truth.loss(x))
            step(truth.hypergradient(x, rtol=1e-6))
        start, best = losses[0], min(losses)
        found = {"start": start, "best": best, "target": start - self.part * (start - best)}
        path.parent.mkdir(parents=True, exist_ok=True)
        bl.files.write_atomically(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        builders = {**ours(self.task), **peers(self.task)}
        return {name: partial(self._prepare, build) for name, build in builders.items()}

    def _prepare(self, build: Callable[[], Begin]) -> Contestant:
        begin, known = build(), self.target()
        begin()()  # compilation, and what libraries set up at their first step, is nobody's time to a solution
        return partial(race, Truth(self.task), known, self.limit, begin)


REFERENCE_STEPS = 40


def race(truth: Truth, known: dict[str, float], limit: float, begin: Begin) -> Round:
    """Run to the target or to the limit; the loss is that of the exact inner solution, found outside the clock.

    It is measured whenever the time has grown by half. Once the target is reached, bisection among the points kept
    since the last measurement (one for each percent of time) finds where.
    """
    truth.weights = np.zeros(truth.shape)
    curve = [[0.0, known["start"]]]
    kept: list[tuple[float, np.ndarray]] = []
    elapsed, steps, stopped, step = 0.0, 0, "", None
    while elapsed < limit and not stopped:
        clock = time.perf_counter()
        try:
            if step is None:
                step = begin()
            x = step()
        except (bl.SolveError, FloatingPointError, RuntimeError) as error:
            stopped = f"{type(error).__name__}: {error}"
        elapsed += time.perf_counter() - clock
        if stopped:
            break
        steps += 1
        if kept and elapsed < 1.01 * kept[-1][0]:
            continue
        kept.append((elapsed, np.asarray(x).astype(np.float64)))
        if not np.isfinite(kept[-1][1]).all():
            stopped = "diverged"
        elif elapsed > max(1.5 * curve[-1][0], limit / 100) or elapsed >= limit:
            curve.append([elapsed, truth.loss(kept[-1][1])])
            if not math.isfinite(curve[-1][1]):
                stopped = "diverged"
            if curve[-1][1] <= known["target"]:
                break
            kept = []
    if not curve[-1][1] <= known["target"]:  # nor is a NaN a solution
        return Round(
            math.inf, None, {"curve": curve, "steps": steps, **known, **({"stopped": stopped} if stopped else {})}
        )
    last = curve.pop()
    low, high = -1, len(kept) - 1
    while high - low > 1:
        middle = (low + high) // 2
        loss = truth.loss(kept[middle][1])
        low, high, last = (low, middle, [kept[middle][0], loss]) if loss <= known["target"] else (middle, high, last)
    # The last step may have begun just before the limit: what it reaches after it came too late.
    seconds = last[0] if last[0] <= limit else math.inf
    return Round(seconds, None, {"curve": [*curve, last], "steps": steps, **known})
