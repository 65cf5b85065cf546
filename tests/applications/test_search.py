"""`BilevelSearchCV`: scikit-learn's contract, its models' twins, their hypergradients, and the comparison."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, make_friedman1, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from sklearn.utils.estimator_checks import parametrize_with_checks

from applications.frame.command import main
from applications.frame.data import Examples
from applications.search import BilevelSearchCV, FeatureKernelRidge, FeatureLogistic, FeatureRidge, comparison, logistic
from applications.search.__main__ import Config, story
from applications.search.comparison import Comparison
from applications.search.contests import of_file
from applications.search.estimator import CrossValidation
from applications.search.folds import make_folds, take_apart
from applications.search.methods import METHODS
from applications.search.models import hyperparameters, searchable
from applications.search.one_by_one import one_by_one
from applications.search.space import make_space
from applications.search.tuning import Watched, tunable


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


def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "regression":
        x, y = load_diabetes(return_X_y=True)
        return x[:90], y[:90] / 50
    if name == "wide":
        return make_regression(40, 60, n_informative=5, noise=3.0, random_state=0)
    x, y = load_iris(return_X_y=True) if name == "three classes" else load_breast_cancer(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(x))[:120]
    return x[chosen][:, :8], y[chosen]


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


def cross_validation(model, name: str, searched: tuple[str, ...] | None = None) -> tuple[CrossValidation, np.ndarray]:
    """The search of all hyperparameters of a model that is behind a scaler, and where the model itself stands."""
    x, y = data(name)
    estimator = make_pipeline(StandardScaler(), model)
    num_classes = len(np.unique(y)) if hasattr(model, "predict_proba") else 0
    splits = list(StratifiedKFold(3).split(x, y) if num_classes else KFold(3).split(x))
    before, model, _ = take_apart(estimator)
    folds, entry = make_folds(before, x, y, splits, num_classes), searchable(model)
    names = {
        k for k in entry.kinds if not (isinstance(model, KernelRidge) and model.kernel == "linear" and k == "gamma")
    }
    bounds = {name: (1e-4, 1.0 if entry.kinds[name] == "share" else 1e4) for name in names}
    values = hyperparameters(model, entry.kinds, folds)
    if getattr(model, "gamma", None) == "scale":
        del bounds["gamma"]
    space = make_space(bounds, entry.known(folds.num_features), "")
    constants = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items() if k not in bounds}
    twin = entry.twin(folds, model.get_params(deep=False))
    return CrossValidation(folds, space, twin, constants), space.start(values)


@pytest.mark.parametrize("case", CASES)
def test_twins_predict_as_scikit_learn(case):
    model, name = CASES[case]
    search, start = cross_validation(model, name)
    x, y = data(name)
    hypers = {**search.constants, **search.space.tensors(torch.from_numpy(start))}
    found = search.predict(hypers)
    estimator = make_pipeline(StandardScaler(), clone(model))
    for k, train in enumerate(search.folds.train.numpy()):
        estimator.fit(x[train], y[train])
        if search.folds.num_classes:
            logits = found[k]
            logits = torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
            ours, theirs = logits.softmax(-1).detach().numpy(), estimator.predict_proba(x)
        else:
            ours, theirs = found[k].detach().numpy(), estimator.predict(x)
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_hypergradients_are_finite_differences(case):
    model, name = CASES[case]
    search, start = cross_validation(model, name)
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
    assert other == pytest.approx(loss, rel=1e-5)
    assert others == pytest.approx(gradient, rel=1e-3)


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
    assert {name for name in theirs if name.endswith("_")} - {"multimetric_"} <= set(ours)
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


def test_a_loop_that_calls_can_be_asked():
    seen = []

    def count(give):
        try:
            for number in range(4):
                seen.append(number)
                give(number)
        finally:
            seen.append("ended")

    assert list(one_by_one(count)) == [0, 1, 2, 3]
    seen.clear()
    asked = one_by_one(count)
    assert [next(asked), next(asked), seen] == [0, 1, [0, 1]]  # it waits
    asked.close()
    assert seen == [0, 1, "ended"]

    def fail(give):
        give(0)
        raise ValueError("bad")

    asked = one_by_one(fail)
    next(asked)
    with pytest.raises(ValueError, match="bad"):
        next(asked)


def test_a_search_evaluation_by_evaluation_is_the_whole_search():
    x, y = data("regression")
    arguments = (KernelRidge(kernel="rbf", gamma=90.0), {"alpha": (1e-4, 1e2), "gamma": (1e-4, 1e2)})
    whole = BilevelSearchCV(*arguments, n_starts=2, random_state=0).fit(x, y)
    watched = Watched(*arguments, n_starts=2, random_state=0)
    assert list(watched.losses(x, y)) == whole.cv_results_["mean_test_loss"].tolist()
    assert watched.best_score_ == whole.best_score_
    begun = Watched(*arguments).losses(x, y)
    assert next(begun) == whole.cv_results_["mean_test_loss"][0]
    begun.close()


def test_a_tuned_search_is_the_comparison_s(tmp_path):
    """By default the study's first trial reaches the loss that the comparison tells, in as many evaluations."""
    x, y = make_regression(60, 5, noise=5.0, random_state=0)
    np.savez(tmp_path / "own.npz", features=x, targets=y)
    study = tunable(Config(data=str(tmp_path / "own.npz"), task="regression"))
    records = list(study.train(study.settings(study.default), 3))
    plan = Comparison(of_file(Examples("own", x, y, 0)), 1, 3, seed=3)
    (told,) = [r for r in plan.records() if r["method"] == "hypergradient" and "feature" in r["contest"]]
    assert [step for step, _, _ in records] == list(range(1, told["candidates"] + 1))
    assert records[-1][1] == told["cv_loss"] < records[0][1]
    short = list(study.train({"tol": 1e-4, "max_iter": 1, "n_starts": 1}, 3))
    assert 1 < len(short) < len(records)


def test_bad_settings_end_with_2(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"tol": -1.0}')
    settings = ("--data", "diabetes", "--task", "regression", "--solver", str(tmp_path / "bad.json"))
    assert search_command(*settings, "--out", str(tmp_path / "run")) == 2
    assert "tol is -1.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_groups_and_no_refit():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)}, cv=GroupKFold(3), refit=False)
    search.fit(x, y, groups=np.arange(len(x)) % 6)
    assert search.n_splits_ == 3
    with pytest.raises(AttributeError, match="refit=False"):
        search.predict(x)


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
]


@pytest.mark.parametrize(("estimator", "space", "error", "message"), BAD)
def test_what_cannot_be_searched_is_told(estimator, space, error, message):
    x, y = data("regression")
    with pytest.raises(error, match=message):
        BilevelSearchCV(estimator, space).fit(x, y)


def test_bad_data_is_told():
    x, y = data("regression")
    search = BilevelSearchCV(Ridge(), {"alpha": (1e-2, 1e2)})
    holes = x.copy()
    holes[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        search.fit(holes, y)
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        search.fit(scipy.sparse.csr_array(x), y)
    with pytest.raises(ValueError, match="one class"):
        BilevelSearchCV(LogisticRegression(), {"C": (1, 2)}).fit(x, np.zeros(len(x), int))
    with pytest.raises(ValueError, match="max_iter"):
        search.set_params(max_iter=0).fit(x, y)


def test_the_comparison_resumes_where_it_stood(tmp_path, monkeypatch):
    """Only the seconds differ."""
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("untuned", "hypergradient")})
    x, y = make_regression(60, 5, noise=5.0, random_state=0)
    contests = of_file(Examples("drawn", x, y, 0))

    def plain(records):
        return [{k: v for k, v in r.items() if k not in ("search_seconds", "curve")} for r in records]

    whole = plain(Comparison(contests, 2, 3, seed=0).records())
    assert len(whole) == 2 * 2 * 2
    first = Comparison(contests, 2, 3, seed=0)
    begun = first.records()
    halves = plain([next(begun) for _ in range(3)])
    second = Comparison(contests, 2, 3, seed=0)
    second.restore(first.state())
    assert halves + plain(second.records()) == whole


def search_command(*arguments: str) -> int:
    return main("search", list(arguments), Config, story, tunable)


def test_a_file_of_the_user_is_searched(tmp_path, capsys):
    x, y = make_regression(50, 4, noise=5.0, random_state=0)
    np.savez(tmp_path / "own.npz", features=x, targets=y)
    settings = ("--data", str(tmp_path / "own.npz"), "--task", "regression", "--candidates", "3")
    assert search_command(*settings, "--out", str(tmp_path / "run")) == 0
    tables = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    assert {row["hyperparameters"] for row in tables["All methods"]} == {1, 4}
    shown = capsys.readouterr().out
    assert search_command("--resume", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("wrong", ["nan", "range", "empty", "halves", "shapes", "sparse", "damaged", "missing"])
def test_bad_files_end_with_2_and_write_nothing(wrong, bad_files, tmp_path, capsys):
    assert search_command("--data", str(bad_files[wrong]), "--out", str(tmp_path / "run")) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_knobs_end_with_2(tmp_path, capsys):
    for knob in ("--repeats", "--candidates"):
        assert search_command(knob, "0", "--out", str(tmp_path / "run")) == 2
        assert f"{knob} is 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, _ = readme_run("search")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["contest"]: row for row in tables["Hypergradient beside the best of the others"]}
    assert len(rows) == 8
    for row in rows.values():  # what it minimises is as small as theirs, or smaller
        assert row["our CV loss"] < 1.01 * row["its CV loss"]
    for name in ("diabetes, ridge", "breast cancer, logistic", "digits, logistic"):
        assert rows[name]["our held-out"] < 1.05 * rows[name]["its held-out"]
    widths, wide = rows["friedman1, width a feature"], rows["1,000 features, penalty a feature"]
    assert widths["our held-out"] < 2.3
    assert widths["our held-out"] < 0.85 * widths["its held-out"]
    assert wide["hyperparameters"] == 1000
    assert wide["our held-out"] < 300 < 30_000 < wide["its held-out"]
