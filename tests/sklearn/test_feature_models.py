"""The models with a hyperparameter for each feature, by themselves and of sparse features."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from bilevel.sklearn import BilevelSearchCV, FeatureKernelRidge, FeatureLogistic, FeatureRidge
from tests.sklearn.data import data

MODELS = {
    "alphas": (FeatureRidge, {}, "regression"),
    "gammas": (FeatureKernelRidge, {}, "regression"),
    "penalties": (FeatureLogistic, {"tol": 1e-9}, "two classes"),
}


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_sparse_features(name, form):
    kind, settings, examples = MODELS[name]
    x, y = data(examples)
    x = np.where(np.abs(x) > np.median(np.abs(x)), x / np.abs(x).max(0), 0.0)
    model = kind(**{name: np.geomspace(0.1, 10, x.shape[1])}, **settings)
    dense = model.fit(x, y).predict(x)
    np.testing.assert_allclose(model.fit(form(x), y).predict(form(x)), dense, rtol=1e-6)
    pipeline = make_pipeline(MaxAbsScaler(), model)
    space = {f"{kind.__name__.lower()}__{name}": (1e-2, 1e2)}
    searches = [BilevelSearchCV(pipeline, space, cv=3, max_iter=3).fit(part, y) for part in (x, form(x))]
    assert searches[1].best_score_ == pytest.approx(searches[0].best_score_, rel=1e-9)
    np.testing.assert_allclose(searches[1].predict(form(x)), searches[0].predict(x), rtol=1e-6)


def test_logarithms_of_probabilities():
    x, y = data("three classes")
    settings = {"max_iter": 10_000, "tol": 1e-9}
    ours, own = FeatureLogistic(2.0, **settings).fit(x, y), LogisticRegression(C=0.5, **settings).fit(x, y)
    np.testing.assert_allclose(ours.predict_log_proba(x), np.log(ours.predict_proba(x)))
    np.testing.assert_allclose(ours.predict_log_proba(x), own.predict_log_proba(x), rtol=1e-4)
    search = BilevelSearchCV(FeatureLogistic(), {"penalties": (1e-2, 1e2)}, cv=3).fit(x, y)
    assert search.predict_log_proba(x).shape == (len(x), 3)


@pytest.mark.parametrize("alphas", [np.array(2.0), np.float32(2), 2, [2.0] * 10])
def test_numbers_in_any_wrapping(alphas):
    x, y = data("regression")
    np.testing.assert_allclose(FeatureRidge(alphas).fit(x, y).coef_, FeatureRidge(2.0).fit(x, y).coef_)
