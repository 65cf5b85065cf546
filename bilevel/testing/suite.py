"""What all suites share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Suite(ABC, Generic[T]):
    """Tests of an object that `make` makes; pytest collects subclasses whose name begins with ``Test``.

    Attributes:
        tolerance: relative error that is right.
    """

    tolerance: float = 1e-8

    @abstractmethod
    def make(self) -> T:
        """The object to be tested, anew at each call."""


def run(suite: type[Suite[Any]] | Suite[Any]) -> None:
    """Run all tests of a suite, in the order of their names; the first that fails raises its AssertionError."""
    instance = suite() if isinstance(suite, type) else suite
    for name in dir(instance):
        if name.startswith("test_"):
            getattr(instance, name)()
