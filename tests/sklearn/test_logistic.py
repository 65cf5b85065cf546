"""Logistic regressions of features in any units, and of classes that weigh nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import BilevelSearchCV, FeatureLogistic
from tests.sklearn.data import data

SPACE = {"C": (1e-3, 1e3)}


@pytest.mark.parametrize("name", ["two classes", "three classes"])
@pytest.mark.filterwarnings("error::bilevel.SolveWarning")
def test_features_far_from_zero(name):
    """The intercept takes up what is added to all: seconds since 1970 are no harder than centred ones."""
    x, y = data(name)
    x = 1e4 * StandardScaler().fit_transform(x)
    space = {"C": (1e-13, 1e-7)}
    near = BilevelSearchCV(LogisticRegression(), space, cv=3, refit=False).fit(x, y)
    far = BilevelSearchCV(LogisticRegression(), space, cv=3, refit=False).fit(x + 1.6e9, y)
    assert far.best_score_ == pytest.approx(near.best_score_, rel=1e-5)
    assert far.best_params_["C"] == pytest.approx(near.best_params_["C"], rel=1e-2)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.filterwarnings("error::bilevel.SolveWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
def test_features_of_any_units(fit_intercept):
    """Penalties in the units of the features give the same predictions as those of features in units of one."""
    x, y = data("two classes")
    x, units = StandardScaler().fit_transform(x), np.geomspace(1e-6, 1e6, x.shape[1])
    one = FeatureLogistic(np.full(x.shape[1], 3.0), fit_intercept=fit_intercept)
    other = FeatureLogistic(3.0 * units**2, fit_intercept=fit_intercept)
    wide = {"penalties": (1e-15, 1e15)}
    losses = [
        BilevelSearchCV(model, wide, cv=3, max_iter=1, refit=False).fit(features, y).cv_results_["mean_test_loss"][0]
        for model, features in ((one, x), (other, x * units))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.parametrize("weight", [0, -1])
def test_weights_of_classes_without_a_minimum_are_told(weight):
    x, y = data("two classes")
    for estimator, name in ((LogisticRegression, "C"), (FeatureLogistic, "penalties")):
        search = BilevelSearchCV(estimator(class_weight={0: weight}), {name: (1e-3, 1e3)}, cv=3)
        with pytest.raises(ValueError, match="class_weight"):
            search.fit(x, y)


def test_features_beyond_float64_are_told():
    x, y = data("regression")
    with pytest.raises(ValueError, match="Scale them"):
        BilevelSearchCV(Ridge(), {"alpha": (1e-3, 1e3)}).fit(x * 1e200, y)
