"""The command: make or go on with the study, measure the winner again, draw."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
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
from applications.frame.errors import UserError, exit_code, note
from applications.frame.interruption import Interruption
from applications.frame.lock import refuse_link
from applications.frame.options import check_folder, check_values, check_words, settings_told
from applications.frame.output import forgiving
from applications.frame.run import Interrupted, Run
from applications.frame.run_folder import RunFolder, understood
from applications.frame.tune import hooks
from applications.frame.tune.storage import password, without_password
from applications.frame.tune.tunable import Tunable, best_or_none, score_after, score_within

KEPT = "Interrupted; the study is kept. The same command goes on with it."

RESTARTS = 3
"""Fresh starts of a worker that is killed; where memory runs out, it is killed again."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Config:
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
        name: of the application. rest: from the arguments that are not of `Config` to what is tuned.

    Returns:
        0; 2 for bad input; 130 after Ctrl-C, which keeps the study.
    """

    def command() -> int:
        check_words(arguments)
        options, left = tyro.cli(
            Config, args=arguments, prog=f"python -m applications.{name} tune", return_unknown_args=True
        )
        return _begun(name, options, arguments, lambda: rest(left))

    return exit_code(command, KEPT)


def _begun(name: str, options: Config, arguments: list[str], tunable: Callable[[], Tunable]) -> int:
    """The study under the lock of its folder, which the workers leave to the process that started them."""
    check(options)
    folder = RunFolder(options.out or Path("runs") / name / "tune")
    with settings_told(options), forgiving():
        found = tunable()
        try:
            if options.worker is None:
                folder.hold()
            return run(name, options, arguments, found, folder)
        except Interrupted as interrupted:
            print(KEPT, file=sys.stderr)
            return interrupted.exit_code
        finally:
            folder.release()


def run(name: str, options: Config, arguments: list[str], tunable: Tunable, folder: RunFolder) -> int:
    """The study, and unless this is one of several workers, what it found."""
    trials, seconds = options.trials or tunable.trials, options.seconds or tunable.seconds
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = options.storage or default_storage(options, folder.path)
    study = open_study(name, options, tunable, storage)
    where = f"The study in {without_password(storage, storage)}"
    others = len(study.get_trials(deepcopy=False)) > 1  # more than the settings in use today, which every study has
    with storage_told(storage), understood(where) if others else nullcontext():
        if options.worker is not None:
            warm_up(tunable, options.seed)
            work(study, options, tunable, trials, seconds)
        else:
            lead(name, options, arguments, tunable, folder, study)
    return 0


def lead(
    name: str, options: Config, arguments: list[str], tunable: Tunable, folder: RunFolder, study: optuna.Study
) -> None:
    """Make the trials, alone or with workers, and tell what they found."""
    trials, seconds = options.trials or tunable.trials, options.seconds or tunable.seconds
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    if options.storage is not None:
        config["storage"] = without_password(options.storage, options.storage)
    call = without_password(f"python -m applications.{name} tune {' '.join(arguments)}".strip(), options.storage)
    output = Run(folder, config, call)
    warm_up(tunable, options.seed)
    with bar(study, trials, tunable) as update:
        if options.workers > 1:
            with_workers(name, options, arguments, study, trials, update)
        else:
            work(study, options, tunable, trials, seconds, update)
    from applications.frame.tune import report  # which loads SciPy's distributions and Matplotlib

    report.write(output, study, tunable, seconds, options.confirm, options.seed)
    if options.artifacts is not None:
        try:
            names = hooks.keep(study, folder.path, options.artifacts)
        except OSError as error:
            raise UserError(f"--artifacts {options.artifacts} cannot be written: {error}.") from error
        output.say(f"{len(names)} files are new in the artifact store {options.artifacts}")


def check(options: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    if password(options.storage) is None:  # else a message would show it
        check_values(options)
    else:
        check_values(replace(options, storage=None))
    check_folder(options.out, "out")
    check_folder(options.artifacts, "artifacts")
    for option in ("trials", "timeout", "seconds", "limit_mib", "limit_step_seconds", "workers"):
        value = getattr(options, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option.replace('_', '-')} is {value}: it must be positive.")
    if options.confirm < 2:
        raise UserError(f"--confirm is {options.confirm}: an interval needs at least two seeds.")
    hooks.callbacks_of(options.callback)
    if options.workers > 1 and (options.storage or "").startswith("sqlite"):
        raise UserError(
            "SQLite is not for several processes. Leave --storage out to take a journal, or give a database server."
        )


def default_storage(options: Config, out: Path) -> str:
    """In the folder: a journal, where there is one or several processes need it, else SQLite."""
    for name in ("study.log", "study.db"):
        refuse_link(out / name)
    parallel = options.workers > 1 or (out / "study.log").exists()
    return str(out / "study.log") if parallel else f"sqlite:///{out / 'study.db'}"


def open_study(name: str, options: Config, tunable: Tunable, storage: str) -> optuna.Study:
    """The study in its storage, with the settings in use today as its first trial."""
    directions = [tunable.direction, "minimize", "minimize"] if options.objective == "pareto" else tunable.direction
    with storage_told(storage, ValueError, LookupError, TypeError, AttributeError, ImportError):
        study = bl.tuning.create_study(
            f"{name} {options.objective}",
            storage,
            direction=directions,
            sampler=options.sampler,
            seed=options.seed,
            worker=options.worker or 0,
            defaults=tunable.default,
        )
    same = {"seconds": options.seconds or tunable.seconds, "score": tunable.score}
    if options.worker is None:
        earlier = study.user_attrs.get("settings")
        if earlier not in (None, same):
            where = without_password(storage, storage)
            raise UserError(
                f"The study in {where} measured {earlier}, and now {same} is asked for: its trials cannot be compared. "
                "Take another --out or --storage."
            )
        study.set_user_attr("settings", same)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([tunable.score, "seconds", "peak MiB"][: len(study.directions)])  # for a dashboard
    return study


@contextmanager
def storage_told(storage: str, *damages: type[Exception]) -> Iterator[None]:
    """Within it, what the storage of a study cannot do names it, without its password; ``damages`` are of it too.

    Raises:
        UserError: it cannot be opened, read or written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as raised:
        error: BaseException | None = raised  # Optuna may have met another one in handling that of the storage
        of_storage: tuple[type[BaseException], ...] = (OSError, optuna.exceptions.OptunaError, *damages)
        while error is not None and not (isinstance(error, of_storage) or "sqlalchemy" in type(error).__module__):
            error = error.__context__ if isinstance(error, AssertionError) else None
        if error is None:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        told = f"--storage {storage} cannot be used: {reason}. Is the address right, the disk full, the file damaged?"
        raise UserError(without_password(told, storage)) from None  # its traceback may have the password


def warm_up(tunable: Tunable, seed: int) -> None:
    """One step off the clock: libraries load and allocate at their first use, which the first trial must not pay."""
    with suppress(bl.SolveError, ArithmeticError):
        next(iter(tunable.train(tunable.settings(tunable.default), seed)), None)


def work(
    study: optuna.Study,
    options: Config,
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

    parent = os.getppid()

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        update()
        alone = options.worker is not None and os.getppid() != parent
        if finished(study) >= trials or alone:
            study.stop()

    if finished(study) < trials:
        callbacks = [after, *hooks.callbacks_of(options.callback)]
        study.optimize(bl.tuning.guard(objective), timeout=options.timeout, callbacks=callbacks)


def limits(trial: optuna.Trial, options: Config, peak_mib: float, step_seconds: float) -> None:
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
            elif (best := best_or_none(study)) is not None:
                progress.set_postfix_str(f"best {tunable.score} {best.value:.4g} (trial {best.number})")
            progress.refresh()

        update()
        yield update


def with_workers(
    name: str, options: Config, arguments: list[str], study: optuna.Study, trials: int, update: Callable[[], None]
) -> None:
    """Start the processes, follow the study, and end them with it.

    One that is killed is told, and another goes on in its place with its trial; one that ends with an error is told at
    the end.
    """
    threads = max(1, (os.cpu_count() or 1) // options.workers)

    def start(number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"applications.{name}", "tune", *arguments, "--worker", str(number)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process, which ends them in order
        )

    with Interruption() as interruption:
        processes = [start(number) for number in range(options.workers)]
        restarts = Counter[int]()
        try:
            while interruption.exit_code is None and any(process.poll() is None for process in processes):
                time.sleep(0.5)
                update()
                for number, process in enumerate(processes):
                    if process.poll() is not None and process.returncode < 0 and restarts[number] < RESTARTS:
                        restarts[number] += 1
                        bl.tuning.sweep(study)
                        note(f"Worker {number} was killed ({_signal(process)}); another goes on with its trial.")
                        processes[number] = start(number)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
    if interruption.exit_code is not None:
        raise Interrupted(interruption.exit_code)
    update()
    dead = [number for number, process in enumerate(processes) if process.returncode != 0]
    if dead and finished(study) < trials:
        raise UserError(
            f"Workers {', '.join(map(str, dead))} ended with an error, and {finished(study)} of {trials} trials are "
            "done. What they printed above says why; the same command goes on."
        )


def _signal(process: subprocess.Popen[bytes]) -> str:
    try:
        return signal.Signals(-process.returncode).name
    except ValueError:
        return f"signal {-process.returncode}"
