"""A run's folder: configuration, metrics, checkpoint and results, each written so that a crash loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from applications.frame.errors import UserError
from bilevel import files


class RunFolder:
    """``config.json``, ``metrics.jsonl``, checkpoints and whatever else a run writes under one path.

    Raises:
        UserError: from every method, where the disk is full, the path is not writable, or a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def new(cls, path: Path) -> RunFolder:
        """A folder to `begin`; one that holds a run already is refused, never overwritten."""
        if (path / "config.json").exists():
            raise UserError(f"{path} holds a run already. Go on with it by --resume {path}, or take another --out.")
        return cls(path)

    def begin(self, config: dict[str, Any]) -> None:
        """Make the folder and write the configuration."""
        with _told(f"The run folder {self.path} cannot be made"):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not the folder of a run: it has no config.json. Is the path right?")
        return cls(path)

    def read_json(self, name: str) -> Any:
        with _told(f"{self.path / name} cannot be read"):
            try:
                return json.loads((self.path / name).read_text())
            except ValueError as error:
                raise UserError(f"{self.path / name} is damaged: {error}. Restore it from a copy.") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file atomically: after a crash there is the old one or the new one."""
        with _told(f"{self.path / name} could not be written; its earlier version is untouched"):
            files.write_atomically(self.path / name, lambda file: file.write(content))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, at once."""
        with (
            _told(f"{self.path / 'metrics.jsonl'} could not be extended"),
            (self.path / "metrics.jsonl").open("a") as file,
        ):
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows so far; a last line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def rewind_metrics(self, step: int, part: str) -> None:
        """Drop the rows of a part after a step: a resumed run makes them again."""
        rows = (row for row in self.metrics() if row.get("part") != part or row["step"] <= step)
        kept = [json.dumps(row) + "\n" for row in rows]
        self.write_bytes("metrics.jsonl", "".join(kept).encode())

    def save_checkpoint(self, state: dict[str, Any], name: str) -> None:
        """Tensors, numbers and strings in dicts and lists; nothing that would need code to load."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write_bytes(name, buffer.getvalue())

    def load_checkpoint(self, device: torch.device, name: str) -> dict[str, Any]:
        """Load without executing anything (``weights_only``): a malicious file raises."""
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{self.path} has no checkpoint yet: the run ended before its first one. Start it anew.")
        with _told(f"{path} cannot be read"):
            try:
                return torch.load(path, map_location=device, weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
                raise UserError(
                    f"{path} is damaged or holds more than tensors and numbers, so it is not loaded: "
                    f"{str(error).splitlines()[0]}. Restore it from a copy, or start a new run."
                ) from error


class ReadOnly(RunFolder):
    """The folder of another rank's run: it can be read, and what is written to it goes nowhere."""

    def begin(self, config: dict[str, Any]) -> None: ...

    def write_bytes(self, name: str, content: bytes) -> None: ...

    def append_metrics(self, row: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what}: {error.strerror or error}. Free space or choose another folder, then --resume."
        ) from error


class Interruption:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one is obeyed at once.

    Use as a context manager; ``exit_code`` is None until a signal came, then 128 + its number.
    """

    exit_code: int | None = None

    def __enter__(self) -> Interruption:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.exit_code = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
