"""One check for every file of plain values: that it holds what the type says, told by the name of what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type
from typing_extensions import NotRequired, TypedDict

from applications.frame.errors import UserError


class Part(TypedDict):
    """What a `Run.part` found, and the seconds that it took."""

    seconds: float
    value: Any


class Results(TypedDict):
    """``results.json``."""

    parts: dict[str, Part]
    tables: dict[str, list[dict[str, Any]]]


class Record(TypedDict):
    """What each line of ``metrics.jsonl`` has at least."""

    step: int
    part: NotRequired[str]


class Checkpoint(TypedDict):
    """A checkpoint of a training."""

    training: dict[str, Any]
    step: int
    seconds: float


def fits(value: Any, hint: Any) -> str | None:
    """None, or why a value is not of a type: a truth value is no number, and a whole number is one."""
    if isinstance(value, bool) and hint in (int, float, int | None, float | None):
        return "is a truth value, where a number is expected"
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        return str(error).replace("\n", "; ")
    return None


def check(value: Any, hint: Any, file: object, what: str) -> None:
    """That the content of a file is of this type.

    Raises:
        UserError: naming the file.
    """
    reason = fits(value, hint)
    if reason is not None:
        raise UserError(f"{file} is no {what}, or damaged: {_short(reason)}. Restore it from a copy.")


def check_record(record: Any, file: object, line: int) -> None:
    """That a line of ``metrics.jsonl`` is a record.

    Raises:
        UserError: naming the file and the line.
    """
    if isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("part", ""), str):
        return  # as nearly all are: files have a hundred thousand of them, and typeguard would take seconds
    known = {key: record[key] for key in ("step", "part") if key in record} if isinstance(record, dict) else record
    reason = fits(known, Record)
    if reason is not None:
        raise UserError(f"{file}, line {line}, is no record of a training: {_short(reason)}. Restore it from a copy.")


def unknown_and_missing(given: Sequence[str], known: Sequence[str]) -> str:
    """Names that are in one only, in words."""
    unknown, missing = [n for n in given if n not in known], [n for n in known if n not in given]
    told = [f"{word} {', '.join(map(repr, sorted(names)))}" for word, names in
            (("it has the unknown", unknown), ("it lacks", missing)) if names]  # fmt: skip
    return " and ".join(told)


def _short(reason: str) -> str:
    return reason if len(reason) < 300 else f"{reason[:300]} ..."
