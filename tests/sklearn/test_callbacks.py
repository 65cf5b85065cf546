"""scikit-learn's callbacks are called at the beginning of a search and at its end."""

from __future__ import annotations

import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from bilevel.sklearn import BilevelSearchCV
from tests.sklearn.data import data

pytest.importorskip("sklearn.callback")


class Noted:
    """What a callback was told, as a list of words."""

    max_propagation_depth = None

    def __init__(self):
        self.words = []

    def setup(self, estimator, context):
        self.words.append("setup")

    def teardown(self, estimator, context):
        self.words.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, metadata=None):
        self.words.append(f"{type(estimator).__name__} begins {context.task_name}")
        self.weight = metadata and metadata["sample_weight"]

    def on_fit_task_end(self, estimator, context):
        self.words.append(f"{type(estimator).__name__} ends {context.task_name}")


WHOLE = ["setup", "BilevelSearchCV begins fit", "BilevelSearchCV ends fit", "teardown"]


@pytest.mark.parametrize("scoring", [None, "r2"])
def test_a_search_is_one_task(scoring):
    x, y = data("regression")
    noted, weight = Noted(), [1.0] * len(y)
    BilevelSearchCV(Ridge(), {"alpha": (0.1, 10)}, scoring=scoring).set_callbacks(noted).fit(x, y, sample_weight=weight)
    assert noted.words == WHOLE
    assert noted.weight == weight


def test_what_is_broken_off_is_torn_down():
    x, y = data("regression")
    noted = Noted()
    with pytest.raises(ValueError, match="bounds"):
        BilevelSearchCV(Ridge(), {"alpha": 3}).set_callbacks(noted).fit(x, y)
    assert noted.words == ["setup", "BilevelSearchCV begins fit", "teardown"]


def test_searches_within_a_search_are_told_of():
    x, y = data("regression")
    noted = Noted()
    inner = BilevelSearchCV(Ridge(), {"alpha": (0.1, 10)}, cv=2)
    GridSearchCV(inner, {"tol": [1e-3, 1e-5]}, cv=2).set_callbacks(noted).fit(x, y)
    assert sum(word.startswith("BilevelSearchCV ends") for word in noted.words) == 5
