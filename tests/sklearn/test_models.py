"""The twins of scikit-learn's models predict as they do, and their hypergradients are finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from bilevel.sklearn import FeatureKernelRidge, FeatureLogistic, FeatureRidge, logistic
from bilevel.sklearn.cross_validation import CrossValidation
from bilevel.sklearn.fit_params import weigh_classes
from bilevel.sklearn.folds import features_of, make_folds, take_apart
from bilevel.sklearn.models import hyperparameters, searchable
from bilevel.sklearn.space import make_space
from tests.sklearn.data import data

WIDTHS = np.geomspace(0.05, 0.5, 10)
CASES = {
    "ridge": (Ridge(alpha=3.0), "regression"),
    "ridge without intercept": (Ridge(alpha=3.0, fit_intercept=False), "regression"),
    "wide ridge": (Ridge(alpha=3.0), "wide"),
    "feature ridge": (FeatureRidge(np.geomspace(0.1, 100, 10)), "regression"),
    "wide feature ridge": (FeatureRidge(np.geomspace(0.1, 100, 60)), "wide"),
    "kernel ridge": (KernelRidge(alpha=0.3, kernel="rbf", gamma=0.05), "regression"),
    "linear kernel": (KernelRidge(alpha=0.3, kernel="linear"), "regression"),
    "feature kernel ridge": (FeatureKernelRidge(alpha=0.3, gammas=WIDTHS), "regression"),
    "logistic": (LogisticRegression(C=0.7, tol=1e-10, max_iter=10_000), "two classes"),
    "logistic without intercept": (
        LogisticRegression(C=0.7, fit_intercept=False, tol=1e-10, max_iter=10_000),
        "two classes",
    ),
    "softmax": (LogisticRegression(C=0.7, tol=1e-10, max_iter=10_000), "three classes"),
    "feature logistic": (FeatureLogistic(np.geomspace(0.1, 10, 8), tol=1e-10, max_iter=10_000), "two classes"),
    "feature softmax": (FeatureLogistic(np.geomspace(0.1, 10, 4), tol=1e-10, max_iter=10_000), "three classes"),
    "elastic net": (ElasticNet(alpha=0.05, l1_ratio=0.6, tol=1e-12, max_iter=100_000), "regression"),
    "lasso": (Lasso(alpha=0.05, tol=1e-12, max_iter=100_000), "regression"),
    "support vectors": (SVR(C=2.0, epsilon=0.2, gamma=0.05, tol=1e-9), "regression"),
    "support vectors, gamma of the data": (SVR(C=2.0, epsilon=0.2, tol=1e-9), "regression"),
}


def cross_validation(
    model, name: str, weight: np.ndarray | None = None, splits: list[tuple[np.ndarray, np.ndarray]] | None = None
) -> tuple[CrossValidation, np.ndarray]:
    """The search of all hyperparameters of a model that is behind a scaler, and where the model itself stands."""
    x, y = data(name)
    classes = np.unique(y) if hasattr(model, "predict_proba") else None
    splits = splits or list(KFold(3).split(x) if classes is None else StratifiedKFold(3).split(x, y))
    before, model, _ = take_apart(make_pipeline(StandardScaler(), model))
    entry = searchable(model)
    folds = make_folds(features_of(before, model, x, y, splits, {}), y, classes, splits, weight)
    if classes is not None:
        weigh_classes(folds, model.class_weight, classes)
    bounds = {name: (1e-4, 1.0 if kind == "share" else 1e4) for name, kind in entry.kinds.items()}
    values = hyperparameters(model, entry.kinds, folds)
    if getattr(model, "gamma", None) == "scale":
        del bounds["gamma"]
    space = make_space(bounds, entry.known(folds.num_features), "")
    constants = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items() if k not in bounds}
    twin = entry.twin(folds, model.get_params(deep=False))
    return CrossValidation(folds, space, twin, constants), space.start(values)


def assert_is_the_model(search: CrossValidation, start: np.ndarray, model, name: str, splits, weight=None) -> None:
    """Its predictions in each fold are those of scikit-learn's fit on the fold's training part."""
    x, y = data(name)
    found = search.predict({**search.constants, **search.space.tensors(torch.from_numpy(start))})
    estimator = make_pipeline(StandardScaler(), clone(model))
    for k, (train, test) in enumerate(splits):
        params = {} if weight is None else {f"{estimator.steps[-1][0]}__sample_weight": weight[train]}
        estimator.fit(x[train], y[train], **params)
        if search.folds.num_classes:
            logits = found[k]
            logits = torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
            ours, theirs = logits.softmax(-1).detach().numpy(), estimator.predict_proba(x)
        else:
            ours, theirs = found[k].detach().numpy(), estimator.predict(x)
        drawn = np.union1d(train, test)
        np.testing.assert_allclose(ours[drawn], theirs[drawn], atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_twins_predict_as_scikit_learn(case):
    model, name = CASES[case]
    x, y = data(name)
    splits = list((StratifiedKFold(3) if hasattr(model, "predict_proba") else KFold(3)).split(x, y))
    assert_is_the_model(*cross_validation(model, name), model, name, splits)


@pytest.mark.parametrize("case", CASES)
def test_twins_weigh_examples_as_scikit_learn(case):
    """Some count for nothing, others are drawn several times."""
    model, name = CASES[case]
    x, _ = data(name)
    random = np.random.default_rng(0)
    weight = random.choice([0.0, 0.5, 1.0, 3.0], len(x))
    splits = [(random.choice(len(x), len(x)), random.permutation(len(x))[:20]) for _ in range(2)]
    assert_is_the_model(*cross_validation(model, name, weight, splits), model, name, splits, weight)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 0.2}])
@pytest.mark.parametrize(("case", "name"), [("logistic", "two classes"), ("softmax", "three classes")])
def test_twins_weigh_classes_as_scikit_learn(case, name, class_weight):
    x, y = data(name)
    splits = list(StratifiedKFold(3).split(x, y))
    weight = np.random.default_rng(0).uniform(0.5, 2, len(x))
    plain, penalties = clone(CASES[case][0]).set_params(class_weight=class_weight), np.geomspace(0.1, 10, x.shape[1])
    vector = FeatureLogistic(penalties, tol=1e-10, max_iter=10_000, class_weight=class_weight)
    for model in (plain, vector):
        assert_is_the_model(*cross_validation(model, name, weight), model, name, splits, weight)


@pytest.mark.parametrize("case", CASES)
def test_hypergradients_are_finite_differences(case):
    model, name = CASES[case]
    weight = np.random.default_rng(2).uniform(0.5, 2, len(data(name)[0]))
    search, start = cross_validation(model, name, weight)
    start = start + 0.1 * np.random.default_rng(1).normal(size=start.shape) if len(start) < 20 else start
    low, high = search.space.bounds()
    start = np.clip(start, low + 0.01, high - 0.01)
    _, gradient = search(start)
    random = np.random.default_rng(0)
    directions = np.eye(len(start)) if len(start) <= 3 else random.normal(size=(3, len(start))) / np.sqrt(len(start))
    for direction in directions:
        ahead, behind = (search(start + step * direction)[0] for step in (1e-5, -1e-5))
        assert gradient @ direction == pytest.approx((ahead - behind) / 2e-5, rel=1e-4, abs=1e-7)


def test_large_softmax_regressions_go_to_lbfgs(monkeypatch):
    exact = cross_validation(LogisticRegression(C=0.7), "three classes")
    monkeypatch.setattr(logistic, "MOST_UNKNOWNS", 0)
    large = cross_validation(LogisticRegression(C=0.7), "three classes")
    (loss, gradient), (other, others) = (search(start) for search, start in (exact, large))
    assert other == pytest.approx(loss, rel=1e-8)
    assert others == pytest.approx(gradient, rel=1e-6)


def test_support_vectors_that_are_all_at_their_bounds():
    """The intercept is then the middle of an interval, whose ends depend on the hyperparameters: 46 % were lost."""
    model, name = SVR(C=0.005, epsilon=0.2, gamma=0.05, tol=1e-9), "regression"
    search, start = cross_validation(model, name)
    x, y = data(name)
    for train, _ in KFold(3).split(x):
        held = clone(model).fit(StandardScaler().fit_transform(x[train]), y[train])
        assert (np.abs(held.dual_coef_) > 0.005 * (1 - 1e-9)).all()
    assert_is_the_model(search, start, model, name, list(KFold(3).split(x)))
    _, gradient = search(start)
    for direction in np.eye(3):
        ahead, behind = (search(start + step * direction)[0] for step in (1e-6, -1e-6))
        assert gradient @ direction == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)
