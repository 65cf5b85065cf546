"""Signals that ask a run to stop: after the current step, or in the midst of it, where the step can be made again."""

from __future__ import annotations

import signal
import types
from typing import ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A step was given up, since a signal asks to stop: nothing of it has happened, and resuming makes it again.

    It is no `Exception`, so that a library which takes failed fits for bad candidates lets it through.
    """


class Interruption:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop; a second one is obeyed at once.

    Use as a context manager; ``exit_code`` is None until a signal came, then 128 + its number. A signal that the
    process was told to ignore, as ``nohup`` does with SIGHUP, stays ignored.
    """

    _current: ClassVar[Interruption | None] = None

    def __init__(self, within_steps: bool = True):
        """``within_steps``: whether `stop_if_asked` may give up a step; not where other processes wait for it."""
        self.exit_code: int | None = None
        self.within_steps = within_steps

    def __enter__(self) -> Interruption:
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._old = {number: signal.signal(number, self._note) for number in heard}
        self._outer, Interruption._current = Interruption._current, self
        return self

    def __exit__(self, *_: object) -> None:
        Interruption._current = self._outer
        self._restore()

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.exit_code = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """To be called between the parts of a long step, from any thread, while the step has changed nothing yet.

    Raises:
        Stopped: a signal asks to stop.
    """
    current = Interruption._current
    if current is not None and current.within_steps and current.exit_code is not None:
        raise Stopped
