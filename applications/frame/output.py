"""Standard output and error that a run does not die of: a reader that goes, a full disk, none at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from applications.frame.errors import note


class _Forgiving:
    """A stream that, once it cannot be written, is written to nowhere."""

    def __init__(self, stream: TextIO | None, name: str):
        self._name, self._lost = name, stream is None
        self._stream: TextIO = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> int:
        with self._kept():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:  # letters that the terminal has not, bytes of names that are none
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if self._lost:
                return
            self._lost, nowhere = True, open(os.devnull, "w")  # noqa: SIM115
            with suppress(OSError, ValueError):  # what its buffer holds is written once more at the end of the process
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = nowhere
            note(f"{self._name} cannot be written ({getattr(error, 'strerror', None) or error}): the run goes on.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving() -> Iterator[None]:
    """Within it, what cannot be printed is not printed, and nothing is raised."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Forgiving(sys.stdout, "standard output"), _Forgiving(sys.stderr, "standard error")
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = streams
