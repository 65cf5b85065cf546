"""Whose failure it is: what a trial may meet with settings that do not work, and what is a mistake in the program."""

from __future__ import annotations

import numpy as np
import torch

from ..solution import SolveError

OF_A_TRIAL: tuple[type[Exception], ...] = (
    SolveError,
    FloatingPointError,  # NonFiniteError is one
    OverflowError,  # of Python's own numbers: math.exp of what has diverged
    np.linalg.LinAlgError,  # SciPy's is the same
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # public, but not re-exported by name
    MemoryError,
    torch.OutOfMemoryError,
)
"""Errors that settings can bring about: a failed solve, a singular matrix, numbers without end, too little memory."""

FULL = (
    "out of memory",
    "can't allocate memory",  # PyTorch's allocator on a CPU
    "not enough memory",
    "failed to allocate",
    "storage size calculation overflowed",  # more than could be addressed
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and those of its sisters
)
"""Parts of the messages of a plain RuntimeError by which PyTorch says that memory ran out."""


def of_a_trial(error: Exception) -> bool:
    """Whether the settings of a trial brought this about. ``1 / 0``, a wrong name or a wrong type they did not."""
    if isinstance(error, OF_A_TRIAL):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in FULL)
