"""The error that an application shows to its user without a traceback, and how a command ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a place that cannot be written."""


class UserError(Exception):
    """What happened, what it means and what to try: printed as it is, exit code 2."""


def note(text: str) -> None:
    """What a user should know of a run that goes on, on standard error."""
    _tell(f"note: {text}")


def _tell(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):  # closed, full, or none at all
        _discard(sys.stderr)


def exit_code(command: Callable[[], int | None], interrupted: str = "Interrupted; what was saved is complete.") -> int:
    """That of a command, None being 0.

    2 for a `UserError` and for a place that cannot be written, which are told in one message; 130 after Ctrl-C, 141
    where the reader of the output has gone.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was while the command was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            code = command() or 0
        except BaseException:
            with suppress(OSError):  # what it has to say comes first
                _flush()
            raise
        _flush()
        return code
    except UserError as error:
        _tell(f"error: {error}")
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in FULL:
            raise
        _tell(f"error: {error}. Free space, or choose another place.")
        return 2
    except KeyboardInterrupt:
        _tell(interrupted)
        return 130


def _discard(stream: TextIO) -> None:
    """What the buffer of a stream holds goes nowhere: Python flushes it once more at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flush() -> None:
    """Print what is left while an error can still be told; Python would, at its end, show where it came from.

    Raises:
        OSError: nobody reads it, or there is no space for it.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        number = getattr(error, "errno", None)
        if number == errno.EPIPE or number in FULL:
            raise
        note(f"standard output cannot be written ({getattr(error, 'strerror', None) or error}).")
