"""A loop that calls a function, as an iterator that can be asked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Ended(BaseException):
    """Nobody asks for more; no handler of an `Exception` is to take it for a failure."""


def one_by_one(work: Callable[[Callable[[T], None]], object]) -> Iterator[T]:
    """What ``work`` gives to the function that it is called with; it waits there until the next one is asked for.

    For optimizers such as SciPy's, which call and cannot be asked. ``work`` has a thread of its own, and the two never
    run side by side. An iterator that is closed or dropped ends it at the place where it waits.

    Raises:
        What ``work`` raises.
    """
    asked, given = threading.Semaphore(0), queue.SimpleQueue[tuple[T] | BaseException | None]()
    ended = threading.Event()

    def give(item: T) -> None:
        given.put((item,))
        asked.acquire()
        if ended.is_set():
            raise Ended

    def run() -> None:
        try:
            work(give)
        except Ended:
            pass
        except BaseException as error:
            given.put(error)
        else:
            given.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while isinstance(found := given.get(), tuple):
            yield found[0]
            asked.release()
        if found is not None:
            raise found
    finally:
        ended.set()
        asked.release()
        thread.join()
