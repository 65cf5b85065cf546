"""The folds of a search, and where its tensors live."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVR

from bilevel.sklearn import BilevelSearchCV
from tests.sklearn.data import data

MODELS = {
    "ridge": (Ridge(), {"alpha": (1e-2, 1e2)}),
    "elastic net": (ElasticNet(), {"alpha": (1e-2, 1.0), "l1_ratio": (0.1, 1)}),
    "support vectors": (SVR(), {"C": (0.1, 10), "gamma": (0.1, 10)}),
    "logistic": (LogisticRegression(), {"C": (1e-2, 1e2)}),
}


@pytest.mark.parametrize("place", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_matter_where_a_search_is_called(name, place):
    model, space = MODELS[name]
    x, y = data("three classes" if name == "logistic" else "regression")
    plain = BilevelSearchCV(model, space, cv=3).fit(x, y)
    with place():
        there = BilevelSearchCV(model, space, cv=3).fit(x, y)
    np.testing.assert_array_equal(there.path_, plain.path_)


@pytest.mark.parametrize("cv", [KFold(4), ShuffleSplit(3, test_size=0.3, random_state=0)], ids=["all", "some"])
def test_each_part_of_a_fold_is_transformed_by_itself(cv):
    """A function of the whole table that it is given, as users write them, sees what it sees in a grid search."""
    x, y = data("regression")
    centred = FunctionTransformer(lambda table: (table - table.mean(0)) / table.std(0))
    pipeline, space = make_pipeline(centred, Ridge()), {"ridge__alpha": (1e-2, 1e2)}
    search = BilevelSearchCV(pipeline, space, cv=cv).fit(x, y)
    place = {"ridge__alpha": [search.best_params_["ridge__alpha"]]}
    grid = GridSearchCV(pipeline, place, cv=cv, scoring="neg_mean_squared_error").fit(x, y)
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-9)


@pytest.mark.parametrize("words", ["aabbcc", "abacbc"], ids=["another number", "another name"])
def test_other_columns_for_held_out_examples_are_told(words):
    _, y = data("regression")
    table = pd.DataFrame({"word": np.repeat(list(words), len(y) // len(words))})
    pipeline = make_pipeline(FunctionTransformer(pd.get_dummies), Ridge())
    cv = [(np.arange(30), np.arange(30, 90))] if words == "aabbcc" else [(np.arange(30), np.arange(60, 90))]
    with pytest.raises(ValueError, match="other columns for the held-out part"):
        BilevelSearchCV(pipeline, {"ridge__alpha": (1e-2, 1e2)}, cv=cv).fit(table, y)


class Dropping(StandardScaler):
    def fit_transform(self, X, y=None):
        return super().fit_transform(X)[1:]


def test_steps_that_drop_examples_are_told():
    x, y = data("regression")
    with pytest.raises(ValueError, match="change the number of examples"):
        BilevelSearchCV(make_pipeline(Dropping(), Ridge()), {"ridge__alpha": (1e-2, 1e2)}).fit(x, y)


def test_no_split_is_told():
    x, y = data("regression")
    with pytest.raises(ValueError, match="cv gives no split"):
        BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=[]).fit(x, y)
