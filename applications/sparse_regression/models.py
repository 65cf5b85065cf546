"""What the penalties are good for: the model of all training examples, measured on the test examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import ElasticNetCV, LassoCV, LinearRegression
from sklearn.metrics import f1_score, r2_score
from torch import Tensor

from applications.frame.run import Row
from applications.sparse_regression.criterion import Criterion
from applications.sparse_regression.data import Study
from applications.sparse_regression.descent import Descent, run
from applications.sparse_regression.folds import Folds
from applications.sparse_regression.penalties import Penalty, coordinate_descent

RATIOS = (0.5, 0.7, 0.9)
"""Shares of l1 in the grid of the elastic net."""
PULLS = (0.003, 0.03, 0.3)
"""Towards one common penalty; a held-out quarter of the training examples chooses."""


def fit(study: Study, penalty: Penalty, log_strengths: Tensor) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of all training examples under these penalties."""
    l1, l2 = penalty.strengths(log_strengths)
    centre = study.features.mean(0) if study.intercept else np.zeros(study.features.shape[1])
    mean = study.targets.mean() if study.intercept else 0.0
    coefficients = coordinate_descent(
        study.features - centre, study.targets - mean, l1.numpy(), 0.0 if l2 is None else l2.item()
    )
    return coefficients, mean - centre @ coefficients


def assess(study: Study, coefficients: np.ndarray, intercept: float) -> Row:
    """Test error as a part of the targets' variance, and what is selected.

    A test error of 1 is that of the mean; F1 is that of the support, where it is known.
    """
    selected = coefficients != 0
    return {
        "test error": 1 - float(r2_score(study.test_targets, study.test_features @ coefficients + intercept)),
        "selected": int(selected.sum()),
        "noise selected": int((selected & study.noise).sum()) if study.noise.any() else None,
        "F1": float(f1_score(~study.noise, selected)) if study.support_known else None,
    }


def of_penalties(study: Study, penalty: Penalty, log_strengths: Tensor) -> Row:
    """`assess` of what the penalties give."""
    return assess(study, *fit(study, penalty, log_strengths))


def lasso_grid(study: Study, folds: Folds, number: int, weights: np.ndarray | None = None) -> Row:
    """scikit-learn's `LassoCV` on these folds; with ``weights`` of the features, the adaptive lasso of Zou (2006)."""
    scale = 1.0 if weights is None else 1 / weights
    settings: dict[str, Any] = {"cv": folds.pairs, "fit_intercept": study.intercept, "max_iter": 20_000}
    grid = LassoCV(alphas=number, **settings).fit(study.features * scale, study.targets)
    curve = grid.mse_path_.reshape(number, len(folds)).mean(-1)  # scikit-learn drops the axis of a single fold
    return {
        "fits": number * len(folds),
        "criterion": float(curve.min()),
        **assess(study, grid.coef_ * scale, grid.intercept_),
        "penalty": float(grid.alpha_),
        "grid": grid.alphas_.tolist(),
        "curve": curve.tolist(),
        "coefficients": (grid.coef_ * scale).tolist(),
    }


def elastic_net_grid(study: Study, folds: Folds, number: int) -> Row:
    """scikit-learn's `ElasticNetCV` on these folds."""
    settings: dict[str, Any] = {"cv": folds.pairs, "fit_intercept": study.intercept, "max_iter": 20_000}
    grid = ElasticNetCV(l1_ratio=list(RATIOS), alphas=number, **settings).fit(study.features, study.targets)
    return {
        "fits": len(RATIOS) * number * len(folds),
        "criterion": float(grid.mse_path_.reshape(-1, len(folds)).mean(-1).min()),
        **assess(study, grid.coef_, grid.intercept_),
    }


def adaptive_lasso(study: Study, folds: Folds, first: Row) -> Row:
    """The lasso again, the penalty of a feature divided by its first coefficient.

    Its criterion is not one: the weights have seen the validation examples.
    """
    sizes = np.abs(first["coefficients"])
    weights = 1 / (sizes + 1e-3 * max(sizes.max(), 1e-12))
    found = lasso_grid(study, folds, len(first["grid"]), weights)
    return found | {"fits": found["fits"] + first["fits"], "criterion": None}


def least_squares_on_support(study: Study) -> Row:
    """What knowing the support would give."""
    model = LinearRegression(fit_intercept=study.intercept).fit(study.features[:, ~study.noise], study.targets)
    coefficients = np.zeros(len(study.noise))
    coefficients[~study.noise] = model.coef_
    return {"fits": None, "criterion": None, **assess(study, coefficients, model.intercept_)}


def choose_pull(
    study: Study, penalty: Penalty, start: Tensor, folds: int, evaluations: int, settings: Mapping[str, Any]
) -> Row:
    """The pull whose penalties, found on three quarters of the training examples, are best on the last quarter.

    Args:
        settings: of the criterion, see `criterion.SETTINGS`.
    """
    rows = np.random.default_rng(study.shuffle).permutation(len(study.targets))
    held_out, rest = np.split(rows, [len(rows) // 4])
    (x, y), (test_x, test_y) = study.subset(rest), study.subset(held_out)
    part = dataclasses.replace(study, features=x, targets=y, test_features=test_x, test_targets=test_y)
    cross_validation = Folds.make(part.features, part.targets, folds, study.shuffle, study.intercept)
    errors, fits = [], 0
    for pull in PULLS:
        descent = run(Descent(Criterion(cross_validation, penalty, pull, **settings), start, evaluations))
        errors.append(of_penalties(part, penalty, descent.point)["test error"])
        fits += descent.step * len(cross_validation)
    return {"pull": PULLS[int(np.argmin(errors))], "errors": errors, "fits": fits}
