"""Studies that outlive their processes: storages that are repaired on opening, seeds that do not repeat on resuming.

`create_study` returns an Optuna study like any other; `guard` wraps an objective.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..extras import require
from .failures import of_a_trial
from .resumed import FIXED, refuse_unused, tell_other_ranges
from .settings import plain

if TYPE_CHECKING:
    import optuna

T = TypeVar("T")
Sampler = Literal["auto", "tpe", "gp", "random"]
Objective = Callable[["optuna.Trial"], "float | Sequence[float]"]

PROCESS = "process"
"""User attribute: who runs a trial."""
RETRIED = "retry of"
"""User attribute: the number of the trial that is tried again, since its process died."""
JOURNAL_SUFFIXES = (".log", ".journal")
SEEDS = 2**32
"""How many seeds a sampler knows."""
GRACE_SECONDS = 60
"""After which a trial that nobody vouches for has been left behind."""


def create_study(
    name: str,
    storage: str | Path | None = None,
    *,
    direction: str | Sequence[str] = "minimize",
    sampler: Sampler = "auto",
    pruner: optuna.pruners.BasePruner | None = None,
    seed: int = 0,
    worker: int = 0,
    defaults: Mapping[str, Any] | None = None,
    grace_seconds: int = GRACE_SECONDS,
) -> optuna.Study:
    """A study to create, or to go on with where the storage has it.

    Args:
        name: of the study in its storage.
        storage: see `open_storage`.
        direction: one, or one for each objective; of a study that exists, the same again.
        sampler: ``"auto"`` Optuna's own choice, ``"tpe"``, ``"gp"`` (Gaussian processes: continuous spaces, a few
            hundred trials) or ``"random"``.
        seed: of the sampler, offset by the number of trials so far and by ``worker``: a study that is resumed, and a
            worker beside another, do not repeat points.
        worker: number of this process among those that work on the study.
        grace_seconds: see `open_storage`.
        defaults: parameters of the first trial, the settings that are in use today: the best of the study is then never
            worse than they are. A first trial that failed or was interrupted is made again when the study is resumed.
            Parameters that are left out are sampled; those that the trial never asks for are
            refused by `guard`, and by the ``suggest`` functions where they are nearly a setting of theirs.

    Raises:
        ValueError: an unknown sampler, or a seed that is none; a study of this name with other directions; a storage
            that is damaged or cannot be reached.
    """
    require("optuna", "tuning")
    import optuna

    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed!r}: a whole number from 0 to 2**32 - 1 is needed.")
    directions = [direction] if isinstance(direction, str) else list(direction)
    opened = open_storage(storage, grace_seconds)
    with _reading(storage):
        study = optuna.create_study(
            study_name=name,
            storage=opened,
            directions=directions,
            pruner=pruner,
            load_if_exists=True,
        )
    found = [d.name.lower() for d in study.directions]
    if found != [d.lower() for d in directions]:
        raise ValueError(
            f"The study {name!r} exists with the directions {found}, and {directions} are asked for: take another name."
        )
    sweep(study, grace_seconds)
    study.sampler = _sampler(sampler, (int(seed) + 7919 * worker + len(study.trials)) % SEEDS)
    if defaults is not None and worker == 0:
        _put_in_front(study, {parameter: plain(value) for parameter, value in defaults.items()})
    return study


def _put_in_front(study: optuna.Study, params: dict[str, Any]) -> None:
    """Enqueue these parameters, unless a trial has them: one that an error or an interruption ended does not count.

    One that has ended its process twice does: tried at each resumption, it would end all of them.
    """
    require("optuna", "tuning")
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False):
        known = {**trial.system_attrs.get(FIXED, {}), **trial.params}
        retried = RETRIED in trial.user_attrs or "retry_history" in trial.system_attrs
        if all(name in known and known[name] == value for name, value in params.items()) and (
            retried or trial.state is not TrialState.FAIL
        ):
            return
    study.enqueue_trial(params, user_attrs={"default": True})


def open_storage(storage: str | Path | None, grace_seconds: int = GRACE_SECONDS) -> optuna.storages.BaseStorage | None:
    """The storage behind an address.

    Args:
        storage: None, in memory; ``sqlite:///FILE`` for one process; ``postgresql+psycopg2://...`` or another database
            of SQLAlchemy for many; a path that ends with ``.log`` or ``.journal``, for many on one file system.
            Databases have a heartbeat: trials of a process that died are failed and tried once more.
        grace_seconds: without a heartbeat, after which a database's trial counts as left behind. The next process that
            begins a trial then fails it and tries it again.

    A journal's last line is cut where a crash left half of it: appended to, it would make the journal unreadable.

    Raises:
        ValueError: an address of neither kind, or of SQLite in memory; a storage that is damaged or cannot be reached.
    """
    require("optuna", "tuning")
    import optuna
    import sqlalchemy
    from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if storage is None:
        return None
    address = str(storage)
    if "://" in address:
        with warnings.catch_warnings(), _reading(storage):
            url = sqlalchemy.make_url(address)
            if url.get_backend_name() == "sqlite":
                if url.database in (None, "", ":memory:") or "mode=memory" in address or "::memory:" in address:
                    raise ValueError(
                        f"storage is {address!r}, a database in memory: each thread would have one of its own, and it "
                        "ends with the process. Name a file, sqlite:///study.db, or give None for a study in memory."
                    )
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
            return _made_once(
                lambda: RDBStorage(
                    address,
                    heartbeat_interval=max(1, grace_seconds // 6),
                    grace_period=grace_seconds,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
                )
            )
    if not address.endswith(JOURNAL_SUFFIXES):
        raise ValueError(
            f"storage is {address!r}: give an address such as sqlite:///study.db, or the path of a journal that ends "
            f"with {' or '.join(JOURNAL_SUFFIXES)}."
        )
    Path(address).parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(address)
    with _held(lock):
        repair_journal(Path(address))
        _check_journal(Path(address))
    with _reading(storage):
        return JournalStorage(JournalFileBackend(address, lock_obj=JournalFileOpenLock(address)))


def _made_once(open_database: Callable[[], T]) -> T:
    """A database whose tables another process may be making at the same moment: then they are there a moment later."""
    import sqlalchemy

    for pause in (0.1, 0.3, 1.0, 3.0):
        try:
            return open_database()
        except (
            sqlalchemy.exc.IntegrityError,
            sqlalchemy.exc.OperationalError,
            sqlalchemy.exc.ProgrammingError,
        ) as error:
            if not isinstance(error, sqlalchemy.exc.IntegrityError) and "already exists" not in str(error):
                raise
            time.sleep(pause)
    return open_database()


@contextmanager
def _reading(storage: str | Path | None) -> Iterator[None]:
    """An error of a database or a journal as one that says which it is, and what to look at."""
    import sqlalchemy

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, KeyError) as error:
        said = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise ValueError(
            f"The storage {_without_password(storage)} is damaged, is none of Optuna, or cannot be reached "
            f"({type(error).__name__}: {said[0] if said else ''}). See whether the server runs and the address is "
            "right; a file that is damaged has to be restored, or moved away to begin anew."
        ) from error


def _without_password(storage: str | Path | None) -> str:
    """An address as it may be shown."""
    import sqlalchemy

    address = str(storage)
    try:
        return sqlalchemy.make_url(address).render_as_string() if "://" in address else address
    except sqlalchemy.exc.ArgumentError:
        return repr(address.split("://")[0] + "://...")


def _check_journal(path: Path) -> None:
    """Refuse a journal with a line that is none, naming it: Optuna's own error names neither file nor line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of the journal {path} is damaged ({error}): all trials after it depend on it. "
                    "Restore the file, or cut it before that line, or move it away to begin anew."
                ) from error


def repair_journal(path: Path) -> int:
    """Cut what follows the last end of line; the number of bytes that went."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return len(content) - whole


def sweep(study: optuna.Study, grace_seconds: float = GRACE_SECONDS) -> int:
    """Fail the running trials whose process is gone, and try each once more; their number.

    A trial under `guard` names its process. Of a process on another machine nothing is known; a trial without a name is
    left to the storage's heartbeat, or, where there is none, failed after its grace. A database retries what its
    heartbeat misses, so its trials are left to that.
    """
    require("optuna", "tuning")
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    if _has_heartbeat(study):
        return 0
    swept = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get(PROCESS)
        if process is None:
            begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            gone = time.time() - begun > grace_seconds
        else:
            gone = _is_gone(process)
        if gone:
            try:
                failed = study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
            except UpdateFinishedTrialError:  # another process swept it first
                continue
            swept += failed
            if failed and process is not None and RETRIED not in trial.user_attrs:
                _retry(study, trial)
    return swept


def _retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Put its parameters in front once more."""
    params = {**trial.system_attrs.get(FIXED, {}), **trial.params}
    kept = {name: value for name, value in trial.user_attrs.items() if name == "default"}
    study.enqueue_trial(params, user_attrs={**kept, RETRIED: trial.number})


def guard(objective: Objective) -> Objective:
    """An objective under which no trial ends the study, and none is lost with its process.

    What the settings of a trial can bring about ends it as pruned, with the reason as its user attribute ``failure``: a
    failed or diverging solve, a problem that is not finite, a singular or indefinite matrix (``LinAlgError``), a number
    that overflows, memory that runs out on a CPU or a GPU, and a value that is not finite (Optuna would call infinity
    complete). Other errors pass, a division by zero too: they are mistakes in the program.

    Raises:
        TypeError: the objective returns what is no number, or not one for each direction of the study.
        ValueError: the trial was put in front with parameters (``defaults`` of `create_study`) that nothing asks for:
            they are misspelt, or belong to another choice.
    """
    require("optuna", "tuning")
    import optuna

    compared: set[str] = set()

    @functools.wraps(objective)
    def guarded(trial: optuna.Trial) -> float | Sequence[float]:
        trial.set_user_attr(PROCESS, _this_process())
        try:
            values = objective(trial)
        except Exception as error:
            if not of_a_trial(error):
                raise
            trial.set_user_attr("failure", f"{type(error).__name__}: {error}"[:500])
            raise optuna.TrialPruned(str(error)) from error
        refuse_unused(trial)
        tell_other_ranges(trial, compared)
        several = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
        found = [_number(value) for value in several]
        study = getattr(trial, "study", None)  # a FixedTrial has none
        if study is not None and len(found) != len(study.directions):
            expected = ", ".join(direction.name.lower() for direction in study.directions)
            raise TypeError(
                f"The objective returned {len(found)} numbers, and the directions of the study are {expected}."
            )
        for value in found:
            if not math.isfinite(value):
                trial.set_user_attr("failure", f"the value is {value}")
                raise optuna.TrialPruned(f"The value is {value}.")
        return values

    return guarded


def _number(value: object) -> float:
    try:
        if isinstance(value, str):
            raise TypeError("a string")
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        missing = " Is its return missing?" if value is None else ""
        raise TypeError(
            f"The objective returned {type(value).__name__}: a number is needed, or one for each direction of the "
            f"study.{missing}"
        ) from error


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    require("optuna", "tuning")
    import optuna

    if name in ("auto", "tpe"):
        return optuna.samplers.TPESampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise ValueError(f"sampler is {name!r}: there are 'auto', 'tpe', 'gp' and 'random'.")


def _has_heartbeat(study: optuna.Study) -> bool:
    require("optuna", "tuning")
    from optuna.storages import RDBStorage

    storage: Any = study._storage
    storage = getattr(storage, "_backend", storage)  # the cache in front of a database
    return isinstance(storage, RDBStorage)


def _this_process() -> str:
    return f"{platform.node()} {os.getpid()} {_started(os.getpid())}"


def _is_gone(process: str) -> bool:
    node, number, started = process.rsplit(" ", 2)
    return node == platform.node() and _started(int(number)) != started


def _started(pid: int) -> str:
    """When a process was started: a number that is given again does not deceive; empty where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "?"
        return "?"  # a system without /proc
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


@contextmanager
def _held(lock: Any) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
