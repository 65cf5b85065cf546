"""One run of an application: trainings that resume exactly, parts that are computed once, tables and pictures."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

import bilevel as bl
from applications.frame import ranks, schema
from applications.frame.checkpoint import differences, not_finite
from applications.frame.errors import UserError
from applications.frame.interruption import Interruption, Stopped
from applications.frame.names import portable
from applications.frame.run_folder import ReadOnly, RunFolder

T = TypeVar("T")
Row = dict[str, Any]

SOLVER = "solver.json"
"""The settings of solvers that a run was given."""
DATA = "data.json"
"""Which files of data a run began with."""
LENGTHS = "lengths.json"
"""The lengths that a run was planned for, one after another, where it was made longer."""
CHECKPOINT_SECONDS = 5.0
"""Between checkpoints of a training; there is one at its end and at an interruption too."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds by the clock on the wall, and of the CPU in all threads of this process."""


class Training(Protocol):
    """A loop that can be put back to where it stood; a generator method reads best."""

    @property
    def steps(self) -> int:
        """All that it makes, as far as it is known where the training stands: the clock may end it earlier."""

    def rows(self) -> Iterator[Row]:
        """From where it stands to its end: a step, then its plain numbers, with the ``"step"`` that is done, from 1.

        A long step may call `stop_if_asked` as long as it has changed nothing that `state` holds. A row of a step
        without finite numbers has ``"skipped"`` where the training goes on all the same.
        """

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings in dicts and lists, all that decides the steps to come (random state too)."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, to the bit."""


class Interrupted(Exception):
    """A signal ended a training; everything is saved. ``exit_code``: 128 and its number."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class Run:
    """A run folder that is filled part by part; resumed, it does what is not in it yet.

    Files: ``config.json``, ``metrics.jsonl`` (one row a step of each training), ``checkpoint-NAME.pt`` (one a
    training), ``results.json`` (parts with their seconds, and tables), ``report.md`` (the tables), pictures.

    Under torchrun all ranks go through the same story; the first one alone writes, prints and validates.

    Attributes:
        leads: whether this is the first rank.
        settings: of solvers, in place of the application's own, by name; kept in `SOLVER`.

    Args:
        data: a digest of the files that it reads, if there are any; a run goes on with the same ones only.
        lengths: those that it was planned for, where it becomes longer now; the results of the shorter run are then
            set aside. That is written with the first thing that is: until then a resumed run may still be refused.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Row,
        command: str,
        quiet: bool = False,
        data: str | None = None,
        lengths: Sequence[int] = (),
    ):
        self.leads = bl.distributed.rank() == 0
        self.folder, self.command, self.quiet = folder, command, quiet
        if not self.leads:
            self.folder, self.quiet = ReadOnly(folder.path), True
        self.settings: dict[str, Any] = {}
        self._config, self._data, self._lengths = config, data, list(lengths)
        found = folder.results()  # what is damaged is told, and not forgotten
        self._results: schema.Results = {"parts": {}, "tables": {}} if lengths else found
        self._begun = False

    def train(
        self,
        name: str,
        training: Training,
        show: Sequence[str] = ("loss",),
        validate: Callable[[], Row] | None = None,
        validate_every: int = 0,
        file: str | None = None,
        clock: str = "wall",
    ) -> float:
        """Bring a training to its end, from its checkpoint where there is one; the seconds that its steps took.

        Args:
            show: entries of the rows for the progress bar.
            validate: what joins the row of every ``validate_every``-th step, off the clock; 0: of none.
            file: of the checkpoint; by default ``checkpoint-NAME.pt``.
            clock: by which of the `CLOCKS` the steps are timed.

        Raises:
            Interrupted: a signal asked to stop.
            UserError: the training came to numbers that are not finite, or to a solve that fails: the last checkpoint
                is of before.
        """
        file, now = file or checkpoint_of(name), CLOCKS[clock]
        step, seconds = self.restored(training, file)
        rows = self.folder.metrics_until(step, name)
        self._begin()
        self.folder.write_metrics(rows)
        finished, kept, complete = step >= training.steps, step, True

        def save() -> None:
            nonlocal kept
            state = training.state()
            if bad := next(not_finite(state), None):
                raise ArithmeticError(f"{bad} is not finite any more")
            self.folder.save_checkpoint({"training": state, "step": step, "seconds": seconds}, file)
            kept = step

        alone = bl.distributed.world_size() == 1
        with Interruption(alone) as interruption, self._bar(name, training.steps, step, hidden=finished) as bar:
            saved_at, begin = time.perf_counter(), now()
            try:
                for row in training.rows():
                    seconds += now() - begin
                    step = row["step"]
                    _refuse_nonfinite(row, show)
                    if validate is not None and validate_every and step % validate_every == 0 and self.leads:
                        complete = False
                        row = {**row, **self._told(step, validate())}
                        complete = True
                    self.folder.append_metrics({"part": name, **row, "seconds": round(seconds, 3)})
                    bar.total = training.steps
                    bar.update()
                    bar.set_postfix({key: f"{row[key]:.4g}" for key in show if key in row})
                    if ranks.anywhere(interruption.exit_code is not None):
                        raise Stopped
                    if time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
                        save()
                        saved_at = time.perf_counter()
                    begin = now()
                if not finished:
                    save()
            except Stopped as stopped:
                if complete:  # else the row is still to be made, from the last checkpoint
                    save()
                raise Interrupted(interruption.exit_code or 128 + signal.SIGTERM) from stopped
            except Exception as error:
                if not (bl.tuning.of_a_trial(error) or isinstance(error, ArithmeticError)):
                    raise
                raise UserError(_ended(name, step, error, kept)) from error
        return seconds

    def restored(self, training: Training, file: str) -> tuple[int, float]:
        """Put a training back to its checkpoint, where there is one; the steps and seconds that it has behind it.

        Nothing is written. A story that writes before it trains calls it first: what does not fit is then refused while
        the run is as it was.

        Raises:
            UserError: see `restore`; a file of data has changed since the run began.
        """
        self._refuse_other_data()
        return restore(self.folder, file, training) if self.folder.has_checkpoint(file) else (0, 0.0)

    def _bar(self, name: str, steps: int, done: int, hidden: bool) -> tqdm:
        hide = True if self.quiet or hidden else None
        return tqdm(total=steps, initial=done, desc=name, unit="step", disable=hide, dynamic_ncols=True)

    def _told(self, step: int, found: Row) -> Row:
        """What a validation found, as it is; it is said too."""
        texts = [f"{key.replace('_', ' ')} {shown(value)}" for key, value in found.items()]
        self.say(f"step {step}: {', '.join(texts)}")
        return found

    def metrics(self, name: str) -> list[Row]:
        """The rows of a training, in order."""
        return [row for row in self.folder.metrics() if row.get("part") == name]

    def part(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns (numbers, strings, lists, dicts), computed once and kept in ``results.json``."""
        self._begin()
        parts = self._results["parts"]
        if name not in parts:
            begin = time.perf_counter()
            value = compute()
            parts[name] = {"seconds": round(time.perf_counter() - begin, 3), "value": value}
            self._save()
        kept: T = parts[name]["value"]
        return kept

    def seconds(self, name: str) -> float:
        """What a part took to compute."""
        return float(self._results["parts"][name]["seconds"])

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Print rows that share their columns, and keep them in ``results.json`` and ``report.md``.

        A float is shown with four digits; a string as it is.
        """
        self._begin()
        self._results["tables"][portable(title)] = list(rows)  # a run goes on in another locale, too
        self._save()
        texts = [f"## {name}\n\n{markdown(table)}" for name, table in self._results["tables"].items()]
        self.folder.write_text("report.md", "\n".join([f"    {portable(self.command)}\n", *texts]))
        self.say(f"\n{title}\n{aligned(rows)}")
        lost = {name for row in rows for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
        if lost:
            self.say(f"No number came out for {', '.join(sorted(lost))}: it had diverged, or there was nothing to see.")

    def picture(self, name: str, content: bytes) -> None:
        """Write a PNG."""
        self._begin()
        self.folder.write_bytes(name, content)

    def say(self, text: str) -> None:
        """Print at once, also into a pipe."""
        if not self.quiet:
            tqdm.write(text)

    def _begin(self) -> None:
        """The folder is made at the first thing to write: bad input leaves none."""
        if not self._begun:
            self._refuse_other_data()
            if self._lengths:
                self._refuse_damaged()
            if self._lengths and self.leads:  # the results first: those of another length would be taken for this one's
                self.folder.set_results_aside()
                self.folder.write_json(LENGTHS, self._lengths)
            self.folder.begin(self._config)
            if self._data is not None and self.leads:
                self.folder.write_json(DATA, {"sha256": self._data})
            if self.settings and self.leads:  # the run is whole without the file that they came from
                self.folder.write_settings(SOLVER, self.settings)
            self._begun = True

    def _refuse_damaged(self) -> None:
        """
        Raises:
            UserError: a checkpoint or the metrics of the run to make longer cannot be read.
        """
        self.folder.metrics()
        for path in sorted(self.folder.path.glob("checkpoint*.pt")):
            if not path.stem.endswith(".previous"):
                self.folder.load_checkpoint(torch.device("cpu"), path.name)

    def _refuse_other_data(self) -> None:
        """
        Raises:
            UserError: a file of data has changed since the run began.
        """
        known = self.folder.read_json(DATA).get("sha256") if (self.folder.path / DATA).is_file() else None
        if known is not None and known != self._data:
            raise UserError(
                f"The data file ({self._config.get('data')}) is not the one that the run {self.folder.path} began "
                "with: one half of it would be of other data. Restore the file, or begin a new run."
            )

    def _save(self) -> None:
        self.folder.write_json("results.json", self._results)


def restore(folder: RunFolder, file: str, training: Training) -> tuple[int, float]:
    """Put a training back to its checkpoint in a run's folder; the steps and seconds that it has behind it.

    Raises:
        UserError: there is none, it is damaged, or what it holds is not, to the bit, a state of this training.
    """
    saved = folder.load_checkpoint(torch.device("cpu"), file)
    schema.check(saved, schema.Checkpoint, folder.path / file, "checkpoint of a training")
    try:
        training.restore(saved["training"])
        wrong = next(differences(saved["training"], training.state()), None)
    except Exception as error:  # a state of another make can raise anything
        wrong = str(error).partition("\n")[0] or type(error).__name__
    if wrong is not None:
        raise UserError(
            f"{folder.path / file} does not fit this training ({wrong}): it is of other settings or another version. "
            "Start a new run."
        )
    return saved["step"], saved["seconds"]


def _refuse_nonfinite(row: Row, show: Sequence[str]) -> None:
    bad = [key for key in show if isinstance(row.get(key), float) and not math.isfinite(row[key])]
    if bad and not row.get("skipped"):
        raise ArithmeticError(f"{bad[0]} is {row[bad[0]]}")


def _ended(name: str, step: int, error: Exception, kept: int) -> str:
    reason = str(error).partition("\n")[0]
    last = f"The last good checkpoint is that of step {kept}." if kept else "There was no good checkpoint yet."
    return (
        f"The training {name!r} cannot go on after step {step}: {type(error).__name__}: {reason}. {last} Lower the "
        "step sizes (--lr and its relatives), or look at the data."
    )


def checkpoint_of(name: str) -> str:
    """The file of a training's checkpoint."""
    return f"checkpoint-{slug(name)}.pt"


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def aligned(rows: Sequence[Row]) -> str:
    """The rows under their column names, numbers to the right."""
    columns = list(rows[0])
    cells = [columns, *[[shown(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = [isinstance(rows[0][column], str) for column in columns]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(line, widths, left, strict=True))
        for line in cells
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = list(rows[0])
    marks = ["---" if isinstance(rows[0][column], str) else "---:" for column in columns]
    lines = [[shown(row.get(column)).replace("|", "/") for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, marks, *lines])
