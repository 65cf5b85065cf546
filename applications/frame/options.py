"""What any value of any option must be, and what is told where a value asks for more than there is."""

from __future__ import annotations

import dataclasses
import math
import os
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bilevel as bl
from applications.frame.errors import UserError

LARGEST = 10**9
"""The largest whole number, a count or a seed: what is larger is a slip, and overflows somewhere."""
LONGEST = 255
"""Bytes of a name in a path, as file systems have it."""


def check_values(options: Any) -> None:
    """Refuse numbers that are negative, infinite, not a number or huge, and names that no file can have.

    Raises:
        UserError: naming the option.
    """
    for name, values, _ in _flat(options, options):
        for value in values if isinstance(values, tuple) else (values,):
            reason = _refused(name, value)
            if reason is not None:
                raise UserError(f"{option(name)} is {_shortened(value)}: {reason}.")


def check_words(arguments: Iterable[str]) -> None:
    """Refuse words that are empty: as the path of a file or a folder, such a one would be where the command runs.

    Raises:
        UserError: naming the option.
    """
    before = ""
    for word in arguments:
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            told = (name if equals else before) or "A word of the command"
            raise UserError(f"{told} is empty: a value is needed. Is a variable of the shell not set?")
        before = name if word.startswith("--") else before


def _flat(options: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of each; those of options within options are called ``outer.inner``."""
    for field in dataclasses.fields(options):
        name, value, usual = prefix + field.name, getattr(options, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, usual, f"{name}.")
        else:
            yield name, value, usual


def option(name: str) -> str:
    """The option of a knob."""
    return f"--{name.replace('_', '-')}"


def imported(option: str, path: str, known: str = "not") -> Any:
    """What an import path ``package.module:name``, given by an option, names.

    Args:
        known: what else it might be, as the message says it.

    Raises:
        UserError: it leads nowhere.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"{option} {path} is {known} an import path 'package.module:name'.")
    try:
        return pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:  # it may run the user's code
        raise UserError(f"{option} {path} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error


def _refused(name: str, value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is needed"
    if isinstance(value, int | float) and value < 0:
        return "it cannot be negative"
    if name.endswith("threads") and value is not None and value > most_threads():
        return f"more than {most_threads()} threads are of no use on this machine"
    if isinstance(value, int) and value > LARGEST:
        return f"at most {LARGEST:,} makes sense"
    if isinstance(value, str | Path):
        try:
            parts = os.fsencode(value).split(b"/") if "\0" not in str(value) else [b""]
        except UnicodeEncodeError:
            return "no file can have this name in this locale"
        if "\0" in str(value) or max(map(len, parts)) > LONGEST or sum(map(len, parts)) > 4000:
            return f"no file can have this name, a part of it is longer than {LONGEST} bytes or has a NUL"
    return None


def most_threads() -> int:
    return max(64, 4 * (os.cpu_count() or 1))


def is_file(path: Path) -> bool:
    """Whether there is such a file; not where no file can have this name, or where nobody may look."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_folder(path: Path | None, name: str) -> None:
    """Refuse a folder to write into that is a file, or lies below one.

    Raises:
        UserError: naming the option.
    """
    for place in () if path is None else (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{option(name)} is {path}, and {place} is a file: a folder is needed. Take another.")


@contextmanager
def settings_told(options: Any) -> Iterator[None]:
    """What the values of options bring about, such as too little memory or a solve that fails, names these options.

    Raises:
        UserError: it was such an error.
    """
    try:
        yield
    except Exception as error:
        if not (bl.tuning.of_a_trial(error) or _of_a_size(error)):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise UserError(
            f"These settings cannot be run ({type(error).__name__}: {reason}). {changed(options)}"
        ) from error


PLACES = ("out", "resume", "worker")


def changed(options: Any) -> str:
    """The options that are not at their defaults, the farthest from them first, as what to look at."""
    given = []
    required = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.default is dataclasses.MISSING
    }
    for name, value, usual in _flat(options, type(options)(**required)):
        if value != usual and name not in PLACES:
            numbers = all(isinstance(number, int | float) for number in (value, usual))
            given.append((value / usual if numbers and usual else 0.0, f"{option(name)} {_shortened(value)}"))
    told = ", ".join(text for _, text in sorted(given, key=lambda one: -one[0]))
    return f"Look at {told}." if given else "All options are at their defaults."


SIZES = (
    "negative dimension",
    "overflow",
    "array is too big",
    "maximum allowed dimension",
    "invalid shape",
    "too large",
)


def _of_a_size(error: Exception) -> bool:
    return isinstance(error, RuntimeError | ValueError) and any(text in str(error).lower() for text in SIZES)


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]!r}... ({len(text)} characters)"
