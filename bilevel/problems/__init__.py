"""Bilevel problems whose solution and hypergradient are known exactly: the truth that methods are held to.

Each has ``kind``, ``init``, ``hparams``, ``inner(params, hparams)``, ``outer(params, hparams)``, and the exact
``solution`` and ``hypergradient`` at given hyperparameters, by dense linear algebra in the problem's own dtype. Those
of `finite_sums` are for mini-batches.
"""

from __future__ import annotations

import torch

from . import finite_sums
from .base import BilevelTestProblem, ClosedFormProblem, NewtonProblem
from .constrained import LassoPath, Portfolio
from .logistic import Logistic
from .quadratics import Quadratics, Saddle, Singular
from .ridge import KernelRidge, Ridge, WeightedRidge
from .roots import LinearFixedPoint, NonSymmetricRoot
from .scaled import Known, Scaled, hard, in_double

__all__ = [
    "BilevelTestProblem",
    "ClosedFormProblem",
    "KernelRidge",
    "Known",
    "LassoPath",
    "LinearFixedPoint",
    "Logistic",
    "NewtonProblem",
    "NonSymmetricRoot",
    "Portfolio",
    "Quadratics",
    "Ridge",
    "Saddle",
    "Scaled",
    "Singular",
    "WeightedRidge",
    "collection",
    "finite_sums",
    "hard",
    "in_double",
]


def collection(dtype: torch.dtype = torch.float64) -> dict[str, BilevelTestProblem]:
    """One of each, by name."""
    return {
        "quadratics": Quadratics(conditions=(3.0, 10.0), size=8, dtype=dtype),
        "ill-conditioned": Quadratics(conditions=(1e6,), size=8, dtype=dtype),
        "saddle": Saddle(dtype=dtype),
        "singular": Singular(dtype=dtype),
        "ridge": Ridge(dtype=dtype),
        "ridge, a penalty each": Ridge(per_feature=True, dtype=dtype),
        "weighted ridge": WeightedRidge(dtype=dtype),
        "kernel ridge": KernelRidge(dtype=dtype),
        "logistic": Logistic(dtype=dtype),
        "linear fixed point": LinearFixedPoint(dtype=dtype),
        "non-symmetric root": NonSymmetricRoot(dtype=dtype),
        "lasso path": LassoPath(dtype=dtype),
        "quadratic program": Portfolio(dtype=dtype),
    }
