"""The error that an application shows to its user without a traceback, and how a command ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress


class UserError(Exception):
    """What happened, what it means and what to try: printed as it is, exit code 2."""


def note(text: str) -> None:
    """What a user should know of a run that goes on, on standard error."""
    with suppress(OSError, ValueError, AttributeError):  # closed, full, or none at all
        print(f"note: {text}", file=sys.stderr, flush=True)


def exit_code(command: Callable[[], int | None], interrupted: str = "Interrupted; what was saved is complete.") -> int:
    """That of a command, None being 0.

    2 for a `UserError`, which is told in one message, 130 after Ctrl-C, 141 where the reader of the output has gone.
    """
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
