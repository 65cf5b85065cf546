"""Penalties of the lasso family: criteria are scikit-learn's, hypergradients are differences and closed forms."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNetCV, LassoCV

import bilevel as bl
from applications.frame.command import main
from applications.frame.errors import UserError
from applications.frame.run import Run
from applications.frame.run_folder import RunFolder
from applications.sparse_regression import __main__ as application
from applications.sparse_regression import data, models
from applications.sparse_regression.compare import BLOCKS_PULLED, FEATURES, FEATURES_PULLED, GRID, LASSO, NET
from applications.sparse_regression.criterion import Criterion
from applications.sparse_regression.descent import Descent, run
from applications.sparse_regression.folds import Folds
from applications.sparse_regression.knobs import Config
from applications.sparse_regression.penalties import Penalty, coordinate_descent
from applications.sparse_regression.tuning import tunable
from tests.applications.refusals import refusals

FLOAT = torch.float64


@pytest.fixture(scope="module")
def design():
    """60 examples of 8 features, three of which count, with an intercept."""
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 8)) + 0.5 * random.normal(size=(60, 1)) + 1
    return features, features[:, :3] @ [1.0, -2.0, 0.5] + random.normal(size=60) + 3


@pytest.fixture(scope="module")
def folds(design):
    return Folds.make(*design, number=7, seed=0)  # of two sizes


def test_the_criterion_is_that_of_lasso_cv(design, folds):
    """Same folds, same penalties: the same cross-validation losses, fold by fold."""
    grid = LassoCV(alphas=[0.5, 0.1, 0.01], cv=folds.pairs, tol=1e-12, max_iter=100_000).fit(*design)
    criterion = Criterion(folds, Penalty(torch.zeros(8, dtype=torch.int64)))
    for alpha, losses in zip(grid.alphas_, grid.mse_path_, strict=True):
        found = criterion(torch.tensor([math.log(alpha)], dtype=FLOAT))
        assert found.criterion == pytest.approx(losses.mean(), rel=1e-7)
        np.testing.assert_allclose(folds.validation_losses(found.coefficients).numpy(), losses, rtol=1e-6)


def test_the_criterion_is_that_of_elastic_net_cv(design, folds):
    grid = ElasticNetCV(alphas=[0.2], l1_ratio=0.7, cv=folds.pairs, tol=1e-12, max_iter=100_000).fit(*design)
    criterion = Criterion(folds, Penalty(torch.zeros(8, dtype=torch.int64), ridge=True))
    found = criterion(torch.tensor([0.2 * 0.7, 0.2 * 0.3], dtype=FLOAT).log())
    assert found.criterion == pytest.approx(grid.mse_path_.mean(), rel=1e-7)


def test_one_split_and_no_intercept(design):
    held_out = Folds.make(*design, number=1, seed=3, intercept=False)
    ((train, validation),) = held_out.pairs
    assert sorted([*train, *validation]) == list(range(60))
    assert len(validation) == 20
    grid = LassoCV(alphas=[0.1], cv=held_out.pairs, fit_intercept=False, tol=1e-12).fit(*design)
    found = Criterion(held_out, Penalty(torch.zeros(8, dtype=torch.int64)))(torch.tensor([math.log(0.1)], dtype=FLOAT))
    assert found.criterion == pytest.approx(grid.mse_path_.mean(), rel=1e-7)


def test_a_rougher_hypergradient_leaves_the_criterion_as_it_is(folds):
    x = torch.linspace(-3, -1, 8, dtype=FLOAT)
    exact, rough = (
        Criterion(folds, Penalty(torch.arange(8)), **settings)(x)
        for settings in ({}, {"hypergrad": bl.Implicit(bl.CG(rtol=0.5))})
    )
    assert rough.criterion == exact.criterion
    assert not torch.equal(rough.gradient, exact.gradient)
    assert torch.cosine_similarity(rough.gradient, exact.gradient, 0) > 0.5


def test_tune_makes_evaluations_of_every_data_set_side_by_side():
    knobs = Config(evaluations=3, noise_features=5)
    tuned = tunable(knobs)
    records = [(step, score()) for step, score, _ in tuned.train(tuned.settings(tuned.default), 0)]
    assert [step for step, _ in records] == [1, 2, 3]
    scores = [score for _, score in records]
    assert 0 < scores[2] < scores[1] < scores[0] < 1


def test_from_the_largest_penalty_on_nothing_is_selected(folds):
    criterion = Criterion(folds, Penalty(torch.zeros(8, dtype=torch.int64)))
    largest = folds.largest_penalty()
    for factor, empty in ((1.001, True), (0.999, False)):
        found = criterion(torch.tensor([math.log(factor * largest)], dtype=FLOAT))
        assert (found.support == 0) == empty
    above = criterion(torch.tensor([math.log(2 * largest)], dtype=FLOAT))
    assert above.criterion == pytest.approx(criterion.without_features())
    assert above.gradient.item() == 0


PENALTIES = {
    "lasso": (Penalty(torch.zeros(8, dtype=torch.int64)), [-2.0], 0.0),
    "elastic net": (Penalty(torch.zeros(8, dtype=torch.int64), ridge=True), [-2.0, -1.0], 0.0),
    "blocks": (Penalty(torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])), [-2.0, -1.5, -1.0], 0.1),
    "features": (Penalty(torch.arange(8)), [-3.0, -2.0, -1.0, -1.2, -0.9, -1.5, -1.0, -2.0], 0.3),
}


@pytest.mark.parametrize("kind", PENALTIES)
def test_hypergradients_are_finite_differences(folds, kind):
    penalty, values, pull = PENALTIES[kind]
    criterion, x = Criterion(folds, penalty, pull), torch.tensor(values, dtype=FLOAT)
    found, step = criterion(x), 1e-5
    assert penalty.size == len(x)
    assert 0 < found.support < 8
    differences = [
        (criterion(x + step * unit).objective - criterion(x - step * unit).objective) / (2 * step)
        for unit in torch.eye(len(x), dtype=FLOAT)
    ]
    torch.testing.assert_close(found.gradient, torch.tensor(differences, dtype=FLOAT), rtol=1e-5, atol=1e-8)


def test_the_hypergradient_of_an_orthogonal_design():
    """With ``X'X = n I`` the lasso is ``b_j = S(c_j, l_j)``, ``c = X'y / n``, for any penalties l."""
    random = np.random.default_rng(1)
    train = np.linalg.qr(random.normal(size=(20, 6)))[0] * math.sqrt(20)
    x, y = np.vstack([train, random.normal(size=(10, 6))]), random.normal(size=30)
    parts = torch.zeros(2, 1, 30, dtype=FLOAT)
    parts[0, 0, :20], parts[1, 0, 20:] = 1 / 20, 1 / 10
    zeros = torch.zeros(1, 6, dtype=FLOAT)
    orthogonal = Folds(torch.from_numpy(x), torch.from_numpy(y), parts[0], parts[1], zeros, zeros[:, 0])
    strengths, c = np.array([0.01, 0.1, 0.2, 0.02, 5.0, 0.05]), x[:20].T @ y[:20] / 20
    coefficients = np.sign(c) * np.maximum(np.abs(c) - strengths, 0)
    residuals = y[20:] - x[20:] @ coefficients
    truth = 2 / 10 * (x[20:].T @ residuals) * np.sign(coefficients) * strengths
    found = Criterion(orthogonal, Penalty(torch.arange(6)))(torch.from_numpy(strengths).log())
    assert 1 < (coefficients != 0).sum() < 6
    np.testing.assert_allclose(found.coefficients[0].numpy(), coefficients, atol=1e-9)
    np.testing.assert_allclose(found.gradient.numpy(), truth, rtol=1e-6, atol=1e-12)


def test_coordinate_descent_meets_the_conditions_of_optimality(design):
    """``|X'r / n| <= l1`` where a coefficient is zero, ``X'r / n = l1 sign(b)`` where not, for each feature's l1."""
    features, targets = design[0] - design[0].mean(0), design[1] - design[1].mean()
    l1 = np.array([0.3, 0.01, 2.0, 0.1, 1e-4, 0.5, 0.2, 10.0])
    found = coordinate_descent(features, targets, l1, 0.0)
    slopes = features.T @ (targets - features @ found) / 60
    assert (np.abs(slopes) <= l1 + 1e-6).all()
    np.testing.assert_allclose(slopes[found != 0], (l1 * np.sign(found))[found != 0], atol=1e-6)


def test_a_descent_is_not_above_the_grid_with_a_tenth_of_its_fits(design, folds):
    grid = LassoCV(alphas=100, cv=folds.pairs, tol=1e-8, max_iter=100_000).fit(*design)
    start = torch.tensor([math.log(folds.largest_penalty() / 10)], dtype=FLOAT)
    descent = run(Descent(Criterion(folds, Penalty(torch.zeros(8, dtype=torch.int64))), start, 30))
    assert descent.ended
    assert descent.step <= 10
    assert descent.at.criterion <= 1.0005 * grid.mse_path_.mean(1).min()


def test_a_pull_keeps_penalties_together(folds):
    def spread(pull):
        start = torch.full((8,), math.log(0.1), dtype=FLOAT)
        descent = run(Descent(Criterion(folds, Penalty(torch.arange(8)), pull), start, 15))
        assert descent.at.objective >= descent.at.criterion
        return (descent.point - descent.point.mean()).norm(), descent.at.criterion

    (free, low), (some, middle), (strong, high) = [spread(pull) for pull in (0.0, 0.03, 3.0)]
    assert free > 2 * some > 4 * strong
    assert low < middle < high


def test_diabetes_with_squares_and_products():
    """Efron, Hastie, Johnstone and Tibshirani (2004): 64 features, for sex has no square."""
    study = data.draw("diabetes", 0, 0.3, 5, 20)
    assert study.features.shape == (309, 69)
    assert study.block_names == ("measurements", "squares", "products", "noise")
    assert np.bincount(study.blocks).tolist() == [10, 9, 45, 5]
    assert study.noise.sum() == 5
    np.testing.assert_allclose(study.features.mean(0), 0, atol=1e-12)
    rank = np.linalg.matrix_rank(study.features)
    assert rank == 69


def test_synthetic_data_are_as_told():
    study = data.synthetic(3)
    assert study.features.shape == (200, 300)
    assert (~study.noise).sum() == 10
    assert len(set(study.blocks[~study.noise])) == 2
    assert 0.15 < models.least_squares_on_support(study)["test error"] < 0.3  # noise is a fifth of the variance


def test_the_published_example():
    """The losses of sparse-ho's page ``plot_lassoCV``: a grid of ten, and its ten gradient steps."""
    study = data.sparse_ho(0)
    folds = Folds.make(study.features, study.targets, 5, study.shuffle, study.intercept)
    grid = LassoCV(alphas=10, cv=folds.pairs, fit_intercept=False, tol=1e-8, max_iter=100_000)
    curve = grid.fit(study.features, study.targets).mse_path_.mean(1)
    assert curve.min() == pytest.approx(1938.13556, abs=1e-3)
    start = torch.tensor([math.log(folds.largest_penalty() / 10)], dtype=FLOAT)
    descent = run(Descent(Criterion(folds, Penalty(torch.zeros(1000, dtype=torch.int64))), start, 10))
    assert descent.at.criterion < 1937.83528


def sparse_regression(*arguments: str) -> int:
    return main("sparse_regression", list(arguments), application.Config, application.story)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "1 features are NaN"),
        ("shapes", r"targets \(59,\)"),
        ("sparse", "needs dense features"),
        ("damaged", "can't be used"),
        ("missing", "There is no file"),
    ],
)
def test_bad_files_end_with_2_and_leave_nothing(bad_files, tmp_path, capsys, name, message):
    folder = tmp_path / "run"
    assert sparse_regression("--data", str(bad_files[name]), "--out", str(folder)) == 2
    with pytest.raises(UserError, match=message):
        data.draw(str(bad_files[name]), 0, 0.3, 0, 20)
    assert "error: " in capsys.readouterr().err
    assert not folder.exists()


@refusals(
    *("--draws 0", "--folds 0", "--evaluations 1", "--noise-features -1", "--block-size 0"),
    (["--data", "boston"], "no data set 'boston' for regression"),
    (["--data", "diabetes", "diabetes"], "names one twice"),
    (["--test-size", "1"], "--test-size is 1.0"),
    (["--data", "diabetes", "--test-size", "0.97"], "at least 20 are needed"),
)
def test_bad_settings_end_with_2_and_leave_nothing(refused, arguments, message):
    assert message in refused(sparse_regression, *arguments)


def test_constant_targets_are_refused(tmp_path):
    np.savez(tmp_path / "flat.npz", features=np.random.default_rng(0).normal(size=(40, 3)), targets=np.ones(40))
    with pytest.raises(UserError, match="all targets are 1"):
        data.draw(str(tmp_path / "flat.npz"), 0, 0.3, 0, 20)


def test_a_file_of_the_user_with_one_split(tmp_path):
    """The whole story, small: no noise is appended, so no column tells of it; a third is held out."""
    random = np.random.default_rng(0)
    features = random.normal(size=(90, 12))
    np.savez(tmp_path / "mine.npz", features=features, targets=features[:, 0] + random.normal(size=90))
    settings = ["--noise-features", "0", "--folds", "1", "--draws", "1", "--evaluations", "6", "--block-size", "4"]
    assert sparse_regression("--data", str(tmp_path / "mine.npz"), *settings, "--out", str(tmp_path / "run")) == 0
    folder = RunFolder(tmp_path / "run")
    results = folder.read_json("results.json")
    (table,) = results["tables"].values()
    rows = {row["method"]: row for row in table}
    grid = next(part["value"] for name, part in results["parts"].items() if name.endswith(GRID))
    for record in folder.metrics():
        if record["part"].endswith(LASSO):  # on the curve of the grid, which may be lower elsewhere: minima are local
            on_grid = np.interp(record["largest"], grid["grid"][::-1], grid["curve"][::-1])
            assert record["criterion"] == pytest.approx(on_grid, rel=5e-3)
    assert rows[GRID]["fits"] == 100
    assert rows[LASSO]["fits"] <= 6
    assert {"F1", "noise selected"}.isdisjoint(rows[LASSO])
    assert len(list(folder.path.glob("*.png"))) == 3


def test_an_interrupted_descent_resumes_bit_for_bit(folds, tmp_path, monkeypatch, capsys):
    """Warm starts, rate and trial point come back: a penalty for each feature, stopped at its third evaluation."""

    def story(knobs, run):
        start = torch.full((8,), math.log(folds.largest_penalty() / 10), dtype=FLOAT)
        descent = Descent(Criterion(folds, Penalty(torch.arange(8)), 0.01), start, 9)
        run.train("descent", descent)
        run.part("end", lambda: {"point": descent.point.tolist(), "evaluations": len(descent.path)})

    def start(*arguments: str) -> int:
        return main("sparse_regression", list(arguments), application.Config, story)

    assert start("--out", str(tmp_path / "whole")) == 0
    records = Descent.rows

    def interrupted(self):
        for record in records(self):
            if record["step"] == 3:
                signal.raise_signal(signal.SIGTERM)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "rows", interrupted)
        assert start("--out", str(tmp_path / "halves")) == 128 + signal.SIGTERM
    assert start("--resume", str(tmp_path / "halves")) == 0
    capsys.readouterr()
    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    assert [{**r, "seconds": 0} for r in halves.metrics()] == [{**r, "seconds": 0} for r in whole.metrics()]
    ends = [folder.read_json("results.json")["parts"]["end"]["value"] for folder in (whole, halves)]
    assert ends[0] == ends[1]
    assert ends[0]["evaluations"] > 4


def test_a_checkpoint_of_other_data_is_told(folds, tmp_path):
    folder = RunFolder.new(tmp_path / "run")
    one = Descent(Criterion(folds, Penalty(torch.arange(8))), torch.zeros(8, dtype=FLOAT), 3)
    Run(folder, {}, "", quiet=True).train("descent", one)
    other = Descent(Criterion(folds, Penalty(torch.zeros(8, dtype=torch.int64))), torch.zeros(1, dtype=FLOAT), 3)
    with pytest.raises(UserError, match="8 penalties, not 1"):
        Run(folder, {}, "", quiet=True).train("descent", other)


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, _ = readme_run("sparse_regression")
    names = ("one-penalty", "penalties", "overfitting")
    for name, table in tables.items():
        rows = {row["method"]: row for row in table}
        grid, ours = rows[GRID], rows[LASSO]
        assert ours["criterion"] <= 1.001 * grid["criterion"]
        assert ours["fits"] <= grid["fits"] / 8
        assert rows[NET]["criterion"] <= 1.01 * ours["criterion"]
        # More penalties: the criterion falls, and what is pulled together does not pay for it on test examples.
        assert rows[FEATURES]["criterion"] < rows[FEATURES_PULLED]["criterion"] < grid["criterion"]
        assert rows[FEATURES_PULLED]["test error"] < rows[FEATURES]["test error"] - 0.02
        assert rows[FEATURES_PULLED]["test error"] < grid["test error"] + 0.01
        assert rows[BLOCKS_PULLED]["test error"] < grid["test error"] - 0.005
        data_set = name.split(":")[0]
        for picture in names:
            assert (folder / f"{data_set}-{picture}.png").stat().st_size > 10_000
