"""What a trial hears of its run, and what it measures: losses, steps, residuals, errors, seconds, limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..diagnostics.compare import compare_methods
from ..diagnostics.cost import wait
from ..diagnostics.problem import AnyHypergrad, Bilevel, Solver
from ..extras import require
from ..solution import Solution
from ..tree import on_host

if TYPE_CHECKING:
    import optuna

LONG = 5.0
"""Seconds of a step beside which those of loading libraries don't count."""

RECORDED = ("num_steps", "residual_norm", "relative_residual")


def report(
    trial: optuna.Trial,
    step: int,
    loss: Tensor | float,
    fit: Solution | None = None,
    *,
    error: Tensor | float | None = None,
    worst: float = math.inf,
) -> None:
    """Tell a trial its loss at an outer step; prune it where it is hopeless, diverged or not finite.

    Steps, residuals and results of the last solves become user attributes: ``inner.num_steps``,
    ``inner.residual_norm``, ``inner.result`` and the same of ``adjoint``, with ``adjoint.relative_residual``; of T
    problems, the worst. A study with several objectives cannot prune by them in Optuna: there only a loss that is not
    finite or beyond ``worst`` ends the trial.

    Args:
        error: an estimate of the hypergradient's error, such as ``bl.diagnostics.hypergradient(...).stats["error"]``;
            the user attribute ``hypergradient.error``.
        worst: a loss (or score) of this size has diverged.

    Raises:
        optuna.TrialPruned: the loss is NaN, infinite or of the size of ``worst``, or the study's pruner says so.
    """
    require("optuna", "tuning")
    import optuna

    value = _record(trial, step, loss, fit, error, worst)
    if _hears(trial):
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"Pruned at step {step}.")


def _record(
    trial: optuna.Trial,
    step: int,
    loss: Tensor | float,
    fit: Solution | None,
    error: Tensor | float | None,
    worst: float,
) -> float:
    """The loss; see `report`, of which this is all but what the pruner says."""
    require("optuna", "tuning")
    import optuna

    value = float(on_host(loss).detach())
    for role, solution in (("inner", fit), ("adjoint", fit.adjoint if fit is not None else None)):
        if solution is not None:
            for stat in RECORDED:
                if stat in solution.stats:
                    trial.set_user_attr(f"{role}.{stat}", solution.stats[stat].max().item())
            trial.set_user_attr(f"{role}.result", solution.result.name)
    if error is not None:
        trial.set_user_attr("hypergradient.error", float(error))
    if not math.isfinite(value) or abs(value) >= worst:
        trial.set_user_attr("diverged_at", step)
        raise optuna.TrialPruned(f"The loss is {value} at step {step}.")
    return value


def _hears(trial: optuna.Trial) -> bool:
    """Whether it takes reports: those of a study with several objectives do not."""
    study = getattr(trial, "study", None)  # a FixedTrial has none
    return study is None or len(study.directions) == 1


Measured = Tensor | float | Callable[[], float]
"""A loss, or a function that measures it."""


def loss_within(
    trial: optuna.Trial,
    records: Iterable[tuple[int, Measured, Solution | None]],
    seconds: float,
    *,
    points: int = 20,
    worst: float = math.inf,
) -> float:
    """The loss that a run has reached when its time is over: the objective "outer loss at a time budget".

    The trial hears it at ``points`` equal parts of the time, so that the pruner compares runs at equal times. The last
    step may begin just before the end. A run may end by itself before its time: what it reached then stands for the
    rest of it, others are compared with that, and it is not pruned. The first step that a process makes here also loads
    libraries, for up to a second: it counts no longer than the step after it.

    User attributes, of a trial that is pruned or fails too: ``steps``, the outer steps that were made here, whatever
    their numbers, and ``seconds``, the time that they took.

    Args:
        records: a generator that makes an outer step each time it is asked, and yields its number, loss and fit. For
            the loss it may yield a function, such as a validation: it is called at those points only, and its time does
            not count.
        seconds: the budget, positive. points: how often the trial hears of it, at least once.
        worst: as in `report`.

    Raises:
        optuna.TrialPruned: as in `report`. ValueError: there was no record; a budget or a number of points of nothing.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}: a positive number is needed.")
    if points < 1:
        raise ValueError(f"points is {points}: the trial has to hear of its loss at least once.")
    told, made, loss, clock = 0, 0, math.nan, _Clock()
    value: Measured = math.nan
    fit: Solution | None = None
    try:
        clock.begin()
        for _, value, fit in records:
            clock.end()
            made += 1
            point = min(points, int(points * clock.elapsed / seconds))
            if point > told or not (callable(value) or math.isfinite(float(value))):
                loss = float(value() if callable(value) else value)
                report(trial, point, loss, fit, worst=worst)
                told = point
            if clock.elapsed >= seconds:
                break
            clock.begin()
    finally:  # of a trial that is pruned or fails, too
        trial.set_user_attr("steps", made)
        trial.set_user_attr("seconds", clock.elapsed + clock.first)
    if not made:
        raise ValueError("records is empty: there is no loss to return.")
    if told < points:  # it ended by itself
        loss = _record(trial, points, value() if callable(value) else value, fit, None, worst)
        for point in range(told + 1, points + 1) if _hears(trial) else ():
            trial.report(loss, point)
    return loss


@dataclass
class _Clock:
    """The time of the steps of a run.

    Attributes:
        elapsed: seconds. first: those of the first step of this process, until the next one is there to compare with.
    """

    elapsed: float = 0.0
    first: float = 0.0
    _begun: float = 0.0

    loaded: ClassVar[bool] = False
    """Whether this process has made a step."""

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        wait()  # the step is made when its value is there
        took = time.perf_counter() - self._begun
        if _Clock.loaded or took > LONG:
            self.elapsed += took + min(self.first, took)
            self.first = 0.0
        else:
            self.first = took
        _Clock.loaded = True


def hypergradient_error(
    trial: optuna.Trial, problem: Bilevel, solver: Solver | None, hypergrad: AnyHypergrad | None, *, repeats: int = 3
) -> tuple[float, float]:
    """Relative error of a hypergradient and its seconds: two objectives to minimise, for a Pareto front.

    The reference is the exact hypergradient where the problem has one (`bilevel.problems`), else a tight solve of both
    systems; see `bilevel.diagnostics.compare_methods`. User attributes: ``products``, ``evaluations``, ``peak_mib``,
    ``result``.

    Args:
        repeats: runs for the median time.

    Raises:
        optuna.TrialPruned: the method refuses the problem, or its answer is not finite.
    """
    require("optuna", "tuning")
    import optuna

    (row,) = compare_methods(problem, {"trial": (solver, hypergrad)}, repeats=repeats).rows
    for name in ("products", "evaluations", "peak_mib", "result"):
        trial.set_user_attr(name, getattr(row, name))
    if not math.isfinite(row.error):
        raise optuna.TrialPruned(row.note or "The hypergradient is not finite.")
    return row.error, row.seconds


def limit(trial: optuna.Trial, name: str, value: float, at_most: float) -> None:
    """A limit as a constraint of Optuna, relative, ``value / at_most - 1 <= 0``: samplers learn to keep to it.

    Args:
        name: such as ``"seconds"`` or ``"peak_mib"``; the value is also kept as a user attribute.
        at_most: the limit, positive.

    Raises:
        ValueError: a limit that is not positive, or a second one of this name in a trial.
    """
    value, at_most = float(value), float(at_most)
    if not at_most > 0:
        raise ValueError(f"at_most is {at_most}: a positive limit is needed.")
    if name in trial.constraints and not _retried(trial):
        raise ValueError(
            f"The limit {name!r} is set already in this trial, and Optuna keeps the first value: call limit once, with "
            "the largest, or give each its own name."
        )
    trial.set_user_attr(name, value)
    trial.set_constraint(name, value / at_most - 1 if math.isfinite(value) else math.inf)


def _retried(trial: optuna.Trial) -> bool:
    """Whether Optuna tries it again, with what the process that died had kept."""
    study = getattr(trial, "study", None)
    return study is not None and "retry_history" in study.get_trials(deepcopy=False)[trial.number].system_attrs


def within_limits(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether it keeps to every `limit`."""
    return all(value <= 0 for value in trial.constraints.values())


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The best trial that keeps to every limit (Optuna's own ``best_trial`` of a study with one objective).

    Raises:
        ValueError: no trial is complete and within the limits; a study with several objectives.
    """
    require("optuna", "tuning")
    if len(study.directions) > 1:
        raise ValueError(
            f"The study {study.study_name!r} has {len(study.directions)} objectives, and no best trial: take one of "
            "study.best_trials, its Pareto front; `within_limits` says which keep to the limits."
        )
    from optuna.trial import TrialState

    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
    within = [t for t in done if within_limits(t)]
    if not within:
        raise ValueError(
            f"None of the {len(study.trials)} trials is complete and within its limits ({len(done)} are complete): "
            "make more trials, or loosen the limits."
        )
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return min(within, key=lambda trial: sign * float(trial.value))  # type: ignore[arg-type]
