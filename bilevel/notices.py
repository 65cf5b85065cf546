"""Warnings at the line of the user that caused them, once for each kind of failure and line."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

LIBRARIES = ("bilevel", "torch", "sklearn", "joblib", "optuna", "contextlib", "functools", "threading", "concurrent")
"""Packages whose lines are no line of the user: this one, and those that stand between it and the user."""


@dataclass(frozen=True)
class Place:
    """A line of the user, as `warnings` names it; ``registry`` is where Python notes what was shown there."""

    filename: str
    line: int
    module: str
    registry: dict[Any, Any] = field(repr=False, compare=False)


class Notice(str):
    """A text that equals every other one of its kind, so that Python's filters take them for one.

    Without that, a number in the text, such as a residual, makes each warning of a loop a new one.
    """

    __slots__ = ("kind",)

    kind: Hashable

    def __new__(cls, text: str, kind: Hashable) -> Notice:
        notice = super().__new__(cls, text)
        notice.kind = kind
        return notice

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Notice) and self.kind == other.kind

    def __hash__(self) -> int:
        return hash(self.kind)


def place_of_user() -> Place | None:
    """The innermost line of this thread that is neither of this library nor of PyTorch.

    None in threads that have no such line, as those in which PyTorch differentiates on a GPU.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or "<unknown>"
        if module.partition(".")[0] not in LIBRARIES:
            registry = frame.f_globals.setdefault("__warningregistry__", {})
            return Place(frame.f_code.co_filename, frame.f_lineno, module, registry)
        frame = frame.f_back
    return None


def tell(text: str, category: type[Warning], *, kind: Hashable = None, place: Place | None = None) -> None:
    """Warn at the user's line.

    Args:
        kind: what makes two warnings of one line the same one; the text itself by default.
        place: the line where this thread has none of the user's.
    """
    here = place_of_user() or place
    if here is None:
        warnings.warn(text, category, stacklevel=2)
        return
    notice = Notice(text, text if kind is None else kind)
    key = (here.filename, here.line, category, notice.kind)
    if _SHOWN.get(key) is warnings.filters and _action(text, category, here) == "default":
        return
    _SHOWN[key] = warnings.filters
    warnings.warn_explicit(notice, category, here.filename, here.line, here.module, here.registry)


_SHOWN: dict[Hashable, object] = {}
"""What was told, and the filters then in force. Python forgets what it showed whenever any library touches its filters,
as PyTorch does in the first backward pass; `warnings.catch_warnings` makes other filters, under which all is new."""


def _action(text: str, category: type[Warning], place: Place) -> str:
    """What Python's filters do with a warning."""
    for action, message, kind, module, line in warnings.filters:
        of_text = message is None or re.compile(message).match(text)
        of_place = (module is None or re.compile(module).match(place.module)) and line in (0, place.line)
        if of_text and of_place and issubclass(category, kind):
            return action
    return "default"
