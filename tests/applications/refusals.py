"""Bad options of the commands, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def refusals(*cases: tuple[Sequence[str], str]) -> pytest.MarkDecorator:
    """A test of ``(arguments, message)``, once for each: what is typed, and a part of the message that refuses it."""
    return pytest.mark.parametrize(("arguments", "message"), cases)
