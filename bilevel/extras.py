"""Optional dependencies: imported where they are used; where one is missing, its extra is named."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: its name, such as ``"optuna"``.
        extra: the extra of this package that brings it.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it. A module that is
            installed and fails for want of another one raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != missing:
            raise
        raise ModuleNotFoundError(
            f'{missing} is not installed: this part of bilevel needs it. Run: pip install "bilevel[{extra}]"',
            name=missing,
        ) from error
