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
from importlib.util import find_spec
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


HYPERTORCH = "BILEVEL_BENCH_HYPERTORCH", "prolearner/hypertorch"
IMAML = "BILEVEL_BENCH_IMAML", "aravindr93/imaml_dev"
"""The variable that names the folder of a checkout, and its repository."""
CHECKOUTS = {"hypertorch": HYPERTORCH, "imaml_dev": IMAML}
MODULES = {"TorchOpt": "torchopt", "JAXopt": "jaxopt", "higher": "higher"}
"""What a contestant's name begins with, and what it needs."""


def missing(name: str) -> str:
    """Why the contestant of this name cannot run here, as far as is seen without an import; empty: it may."""
    for library, module in MODULES.items():
        if name.startswith(library) and find_spec(module) is None:
            return _not_installed(module)
    for library, (variable, repository) in CHECKOUTS.items():
        if name.startswith(library) and not os.environ.get(variable):
            return _not_cloned(variable, repository)
    return ""


def _not_installed(module: str) -> str:
    return f'{module} is not installed: pip install -e ".[bench]"'


def _not_cloned(variable: str, repository: str) -> str:
    return f"{repository} is not on PyPI: clone it from GitHub and set {variable} to its folder"


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
        raise NotHere(_not_installed(module)) from error


def checkout(module: str, variable: str, repository: str) -> Any:
    """A peer that is not on PyPI, imported from the folder of its checkout that an environment variable names."""
    folder = os.environ.get(variable)
    if not folder:
        raise NotHere(_not_cloned(variable, repository))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotHere(f"{variable}={folder} holds no {module}: {error}") from error
