"""A command that measures and has no training to resume: options that are checked, one writer to its folder."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import tyro

from applications.frame.errors import exit_code
from applications.frame.options import check_folder, check_values, check_words, settings_told
from applications.frame.output import forgiving
from applications.frame.run_folder import RunFolder

T = TypeVar("T")


def main(
    name: str,
    arguments: list[str],
    kind: type[T],
    run: Callable[[T], int | None],
    check: Callable[[T], None] = lambda options: None,
    interrupted: str = "Interrupted; what was saved is complete.",
    folder: str | None = "out",
) -> int:
    """Parse the options, check them, and run as the one writer to their folder.

    Args:
        name: of the command under applications, such as ``"measurements.advice"``.
        kind: the options.
        run: does the work, and gives the exit code; None is 0.
        check: refuses, before there is a folder, what cannot be run.
        interrupted: what Ctrl-C leaves, in words.
        folder: the option that is the folder which it writes into, and nobody else meanwhile.

    Returns:
        The exit code: that of the work; 2 for bad options, which are told in one message.
    """

    def command() -> int | None:
        check_words(arguments)
        options = tyro.cli(kind, args=arguments, prog=f"python -m applications.{name}")
        check_values(options)
        place: Path | None = None if folder is None else getattr(options, folder)
        check_folder(place, str(folder))
        with settings_told(options), forgiving(), ended_by_signals():
            check(options)
            with nullcontext() if place is None else one_writer(place):
                return run(options)

    return exit_code(command, interrupted)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is within as an error does, so that the processes which it started end with it."""

    def end(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def one_writer(folder: Path) -> Iterator[RunFolder]:
    """The folder, made where it is not there, with other writers kept out of it.

    Raises:
        UserError: another process writes into it, or it cannot be made.
    """
    held = RunFolder(folder)
    held.hold()
    try:
        yield held
    finally:
        held.release()
