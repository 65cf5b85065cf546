"""What an application gives to be tuned: a search space, and a training that any of its points can run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from torch import Tensor

import bilevel as bl
from applications.frame import memory
from applications.frame.device import select_device
from applications.frame.errors import UserError
from applications.frame.run import Training

Settings = dict[str, Any]
"""Names such as ``solver`` and ``hypergrad`` to what `bl.tuning.save` can write."""


POINTS = 3
"""At which the trial hears its score, and may be pruned."""


@dataclass(frozen=True)
class Tunable:
    """An application to be tuned.

    Attributes:
        score: what it is judged by, such as ``"validation accuracy (%)"``; never on test data.
        direction: which way is better.
        default: the parameters of a trial that make the settings in use today.
        suggest: from a trial to settings; their names are the arguments of the objects, as ``--solver`` reads them.
        train: ``train(settings, seed)`` begins a training of its own with this seed, and each time it is asked makes an
            outer step and yields its number from 1, the score (or a function that measures it, off the clock), and the
            inner solution or None.
        seconds: the default budget of a trial. steps: outer steps of a trial with several objectives.
        trials: how many of them a study makes by default.
    """

    score: str
    direction: Literal["minimize", "maximize"]
    default: Mapping[str, Any]
    suggest: Callable[[optuna.trial.BaseTrial], Settings]
    train: Callable[[Settings, int], Iterable[tuple[int, Any, bl.Solution | None]]]
    seconds: float
    steps: int
    trials: int = 30

    def settings(self, params: Mapping[str, Any]) -> Settings:
        """Those of a trial with these parameters."""
        return self.suggest(optuna.trial.FixedTrial(dict(params)))


def chosen(**parts: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The parameters of a trial that chose so, such as ``linear=("CG", {"max_steps": 10})``: of each part its name, and
    its settings behind a dot."""
    params: dict[str, Any] = {}
    for part, (name, settings) in parts.items():
        params |= {part: name, **{f"{part}.{setting}": value for setting, value in settings.items()}}
    return params


def follow(
    training: Training, score: Callable[[], float]
) -> Iterator[tuple[int, Callable[[], float], bl.Solution | None]]:
    """A `Training` as `Tunable.train` gives it: the score off the clock, the solution of its attribute ``fit``."""
    for row in training.rows():
        yield row["step"], score, getattr(training, "fit", None)


UNENDING = 10**9
"""Steps of a training that its time ends; a schedule that depends on their number is then constant."""


def read_settings(path: Path, names: Collection[str], application: str) -> Settings:
    """What a file of ``--solver`` holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        settings = bl.tuning.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--solver {path} cannot be used: {error}") from error
    if not settings or not set(settings) <= set(names):
        raise UserError(
            f"--solver {path} has {', '.join(settings) or 'nothing'}: {', '.join(map(repr, names))} are expected. "
            f"`python -m applications.{application} tune` writes such a file."
        )
    for name, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if name not in ("solver", "hypergrad") and not number:  # a step size, a strength, a tolerance, a count
            raise UserError(f"--solver {path}: {name!r} is {value!r}, and a positive number is expected.")
    return settings


def rehearse(solve: Callable[[Tensor], bl.Solution]) -> None:
    """Solve a problem of two unknowns and differentiate it: what no problem can use is told before any data are read.

    Args:
        solve: from a leaf ``[2]`` to a solution that depends on it.

    Raises:
        UserError: the solver is of other problems, or the hypergradient of other solvers.
    """
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with settings_usable():
        solve(x).value.sum().backward()


def rehearse_minimum(settings: Mapping[str, Any]) -> None:
    """`rehearse` a minimum with this ``solver`` and ``hypergrad``."""
    rehearse(lambda x: bl.argmin(lambda y: (y - x).square().sum(), torch.zeros_like(x), **settings, throw="ignore"))


@contextmanager
def settings_usable() -> Iterator[None]:
    """Within it, an error is one of the settings of ``--solver``; what depends on the numbers of a problem is none.

    Warnings are of the numbers, too, and not heard.

    Raises:
        UserError: there was one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        if bl.tuning.of_a_trial(error):
            return
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"--solver has settings that cannot be used here: {reason}") from error


def score_within(
    tunable: Tunable,
    trial: optuna.trial.BaseTrial,
    settings: Settings,
    seed: int,
    seconds: float,
    points: int = POINTS,
) -> float:
    """What a training has reached after so many seconds; see `bl.tuning.loss_within`."""
    return bl.tuning.loss_within(trial, tunable.train(settings, seed), seconds, points=points)  # type: ignore[arg-type]


def best_or_none(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The best trial that is complete and within its limits, where there is one."""
    try:
        return bl.tuning.best_trial(study)
    except ValueError:
        return None


def score_after(
    tunable: Tunable, trial: optuna.trial.BaseTrial, settings: Settings, seed: int, steps: int
) -> tuple[float, float, float]:
    """The score after so many outer steps, their seconds, and the peak memory above the start, MiB.

    A training that ends by itself before them is taken as it ended.
    """

    def last_record() -> tuple[Any, float]:
        begin, last = time.perf_counter(), None
        for last in tunable.train(settings, seed):
            if last[0] >= steps:
                break
        return last, time.perf_counter() - begin

    (found, elapsed), peak = memory.peak_of(select_device("auto"), last_record)
    if found is None:
        raise ValueError("The training made no step.")
    made, value, fit = found
    score = float(value() if callable(value) else value)
    trial.set_user_attr("steps", made)
    bl.tuning.report(trial, made, score, fit)  # type: ignore[arg-type]
    return score, elapsed, peak
