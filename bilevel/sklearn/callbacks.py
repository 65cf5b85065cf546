"""scikit-learn's callbacks (``set_callbacks``, from 1.9 on), such as its progress bar."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def one_task(fit: F) -> F:
    """Decorate a `fit` that callbacks see as one task: it begins, and it ends."""
    try:
        from sklearn.callback import with_callbacks
    except ImportError:  # before 1.9
        return fit

    @functools.wraps(fit)
    def seen(estimator: Any, X: Any, y: Any = None, **params: Any) -> Any:
        weight = params.get("sample_weight")
        given = {"estimator": estimator, "X": X, "y": y}
        given["metadata"] = None if weight is None else {"sample_weight": weight}
        task = estimator._init_callback_context()
        task.call_on_fit_task_begin(**given)
        fit(estimator, X, y, **params)
        task.call_on_fit_task_end(**given)
        return estimator

    found: F = with_callbacks(seen)
    return found
