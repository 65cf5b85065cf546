"""The command: make or go on with the study, measure the winner again, draw."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import optuna
import tyro
from optuna.trial import TrialState
from tqdm import tqdm

import bilevel as bl
from applications.frame import memory
from applications.frame.device import select_device
from applications.frame.errors import UserError, exit_code
from applications.frame.run import Run
from applications.frame.run_folder import RunFolder
from applications.frame.tune import hooks, report
from applications.frame.tune.tunable import Tunable, score_after, score_within

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Options:
    """Tune the solver settings of an application by an Optuna study; the application's own options may follow.

    The same command goes on where an interrupted study stopped, and makes more trials where --trials has grown.
    """

    trials: int | None = None
    """Trials of the study in all, complete or pruned; by default the application's own number."""
    timeout: float | None = None
    """Seconds after which no new trial is begun."""
    seconds: float | None = None
    """Training time of a trial; by default the application's own."""
    objective: Literal["score", "pareto"] = "score"
    """The score at equal time; or score, seconds and memory of equal steps, with their Pareto front."""
    limit_mib: float | None = None
    """Peak memory of a trial above its start, at most; a constraint that the sampler learns."""
    limit_step_seconds: float | None = None
    """Seconds for an outer step, at most; likewise."""
    sampler: Literal["auto", "tpe", "gp", "random"] = "auto"
    """Optuna's default, tree-structured Parzen estimator, Gaussian process, or random search."""
    storage: str | None = None
    """sqlite:///FILE, postgresql+psycopg2://..., or the path of a journal (.log); by default one in the folder."""
    workers: int = 1
    """Processes that make trials side by side; more than one need a journal or a database server."""
    confirm: int = 5
    """Fresh seeds on which the winner and the defaults are measured again."""
    seed: int = 0
    """Seed of the sampler, and of the first trial's training."""
    out: Path | None = None
    """Folder of the study's files and pictures; by default runs/APPLICATION/tune."""
    callback: tuple[str, ...] = ()
    """Optuna callbacks (study, trial), called after each trial: import paths, package.module:function."""
    artifacts: Path | None = None
    """Folder of an Optuna artifact store, to which pictures and solver file of the study go too, for a dashboard."""
    worker: int | None = None
    """For the processes that --workers starts: the number of this one."""


def main(name: str, arguments: list[str], rest: Callable[[list[str]], Tunable]) -> int:
    """Run the command.

    Args:
        name: of the application. rest: from the arguments that are not of `Options` to what is tuned.

    Returns:
        0; 2 for bad input; 130 after Ctrl-C, which keeps the study.
    """
    options, left = tyro.cli(
        Options, args=arguments, prog=f"python -m applications.{name} tune", return_unknown_args=True
    )
    kept = "Interrupted; the study is kept. The same command goes on with it."
    return exit_code(lambda: run(name, options, arguments, rest(left)), kept)


def run(name: str, options: Options, arguments: list[str], tunable: Tunable) -> int:
    """The study, and unless this is one of several workers, what it found."""
    check(options)
    out = options.out or Path("runs") / name / "tune"
    trials = options.trials or tunable.trials
    seconds = options.seconds or tunable.seconds
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(name, options, tunable, out)
    if options.worker is not None:
        warm_up(tunable, options.seed)
        work(study, options, tunable, trials, seconds)
        return 0
    folder = RunFolder(out)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    output = Run(folder, config, f"python -m applications.{name} tune {' '.join(arguments)}".strip())
    warm_up(tunable, options.seed)
    with bar(study, trials, tunable) as update:
        if options.workers > 1:
            with_workers(name, options, arguments, study, trials, update)
        else:
            work(study, options, tunable, trials, seconds, update)
    report.write(output, study, tunable, seconds, options.confirm, options.seed)
    if options.artifacts is not None:
        names = hooks.keep(study, out, options.artifacts)
        output.say(f"{len(names)} files are new in the artifact store {options.artifacts}")
    return 0


def check(options: Options) -> None:
    """Refuse what cannot be run, before anything is."""
    for option in ("trials", "timeout", "seconds", "limit_mib", "limit_step_seconds", "workers"):
        value = getattr(options, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option.replace('_', '-')} is {value}: it must be positive.")
    if options.confirm < 2:
        raise UserError(f"--confirm is {options.confirm}: an interval needs at least two seeds.")
    hooks.imported(options.callback)
    if options.workers > 1 and (options.storage or "").startswith("sqlite"):
        raise UserError(
            "SQLite is not for several processes. Leave --storage out to take a journal, or give a database server."
        )


def open_study(name: str, options: Options, tunable: Tunable, out: Path) -> optuna.Study:
    """The study in its storage, with the settings in use today as its first trial."""
    storage = options.storage
    if storage is None:
        out.mkdir(parents=True, exist_ok=True)
        parallel = options.workers > 1 or (out / "study.log").exists()
        storage = str(out / "study.log") if parallel else f"sqlite:///{out / 'study.db'}"
    directions = [tunable.direction, "minimize", "minimize"] if options.objective == "pareto" else tunable.direction
    try:
        study = bl.tuning.create_study(
            f"{name} {options.objective}",
            storage,
            direction=directions,
            sampler=options.sampler,
            seed=options.seed,
            worker=options.worker or 0,
            defaults=tunable.default,
        )
    except (ValueError, OSError, optuna.exceptions.OptunaError, ImportError) as error:
        raise UserError(f"--storage {storage} cannot be opened: {error}") from error
    except Exception as error:
        if "sqlalchemy" in type(error).__module__:
            raise UserError(
                f"--storage {storage} cannot be opened: {str(error).splitlines()[0]}. Is the address right?"
            ) from error
        raise
    same = {"seconds": options.seconds or tunable.seconds, "score": tunable.score}
    if options.worker is None:
        earlier = study.user_attrs.get("settings")
        if earlier not in (None, same):
            raise UserError(
                f"The study in {storage} measured {earlier}, and now {same} is asked for: its trials cannot be "
                "compared. Take another --out or --storage."
            )
        study.set_user_attr("settings", same)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([tunable.score, "seconds", "peak MiB"][: len(study.directions)])  # for a dashboard
    return study


def warm_up(tunable: Tunable, seed: int) -> None:
    """One step off the clock: libraries load and allocate at their first use, which the first trial must not pay."""
    with suppress(bl.SolveError, ArithmeticError):
        next(iter(tunable.train(tunable.settings(tunable.default), seed)), None)


def work(
    study: optuna.Study,
    options: Options,
    tunable: Tunable,
    trials: int,
    seconds: float,
    update: Callable[[], None] = lambda: None,
) -> None:
    """Make trials until there are enough, or the time is over."""

    def objective(trial: optuna.Trial) -> float | tuple[float, float, float]:
        settings = tunable.suggest(trial)
        # One seed for all: trials differ by their settings, and the winner is measured again on others.
        if options.objective == "pareto":
            values = score_after(tunable, trial, settings, options.seed, tunable.steps)
            limits(trial, options, values[2], values[1] / trial.user_attrs["steps"])
            return values
        training = partial(score_within, tunable, trial, settings, options.seed, seconds)
        value, peak = memory.peak_of(select_device("auto"), training)
        limits(trial, options, peak, trial.user_attrs["seconds"] / max(1, trial.user_attrs["steps"]))
        return value

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        update()
        if finished(study) >= trials:
            study.stop()

    if finished(study) < trials:
        callbacks = [after, *hooks.imported(options.callback)]
        study.optimize(bl.tuning.guard(objective), timeout=options.timeout, callbacks=callbacks)


def limits(trial: optuna.Trial, options: Options, peak_mib: float, step_seconds: float) -> None:
    for name, value, at_most in (
        ("peak_mib", peak_mib, options.limit_mib),
        ("step_seconds", step_seconds, options.limit_step_seconds),
    ):
        if at_most is None:
            trial.set_user_attr(name, value)
        else:
            bl.tuning.limit(trial, name, value, at_most)


def finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


@contextmanager
def bar(study: optuna.Study, trials: int, tunable: Tunable) -> Iterator[Callable[[], None]]:
    """A progress bar with the best score so far; call what it gives after each trial."""
    with tqdm(total=trials, initial=finished(study), unit="trial", disable=None, dynamic_ncols=True) as progress:

        def update() -> None:
            progress.n = finished(study)
            if len(study.directions) > 1:
                progress.set_postfix_str(f"{len(study.best_trials)} on the front")
            elif (best := report.best_or_none(study)) is not None:
                progress.set_postfix_str(f"best {tunable.score} {best.value:.4g} (trial {best.number})")
            progress.refresh()

        update()
        yield update


def with_workers(
    name: str, options: Options, arguments: list[str], study: optuna.Study, trials: int, update: Callable[[], None]
) -> None:
    """Start the processes, follow the study, and end them with it; one that dies is told, and the others go on."""
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"applications.{name}", "tune", *arguments, "--worker", str(number)],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process, which ends them in order
        )
        for number in range(options.workers)
    ]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(1.0)
            update()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
    update()
    dead = [number for number, process in enumerate(processes) if process.returncode != 0]
    if dead and finished(study) < trials:
        raise UserError(
            f"Workers {', '.join(map(str, dead))} ended with an error, and {finished(study)} of {trials} trials are "
            "done. What they printed above says why; the same command goes on."
        )
