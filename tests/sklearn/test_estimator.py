"""`BilevelSearchCV`: scikit-learn's contract, and the places where `GridSearchCV` works."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, make_classification, make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.metrics import get_scorer, log_loss, mean_squared_error
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler, TargetEncoder
from sklearn.svm import SVR
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.sklearn import BilevelSearchCV, FeatureKernelRidge, FeatureLogistic, FeatureRidge
from tests.sklearn.data import data


@parametrize_with_checks(
    [
        BilevelSearchCV(Ridge(), {"alpha": (1e-3, 1e3)}, cv=3),
        BilevelSearchCV(LogisticRegression(), {"C": (1e-3, 1e3)}, cv=2),
        BilevelSearchCV(make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": (1e-3, 1e3)}, cv=3),
        FeatureRidge(),
        FeatureLogistic(),
        FeatureKernelRidge(),
    ]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_losses_are_those_of_scikit_learn():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=KFold(4)).fit(x, y)
    own = [
        mean_squared_error(y[test], Ridge(**search.best_params_).fit(x[train], y[train]).predict(x[test]))
        for train, test in KFold(4).split(x)
    ]
    best = [search.cv_results_[f"split{k}_test_score"][search.best_index_] for k in range(4)]
    np.testing.assert_allclose(best, np.negative(own), rtol=1e-9)
    assert search.best_score_ == pytest.approx(-np.mean(own))
    x, y = data("three classes")
    search = BilevelSearchCV(LogisticRegression(tol=1e-9, max_iter=10_000), {"C": (1e-2, 1e2)}, cv=3).fit(x, y)
    probabilities = cross_val_predict(
        LogisticRegression(**search.best_params_, tol=1e-9, max_iter=10_000), x, y, cv=3, method="predict_proba"
    )
    assert search.best_score_ == pytest.approx(-log_loss(y, probabilities), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "name", "parameter"),
    [(Ridge(), "regression", "alpha"), (LogisticRegression(max_iter=1000), "three classes", "C")],
)
def test_as_good_as_a_fine_grid(model, name, parameter):
    x, y = data(name)
    estimator = make_pipeline(StandardScaler(), model)
    key = f"{estimator.steps[-1][0]}__{parameter}"
    scoring = "neg_log_loss" if name == "three classes" else "neg_mean_squared_error"
    grid = GridSearchCV(estimator, {key: np.geomspace(1e-3, 1e3, 31)}, cv=5, scoring=scoring).fit(x, y)
    ours = BilevelSearchCV(estimator, {key: (1e-3, 1e3)}, cv=5).fit(x, y)
    assert ours.best_score_ >= grid.best_score_ - 1e-6 * abs(grid.best_score_)
    assert ours.best_params_[key] == pytest.approx(grid.best_params_[key], rel=0.6)  # neighbours are 58 % apart
    assert ours.n_evaluations_ < 20
    assert ours.hypergradient_norm_ < 1e-4


def test_finds_which_features_count():
    x, y = make_friedman1(150, 10, noise=0.5, random_state=0)
    search = BilevelSearchCV(FeatureKernelRidge(), {"alpha": (1e-5, 1e2), "gammas": (1e-4, 1e2)}).fit(x, y)
    gammas = search.best_params_["gammas"]
    assert gammas[:5].min() > 2 * gammas[5:].max()
    assert search.best_score_ > search.cv_results_["mean_test_score"][0] / 5
    assert search.path_.shape == (search.n_evaluations_, 11)


def test_attributes_are_those_of_a_grid_search():
    x, y = data("two classes")
    space = {"logisticregression__C": (1e-3, 1e3)}
    estimator = make_pipeline(StandardScaler(), LogisticRegression())
    search = BilevelSearchCV(estimator, space, cv=3, return_train_score=True).fit(x, y)
    grid = GridSearchCV(estimator, {"logisticregression__C": [0.1, 1]}, cv=3, return_train_score=True).fit(x, y)
    assert set(grid.cv_results_) <= set(search.cv_results_)
    ours, theirs = vars(search), vars(grid)
    assert {name for name in theirs if name.endswith("_")} <= set(ours)
    assert len(search.cv_results_["params"]) == search.n_evaluations_ == len(search.path_)
    assert search.cv_results_["rank_test_score"][search.best_index_] == 1
    assert search.score(x, y) == search.best_estimator_.score(x, y) > 0.9
    assert search.predict_proba(x).shape == (len(x), 2)
    assert not hasattr(BilevelSearchCV(Ridge(), {}), "predict_proba")
    copy = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(copy.predict(x), search.predict(x))
    assert clone(search).get_params()["param_space"] == space
    assert search.set_params(estimator__logisticregression__max_iter=7).estimator[-1].max_iter == 7


def test_scoring_chooses_on_the_path():
    x, y = data("two classes")
    search = BilevelSearchCV(LogisticRegression(max_iter=5000), {"C": (1e-4, 1e2)}, cv=3, scoring="roc_auc").fit(x, y)
    results = search.cv_results_
    assert search.best_index_ == np.argmax(results["mean_test_score"])
    assert search.best_score_ == results["mean_test_score"].max() > 0.9
    assert not np.allclose(results["mean_test_score"], -results["mean_test_loss"])


def test_more_starts_are_never_worse():
    x, y = data("regression")
    space = {"alpha": (1e-4, 1e2), "gamma": (1e-4, 1e2)}
    one = BilevelSearchCV(KernelRidge(kernel="rbf", gamma=90.0), space).fit(x, y)
    more = BilevelSearchCV(KernelRidge(kernel="rbf", gamma=90.0), space, n_starts=4, random_state=0).fit(x, y)
    assert more.best_score_ >= one.best_score_
    again = BilevelSearchCV(KernelRidge(kernel="rbf", gamma=90.0), space, n_starts=4, random_state=0).fit(x, y)
    np.testing.assert_array_equal(more.path_, again.path_)


def test_groups_and_no_refit():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=GroupKFold(3), refit=False)
    search.fit(x, y, groups=np.arange(len(x)) % 6)
    assert search.n_splits_ == 3
    assert not hasattr(search, "predict")
    with pytest.raises(AttributeError) as told:
        search.predict(x)
    assert "refit=False" in str(told.value.__cause__)  # as GridSearchCV tells it


def test_max_iter_is_told():
    x, y = data("regression")
    search = BilevelSearchCV(FeatureRidge(), {"alphas": (1e-3, 1e3)}, max_iter=1)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        search.fit(x, y)


BAD = [
    (Ridge(), {"beta": (1, 2)}, ValueError, "beta.*There are: alpha"),
    (Ridge(), {}, ValueError, "param_space is"),
    (Ridge(), {"alpha": (0, 1)}, ValueError, "0 < low < high"),
    (Ridge(), {"alpha": (2, 1)}, ValueError, "0 < low < high"),
    (Ridge(), {"alpha": 3}, ValueError, "bounds"),
    (ElasticNet(), {"l1_ratio": (0.1, 2)}, ValueError, "<= 1"),
    (make_pipeline(StandardScaler(), Ridge()), {"alpha": (1, 2)}, ValueError, "ridge__alpha"),
    (Ridge(positive=True), {"alpha": (1, 2)}, ValueError, "positive=True"),
    (KernelRidge(kernel="poly"), {"alpha": (1, 2)}, ValueError, "poly"),
    (StandardScaler(), {"alpha": (1, 2)}, TypeError, "StandardScaler has no hypergradients"),
    (None, {"alpha": (1, 2)}, ValueError, "estimator"),
    (Ridge, {"alpha": (1, 2)}, TypeError, "instead of a class"),
    (Pipeline([]), {"ridge__alpha": (1, 2)}, ValueError, "pipeline is empty"),
    (make_pipeline(Ridge(), Ridge()), {"ridge-2__alpha": (1, 2)}, TypeError, "transformers"),
    (Ridge(solver="other"), {"alpha": (1, 2)}, ValueError, "'solver' parameter of Ridge"),
    (SVR(gamma="other"), {"C": (1, 2)}, ValueError, "'gamma' parameter of SVR"),
    (KernelRidge(kernel="rbf", alpha=-1), {"gamma": (1, 2)}, ValueError, "'alpha' parameter of KernelRidge"),
    (FeatureKernelRidge(alpha=-1), {"gammas": (1, 2)}, ValueError, "'alpha' parameter of FeatureKernelRidge"),
    (FeatureKernelRidge(gammas=[1, 2]), {"alpha": (1, 2)}, ValueError, "gammas must be .* 10 features"),
    (FeatureRidge(np.ones(3)), {"alphas": (1, 2)}, ValueError, "alphas must be .* 10 features"),
    (FeatureRidge("a"), {"alphas": (1, 2)}, ValueError, "alphas must be .* 10 features"),
    (KernelRidge(kernel="rbf", alpha=np.ones(10)), {"gamma": (1, 2)}, ValueError, "alpha one number"),
    (Ridge(alpha=[1.0, 2.0]), {"alpha": (1, 2)}, ValueError, "alpha one number"),
]


@pytest.mark.parametrize(("estimator", "space", "error", "message"), BAD)
def test_what_cannot_be_searched_is_told(estimator, space, error, message):
    x, y = data("regression")
    with pytest.raises(error, match=message):
        BilevelSearchCV(estimator, space, refit=False).fit(x, y)


@pytest.mark.parametrize(
    "setting",
    [{"error_score": "other"}, {"pre_dispatch": [1]}, {"return_train_score": "yes"}, {"refit": 3}, {"n_jobs": "many"}],
    ids=str,
)
def test_settings_of_a_grid_search_are_checked_as_there(setting):
    x, y = data("regression")
    with pytest.raises(ValueError, match=f"'{next(iter(setting))}' parameter of BilevelSearchCV"):
        BilevelSearchCV(Ridge(), {"alpha": (1, 2)}, **setting).fit(x, y)


def test_labels_of_several_types_are_told():
    x, y = data("two classes")
    labels = np.array(["b" if label else 1 for label in y], object)
    with pytest.raises(TypeError, match=r"types without a common order \(int, str\)"):
        BilevelSearchCV(LogisticRegression(), {"C": (1, 2)}).fit(x, labels)


def test_bad_data_is_told():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)})
    holes = x.copy()
    holes[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        search.fit(holes, y)
    with pytest.raises(ValueError, match="one class"):
        BilevelSearchCV(LogisticRegression(), {"C": (1, 2)}).fit(x, np.zeros(len(x), int))
    with pytest.raises(ValueError, match="max_iter"):
        search.set_params(max_iter=0).fit(x, y)


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array])
@pytest.mark.parametrize(
    ("estimator", "task", "space"),
    [
        (Ridge(), "regression", {"alpha": (1e-3, 1e3)}),
        (Lasso(), "regression", {"alpha": (1e-3, 1e1)}),
        (KernelRidge(kernel="rbf"), "regression", {"alpha": (1e-3, 1e3), "gamma": (1e-3, 1.0)}),
        (LogisticRegression(), "classification", {"C": (1e-3, 1e3)}),
    ],
    ids=["ridge", "lasso", "kernel ridge", "logistic"],
)
def test_sparse_features_are_those_of_their_dense_copy(form, estimator, task, space):
    x, y = data(task)
    x = np.where(np.abs(x) < 0.5, 0.0, x)
    sparse, dense = (BilevelSearchCV(clone(estimator), space).fit(features, y) for features in (form(x), x))
    assert sparse.best_params_ == pytest.approx(dense.best_params_)
    np.testing.assert_allclose(sparse.predict(form(x).tocsr()), dense.predict(x), rtol=1e-3, atol=1e-3)


ALPHAS = {"alpha": (1e-3, 1e3)}


def frame() -> tuple[pd.DataFrame, pd.Series]:
    """Diabetes, with the sex in words."""
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    return x.assign(sex=np.where(x["sex"] > 0, "f", "m")), y


def of_columns(*transformers, **rest):
    return make_pipeline(make_column_transformer(*transformers, **rest), Ridge())


@pytest.mark.parametrize(
    "pipeline",
    [
        of_columns((StandardScaler(), ["age", "bmi", "bp"])),
        of_columns((OneHotEncoder(), ["sex"]), remainder=StandardScaler()),
        make_pipeline(OneHotEncoder(handle_unknown="ignore"), Ridge()),  # sparse, another number in each fold
        of_columns((TargetEncoder(target_type="continuous", random_state=0), ["sex"]), remainder=StandardScaler()),
    ],
    ids=["by name", "strings", "sparse", "encoded by the targets"],
)
@pytest.mark.filterwarnings("ignore:`TargetEncoder:FutureWarning")
def test_columns_are_the_pipelines_business(pipeline):
    x, y = frame()
    search = BilevelSearchCV(pipeline, {"ridge__alpha": (1e-3, 1e3)}).fit(x, y)
    values = [search.best_params_["ridge__alpha"], *np.logspace(-3, 3, 25)]
    grid = GridSearchCV(pipeline, {"ridge__alpha": values}, scoring="neg_mean_squared_error").fit(x, y)
    assert search.best_score_ == pytest.approx(
        grid.cv_results_["mean_test_score"][0], rel=1e-5
    )  # of sparse ones inexact
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-5)
    np.testing.assert_array_equal(
        search.predict(x), clone(pipeline).set_params(**search.best_params_).fit(x, y).predict(x)
    )
    assert search.feature_names_in_.tolist() == list(x.columns)
    assert search.n_features_in_ == 10


def test_missing_values_before_an_imputer():
    x, y = load_diabetes(return_X_y=True)
    x[::7, 3] = np.nan
    search = BilevelSearchCV(make_pipeline(SimpleImputer(), Ridge()), {"ridge__alpha": (1e-3, 1e3)}).fit(x, y)
    own = make_pipeline(SimpleImputer(), Ridge(**{"alpha": search.best_params_["ridge__alpha"]}))
    scored = GridSearchCV(own, {}, scoring="neg_mean_squared_error").fit(x, y)
    assert search.best_score_ == pytest.approx(scored.best_score_, rel=1e-9)
    with pytest.raises(ValueError, match="NaN"):
        BilevelSearchCV(make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": (1e-3, 1e3)}).fit(x, y)


@pytest.mark.parametrize("scoring", [None, "neg_mean_squared_error"])
def test_sample_weights_reach_the_fits_and_the_losses(scoring):
    x, y = load_diabetes(return_X_y=True)
    w = np.where(np.arange(len(y)) % 2 == 0, 3.0, 1.0)
    search = BilevelSearchCV(Ridge(), ALPHAS, cv=KFold(4), scoring=scoring).fit(x, y, sample_weight=w)
    own = {"alpha": [search.best_params_["alpha"]]}
    grid = GridSearchCV(Ridge(), own, cv=KFold(4), scoring="neg_mean_squared_error").fit(x, y, sample_weight=w)
    np.testing.assert_array_equal(search.best_estimator_.coef_, grid.best_estimator_.coef_)
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-9)
    assert search.best_params_ != BilevelSearchCV(Ridge(), ALPHAS, cv=KFold(4)).fit(x, y).best_params_


@pytest.mark.parametrize("name", ["weights", "weights of a step", "weights of classes"])
def test_train_scores_know_the_weights_that_those_of_a_grid_know(name):
    x, y = data("two classes" if name == "weights of classes" else "regression")
    w = np.random.default_rng(0).uniform(0.1, 3, len(y))
    estimator, key, params, scoring = {
        "weights": (Ridge(), "alpha", {"sample_weight": w}, "neg_mean_squared_error"),
        "weights of a step": (
            make_pipeline(StandardScaler(), Ridge()),
            "ridge__alpha",
            {"ridge__sample_weight": w},
            "neg_mean_squared_error",
        ),
        "weights of classes": (
            make_pipeline(StandardScaler(), LogisticRegression(class_weight={0: 5, 1: 0.5}, tol=1e-9, max_iter=10_000)),
            "logisticregression__C",
            {},
            "neg_log_loss",
        ),
    }[name]
    search = BilevelSearchCV(estimator, {key: (1e-3, 1e3)}, cv=3, return_train_score=True).fit(x, y, **params)
    place = {key: [search.best_params_[key]]}
    grid = GridSearchCV(estimator, place, cv=3, scoring=scoring, return_train_score=True).fit(x, y, **params)
    for part in ("train", "test"):
        column = f"mean_{part}_score"
        assert search.cv_results_[column][search.best_index_] == pytest.approx(grid.cv_results_[column][0], rel=1e-6)


def test_fit_parameters_of_a_pipeline():
    x, y = data("two classes")
    w = np.random.default_rng(0).uniform(0.1, 3, len(y))
    pipeline, key = (
        make_pipeline(StandardScaler(), LogisticRegression(tol=1e-9, max_iter=10_000)),
        "logisticregression__C",
    )
    params = {"standardscaler__sample_weight": w, "logisticregression__sample_weight": pd.Series(w)}
    search = BilevelSearchCV(pipeline, {key: (1e-3, 1e3)}, cv=3).fit(x, y, **params)
    own = {key: [search.best_params_[key]]}
    grid = GridSearchCV(pipeline, own, cv=3, scoring="neg_log_loss").fit(x, y, **params)
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-6)
    np.testing.assert_array_equal(search.predict_proba(x), grid.predict_proba(x))
    for wrong in ("sample_weight", "ridge__sample_weight"):
        with pytest.raises(ValueError, match=wrong):
            search.fit(x, y, **{wrong: w})
    with pytest.raises(TypeError, match="offsets"):
        search.fit(x, y, logisticregression__offsets=w)


def test_metadata_routing():
    x, y = data("regression")
    w = np.random.default_rng(0).uniform(0.1, 3, len(y))
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        model = Ridge().set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        pipeline = make_pipeline(scaler, model).set_score_request(sample_weight=False)
        routed = BilevelSearchCV(pipeline, {"ridge__alpha": (1e-3, 1e3)}, cv=3)
        routed.fit(x, y, sample_weight=w)
    plain = BilevelSearchCV(make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": (1e-3, 1e3)}, cv=3)
    plain.fit(x, y, standardscaler__sample_weight=w, ridge__sample_weight=w)
    assert routed.best_params_ == plain.best_params_
    assert routed.best_score_ == plain.best_score_


def test_metadata_under_other_names():
    pytest.importorskip("sklearn", minversion="1.9")  # before, some versions do not route them to a score at all
    x, y = data("regression")
    w = np.random.default_rng(0).uniform(0.1, 3, len(y))
    given = {"scaled": w, "fitted": w**2, "scored": w**0.5}
    with sklearn.config_context(enable_metadata_routing=True):
        model = Ridge().set_fit_request(sample_weight="fitted").set_score_request(sample_weight="scored")
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight="scaled"), model)
        search = BilevelSearchCV(pipeline, {"ridge__alpha": (1e-3, 1e3)}, cv=3).fit(x, y, **given)
        scorer = get_scorer("neg_mean_squared_error").set_score_request(sample_weight="scored")
        place = {"ridge__alpha": [search.best_params_["ridge__alpha"]]}
        grid = GridSearchCV(pipeline, place, cv=3, scoring=scorer).fit(x, y, **given)
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-9)


def test_arrays_of_pytorch(monkeypatch):
    pytest.importorskip("sklearn", minversion="1.9")  # before, that needs another package
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    x, y = data("regression")
    plain = BilevelSearchCV(Ridge(solver="svd"), ALPHAS, cv=3).fit(x, y, sample_weight=np.ones(len(y)))
    with sklearn.config_context(array_api_dispatch=True):
        search = clone(plain).fit(*map(torch.from_numpy, (x, y)), sample_weight=torch.ones(len(y)))
        assert isinstance(search.predict(torch.from_numpy(x)), torch.Tensor)
    np.testing.assert_array_equal(search.path_, plain.path_)


class Seeded(KFold):
    """Its splits are of a seed that `fit` is given."""

    def split(self, X, y=None, groups=None, seed=None):
        return KFold(self.n_splits, shuffle=True, random_state=seed).split(X, y)


@pytest.mark.parametrize("scoring", [None, "neg_mean_squared_error"])
def test_metadata_of_the_splitter(scoring):
    x, y = data("regression")
    with sklearn.config_context(enable_metadata_routing=True):
        seeded = BilevelSearchCV(Ridge(), ALPHAS, cv=Seeded(3).set_split_request(seed=True), scoring=scoring)
        seeded.fit(x, y, seed=5)
        grouped = BilevelSearchCV(Ridge(), ALPHAS, cv=GroupKFold(3), scoring=scoring)
        grouped.fit(x, y, groups=np.arange(len(x)) % 6)
    plain = BilevelSearchCV(Ridge(), ALPHAS, cv=KFold(3, shuffle=True, random_state=5), scoring=scoring).fit(x, y)
    assert seeded.best_score_ == plain.best_score_
    assert grouped.n_splits_ == 3


@pytest.mark.parametrize("wrong", [-1.0, np.nan], ids=["negative", "nan"])
def test_bad_weights_are_told(wrong):
    x, y = data("regression")
    with pytest.raises(ValueError, match="sample_weight"):
        BilevelSearchCV(Ridge(), ALPHAS).fit(x, y, sample_weight=np.full(len(y), wrong))
    with pytest.raises(ValueError, match="training part of fold 0"):
        BilevelSearchCV(Ridge(), ALPHAS, cv=KFold(3)).fit(x, y, sample_weight=np.arange(len(y)) < len(y) / 3)


@pytest.mark.parametrize(
    "view", [lambda a: a[::-1], np.asfortranarray, lambda a: a.astype(np.float32), np.ndarray.tolist]
)
def test_arrays_of_any_layout(view):
    x, y = load_diabetes(return_X_y=True)
    found = BilevelSearchCV(Ridge(), ALPHAS, cv=KFold(3, shuffle=True, random_state=0)).fit(view(x), view(y))
    assert found.best_params_["alpha"] == pytest.approx(0.04, rel=0.9)


def test_scores_that_are_nan_rank_last():
    x, y = load_breast_cancer(return_X_y=True)
    calls = []

    def scorer(estimator, x, y):
        calls.append(1)
        return np.nan if len(calls) <= 5 else estimator.score(x, y)

    search = BilevelSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": (1e-3, 1e3)}, scoring=scorer
    )
    with pytest.warns(UserWarning, match="non-finite"):
        search.fit(x, y)
    ranks = search.cv_results_["rank_test_score"]
    assert np.isfinite(search.best_score_)
    assert ranks[0] == len(ranks)
    assert search.best_index_ != 0


def test_several_scores():
    x, y = data("regression")
    scores = ["r2", "neg_mean_absolute_error"]
    with pytest.raises(ValueError, match="scoring"):
        BilevelSearchCV(Ridge(), ALPHAS, scoring=scores).fit(x, y)
    search = BilevelSearchCV(Ridge(), ALPHAS, scoring=scores, refit="r2").fit(x, y)
    assert search.multimetric_
    assert (
        search.best_score_
        == search.cv_results_["mean_test_r2"].max()
        == search.cv_results_["mean_test_r2"][search.best_index_]
    )
    assert not hasattr(BilevelSearchCV(Ridge(), ALPHAS, scoring=scores, refit=False).fit(x, y), "best_index_")


@pytest.mark.parametrize("scoring", [None, "r2"])
def test_a_function_that_chooses(scoring):
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), ALPHAS, scoring=scoring, refit=lambda results: 1).fit(x, y)
    assert search.best_index_ == 1
    assert search.best_estimator_.alpha == search.cv_results_["params"][1]["alpha"]


def test_liblinear_is_another_model():
    x, y = data("two classes")
    space = {"C": (1e-3, 1e3)}
    with pytest.raises(ValueError, match=r"liblinear.*intercept"):
        BilevelSearchCV(LogisticRegression(solver="liblinear"), space).fit(x, y)
    own = LogisticRegression(solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=10_000)
    search = BilevelSearchCV(own, space, cv=3).fit(x, y)
    grid = GridSearchCV(own, {"C": [search.best_params_["C"]]}, cv=3, scoring="neg_log_loss").fit(x, y)
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-5)


def test_a_fold_without_a_class_is_told():
    x, y = make_classification(60, 5, random_state=0)
    names = np.where(np.arange(60) < 58, np.where(y, "yes", "no"), "rare")
    with pytest.raises(ValueError, match=r"fold 4 has no example of class 'rare'"):
        BilevelSearchCV(LogisticRegression(), {"C": (1e-3, 1e2)}, cv=KFold(5)).fit(x, names)
    weight, cv = np.where(names == "rare", 0.0, 1.0), KFold(2, shuffle=True, random_state=0)
    with pytest.raises(ValueError, match="class 'rare'"):
        BilevelSearchCV(LogisticRegression(), {"C": (1e-3, 1e2)}, cv=cv).fit(x, names, sample_weight=weight)


def test_a_list_of_two_is_no_grid():
    x, y = data("regression")
    with pytest.warns(UserWarning, match=r"not a grid of two"):
        BilevelSearchCV(Ridge(), {"alpha": [0.1, 10.0]}).fit(x, y)
    with pytest.raises(ValueError, match="bounds"):
        BilevelSearchCV(Ridge(), {"alpha": [0.1, 1.0, 10.0]}).fit(x, y)


def test_jobs_and_words(capsys):
    x, y = data("regression")
    pipeline, space = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": (1e-3, 1e3)}
    one = BilevelSearchCV(pipeline, space, cv=3).fit(x, y)
    assert not capsys.readouterr().out
    two = BilevelSearchCV(pipeline, space, cv=3, n_jobs=2, verbose=2).fit(x, y)
    np.testing.assert_array_equal(one.path_, two.path_)
    lines = capsys.readouterr().out.splitlines()
    assert "3 folds" in lines[0]
    assert sum(line.startswith("[CV]") for line in lines) == two.n_evaluations_


def test_support_vectors_do_not_depend_on_the_units_of_y():
    """Libsvm's tolerance has those units: in small ones folds were left far from their minimum."""
    random = np.random.default_rng(0)
    X = random.standard_normal((60, 5))
    y = X @ random.standard_normal(5) + 0.5 * random.standard_normal(60)
    found = {}
    for unit in (1.0, 1e-4, 1e-6, 1e3):
        svr = SVR(C=unit, epsilon=unit / 10)
        search = BilevelSearchCV(svr, {"C": (unit / 100, unit * 1000)}, cv=3).fit(X, unit * y)
        found[unit] = search.best_params_["C"] / unit, -search.best_score_ / unit**2
    for c, loss in found.values():
        assert c == pytest.approx(found[1.0][0], rel=1e-2)
        assert loss == pytest.approx(found[1.0][1], rel=1e-3)
