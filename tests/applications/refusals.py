"""Bad options of the commands, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest

NO_DATA = (
    (("--data", "nothing"), "no data set 'nothing'"),
    (("--data", "mnist", "--data-root", "/nowhere"), "MNIST is not in /nowhere"),
)
"""Of every application that reads data sets by their names."""


def refusals(*cases: Any) -> pytest.MarkDecorator:
    """A test of ``(arguments, message)``, once for each: what is typed, and a part of the message that refuses it.

    Args:
        cases: such pairs, or `pytest.param` of them; ``"--steps 0"`` is ``(["--steps", "0"], "--steps is 0")``.
    """
    pairs = [_pair(case) if isinstance(case, str) else case for case in cases]
    return pytest.mark.parametrize(("arguments", "message"), pairs)


def _pair(case: str) -> tuple[list[str], str]:
    option, value = case.split()
    return [option, value], f"{option} is {value}"
