"""Small examples for the tests of `bilevel.sklearn`."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, make_regression


def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "regression":
        x, y = load_diabetes(return_X_y=True)
        return x[:90], y[:90] / 50
    if name == "wide":
        return make_regression(40, 60, n_informative=5, noise=3.0, random_state=0)
    x, y = load_iris(return_X_y=True) if name == "three classes" else load_breast_cancer(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[:120]
    return x[chosen][:, :8], y[chosen]
