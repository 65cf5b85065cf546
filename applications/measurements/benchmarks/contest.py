"""What a workload and its contestants are: the protocol between the problems and the runner.

A workload is a frozen dataclass of plain values: each contestant rebuilds the problem from it in a process of its own,
so that no library sees another's memory, threads or caches.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """One run of a workload.

    Attributes:
        seconds: wall time of the timed part alone; infinite where a target was not reached.
        answer: the gradient, flat float64, to be compared with the reference; None where the workload has none.
        facts: plain values for the report: step counts, products, the curve of a time to a solution.
    """

    seconds: float
    answer: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Contestant(Protocol):
    """A prepared problem; every call does the whole work once more, from the same start."""

    def __call__(self) -> Round: ...


class Workload(ABC):
    """A problem with settings of plain values (a frozen dataclass), and who does it how.

    Attributes:
        letter: ``"A"`` ... ``"D"``. device: where memory is measured.
        tolerance: largest relative error of an answer that counts; None: no answer.
        warm_up: the first run is no measurement: libraries compile and allocate. Memory is measured after it.
        repeats: more than one run says something.
    """

    letter: ClassVar[str]
    device: str = "cpu"
    tolerance: ClassVar[float | None] = None
    warm_up: ClassVar[bool] = True
    repeats: ClassVar[bool] = True

    @abstractmethod
    def title(self) -> str:
        """One line that names the sizes."""

    @abstractmethod
    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """Name -> builder. A builder imports its library when it is called, and raises `NotHere` without it."""

    def reference(self) -> np.ndarray | None:
        """The answer in float64, by means that share no code with `bilevel`: ``[n]``, or ``[tasks, n]`` for a gradient
        of each task; with a dimension more in front, several of which each is right."""
        return None

    def flops(self) -> float | None:
        """Floating-point operations of a run; None: not counted."""
        return None


BEFORE = "BILEVEL_BENCH_BEFORE"
"""The variable that names another checkout to the processes of contestants whose name ends in `AS_BEFORE`."""
AS_BEFORE = ", before"


class NotHere(Exception):
    """A peer that is not installed, with what to do about it."""


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds, those of a GPU with it, and what ``work`` returned."""
    _wait()
    begin = time.perf_counter()
    found = work()
    _wait()
    return time.perf_counter() - begin, found


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def needs(module: str) -> Any:
    """A peer from PyPI, imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f'{module} is not installed: pip install -e ".[bench]"') from error


def checkout(module: str, variable: str, repository: str) -> Any:
    """A peer that is not on PyPI, imported from the folder of its checkout that an environment variable names."""
    folder = os.environ.get(variable)
    if not folder:
        raise NotHere(f"{repository} is not on PyPI: clone it from GitHub and set {variable} to its folder")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"{variable}={folder} holds no {module}: {error}") from error
