"""The folds of a search, and where its tensors live."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
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


def test_no_split_is_told():
    x, y = data("regression")
    with pytest.raises(ValueError, match="cv gives no split"):
        BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=[]).fit(x, y)
