"""The descent on the cross-validation loss."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVR

from bilevel.sklearn import BilevelSearchCV
from tests.sklearn.data import data

FLAT = [
    (Lasso(), "alpha", (1e-4, 10.0)),  # no feature is left
    (ElasticNet(), "alpha", (1e-4, 10.0)),
    (SVR(epsilon=20), "epsilon", (0.1, 50.0)),  # no example is outside the tube
    (KernelRidge(kernel="rbf", gamma=1e7), "gamma", (1e-3, 1e8)),  # no example is near another
]


@pytest.mark.parametrize(("model", "name", "bounds"), FLAT, ids=[type(case[0]).__name__ for case in FLAT])
def test_a_search_that_begins_where_the_loss_is_flat(model, name, bounds):
    x, y = data("regression")
    search = BilevelSearchCV(model, {name: bounds}, cv=5).fit(x, y)
    grid = GridSearchCV(model, {name: np.geomspace(*bounds, 25)}, cv=5, scoring="neg_mean_squared_error").fit(x, y)
    assert search.best_score_ > grid.cv_results_["mean_test_score"].min() + 0.1
    assert search.best_score_ >= grid.best_score_ - 1e-3 * abs(grid.best_score_)


def test_a_flat_loss_is_looked_at_once():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=3, n_starts=3, random_state=0).fit(x, np.ones(len(y)))
    assert search.n_evaluations_ < 10
    assert search.best_score_ == pytest.approx(0, abs=1e-20)
