"""Scikit-learn models tuned by hypergradients: `BilevelSearchCV`, and models with a hyperparameter for each feature.

It needs ``pip install "bilevel[sklearn]"``; scikit-learn is imported when one of the names is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..extras import require

if TYPE_CHECKING:
    from .cross_validation import Evaluation
    from .estimator import BilevelSearchCV
    from .feature_models import FeatureKernelRidge, FeatureLogistic, FeatureRidge

__all__ = ["BilevelSearchCV", "Evaluation", "FeatureKernelRidge", "FeatureLogistic", "FeatureRidge"]
PLACES = {"BilevelSearchCV": ".estimator", "Evaluation": ".cross_validation"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("sklearn", "sklearn")
    return getattr(importlib.import_module(PLACES.get(name, ".feature_models"), __name__), name)


def __dir__() -> list[str]:
    return __all__
