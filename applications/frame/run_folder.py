"""A run's folder: configuration, metrics, checkpoint and results, each written so that a crash loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from applications.frame import checkpoint, names, schema
from applications.frame.checkpoint import Damaged
from applications.frame.errors import FULL, UserError, note
from applications.frame.lock import Lock, refuse_link
from bilevel import files, tuning


class RunFolder:
    """``config.json``, ``metrics.jsonl``, checkpoints and whatever else a run writes under one path.

    Attributes:
        fresh: whether there is no run in it yet, and one is to `begin`.

    Raises:
        UserError: from every method, where the disk is full, the path is not writable, or a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.fresh = False
        self._lock: Lock | None = None
        self._made: list[Path] = []

    @classmethod
    def new(cls, path: Path) -> RunFolder:
        """A folder to `begin`; one that holds a run already is refused, never overwritten."""
        folder = cls(path)
        folder.fresh = True
        folder._refuse_a_run()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run."""
        with _told(f"{path} is not the folder of a run"):
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is not the folder of a run: it has no config.json. Is the path right?")
        return cls(path)

    def begin(self, config: dict[str, Any]) -> None:
        """Make the folder, keep other writers out of it, and write the configuration."""
        self.hold()
        if self.fresh:
            self._refuse_a_run()  # of a process that was faster
            self.fresh = False
        self.write_json("config.json", config)

    def hold(self) -> None:
        """Be the one writer to the folder until `release`, and remove what killed writers left half written."""
        if self._lock is None:
            with _told(f"The folder {self.path} cannot be made"):
                self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path)
                for left in (*self.path.glob(".*.partial"), *self.path.glob("*.next")):
                    left.unlink()

    def release(self) -> None:
        """Let other writers in; folders that `hold` made, and that nothing was written into, go again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            with contextlib.suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    def read_json(self, name: str) -> Any:
        with _told(f"{self.path / name} cannot be read"):
            try:
                return json.loads((self.path / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path / name} is damaged: {error}. Restore it from a copy.") from error

    def results(self) -> schema.Results:
        """``results.json``; empty before the first part."""
        if not _is_there(self.path / "results.json"):
            return {"parts": {}, "tables": {}}
        found: schema.Results = self.read_json("results.json")
        schema.check(found, schema.Results, self.path / "results.json", "file of results")
        return found

    def set_results_aside(self) -> None:
        """As ``results.previous.json``: they are of a shorter run."""
        path = self.path / "results.json"
        with _told(f"{path} could not be renamed"), contextlib.suppress(FileNotFoundError):
            path.replace(before(path))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, as_json(value))

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, names.to_bytes(text))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file atomically: after a crash there is the old one or the new one."""
        with self._writing(name) as path:
            files.write_atomically(path, lambda file: file.write(content))

    def write_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        """Settings of solvers, as `bilevel.tuning.save` writes them."""
        with self._writing(name) as path:
            tuning.save(path, settings)

    def write_new(self, free: Iterable[str], content: bytes) -> Path:
        """Write a whole file under the first of the names that is free, whoever else takes names at the same time.

        Raises:
            UserError: none of them is free.
        """
        path = self.path
        for name in free:
            path = self.path / name
            with _told(f"{path} could not be written"), contextlib.suppress(FileExistsError):
                self.path.mkdir(parents=True, exist_ok=True)
                path.open("xb").close()
                try:
                    self.write_bytes(name, content)
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
                return path
        raise UserError(f"{path} exists, and is not overwritten. Delete it, or take another name.")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, at once."""
        with self._writing("metrics.jsonl") as path, path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows so far; a last line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        with _told(f"{path} cannot be read"):
            *lines, _ = path.read_bytes().split(b"\n") if _is_there(path) else [b""]
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}, is damaged: {error}. Restore it from a copy.") from error
            schema.check_record(row, path, number)
            rows.append(row)
        return rows

    def metrics_until(self, step: int, part: str) -> list[dict[str, Any]]:
        """The rows without those of a part after a step, which a resumed run makes again.

        Raises:
            UserError: the part has not all rows up to this step.
        """
        rows = [row for row in self.metrics() if row.get("part") != part or row["step"] <= step]
        last = max((row["step"] for row in rows if row.get("part") == part), default=0)
        if last < step:
            raise UserError(
                f"{self.path / 'metrics.jsonl'} is damaged: the rows of {part!r} end at step {last}, and its "
                f"checkpoint is that of step {step}. Restore it from a copy."
            )
        return rows

    def write_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """These rows in place of all."""
        self.write_bytes("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def save_checkpoint(self, state: dict[str, Any], name: str) -> None:
        """Tensors, numbers and strings in dicts and lists; nothing that would need code to load.

        The checkpoint before it is kept too, and whenever the process ends one of the two is whole.
        """
        self._sync_metrics()  # a checkpoint is never ahead of its rows
        content = checkpoint.to_bytes(state)
        with self._writing(name) as path:
            new = path.with_name(f"{name}.next")
            refuse_link(new)
            files.write_atomically(new, lambda file: file.write(content))
            if path.exists():
                os.replace(path, before(path))
            os.replace(new, path)

    def load_checkpoint(self, device: torch.device, name: str) -> dict[str, Any]:
        """The last checkpoint, or where it is damaged the one before, which is told; nothing in it is executed."""
        path = self.path / name
        reasons = []
        for one in (path, before(path)):
            if not one.is_file():
                continue
            with _told(f"{one} cannot be read"):
                content = one.read_bytes()
            try:
                state, hashed = checkpoint.from_bytes(content, device)
            except Damaged as reason:
                reasons.append(f"{one} is damaged, so it is not loaded: {reason}")
                continue
            if not hashed:
                note(f"{one} carries no hash, as earlier versions wrote it: it is taken as it is.")
            if one != path:
                note(f"{'; '.join(reasons) or f'{path} is missing'}. The checkpoint before it serves: {one}.")
            return state
        if reasons:
            raise UserError(f"{'; '.join(reasons)}. Restore it from a copy, or start a new run.")
        raise UserError(f"{self.path} has no checkpoint yet: the run ended before its first one. Start it anew.")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        path = self.path / name
        refuse_link(path)
        with _told(f"{path} could not be written; its earlier version is untouched"):
            yield path

    def _sync_metrics(self) -> None:
        with contextlib.suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as file:
            os.fsync(file.fileno())

    def has_checkpoint(self, name: str) -> bool:
        return any(path.is_file() for path in (self.path / name, before(self.path / name)))

    def _refuse_a_run(self) -> None:
        if (self.path / "config.json").exists():
            raise UserError(
                f"{self.path} holds a run already. Go on with it by --resume {self.path}, or take another --out."
            )


def _is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        UserError: it is a folder or a pipe: nothing of a run could be read from it, and reading may wait for ever.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is damaged: it is no file. Restore it from a copy, or remove it.")
    return path.is_file()


def as_json(value: Any) -> bytes:
    """What `RunFolder.write_json` writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def before(path: Path) -> Path:
    """Where the file lies that was there before the last one: a checkpoint, or the results of a shorter run."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class ReadOnly(RunFolder):
    """The folder of another rank's run: it can be read, and what is written to it goes nowhere."""

    def begin(self, config: dict[str, Any]) -> None: ...

    def hold(self) -> None: ...

    def save_checkpoint(self, state: dict[str, Any], name: str) -> None: ...

    def write_bytes(self, name: str, content: bytes) -> None: ...

    def append_metrics(self, row: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def understood(what: object) -> Iterator[None]:
    """Use what files from elsewhere hold: where that is not what this program writes, it is told.

    Raises:
        UserError: an entry is missing, or is of another type or form than is needed.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if tuning.of_a_trial(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{what} does not hold what this program writes ({told}, at {Path(place.filename).name}, line "
            f"{place.lineno}): it is damaged, or of another version. Restore it from a copy, or start a new run."
        ) from error


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Free space or choose another folder, then --resume." if error.errno in FULL else "Is the path right?"
        raise UserError(f"{what}: {error.strerror or error}. {hint}") from error
