"""What is tuned in the comparison: data sets, models, and the box that all methods search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import make_friedman1, make_regression
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from applications.frame.data import Examples, load, split
from applications.search.knobs import Config
from bilevel.sklearn import FeatureKernelRidge, FeatureLogistic, FeatureRidge

PENALTIES = (1e-3, 1e3)
"""Range of every penalty, three decades around the default on both sides."""


@dataclass(frozen=True)
class Contest:
    """One model on one data set.

    Attributes:
        model: with its defaults, from which every method starts that starts anywhere.
        bounds: of its hyperparameters, by name.
        sizes: entries of those that are vectors.
        grid: points for each hyperparameter that is a number; a vector is searched with one value for all entries.
    """

    name: str
    examples: Examples
    model: BaseEstimator
    bounds: Mapping[str, tuple[float, float]]
    sizes: Mapping[str, int]
    grid: int

    @property
    def num_hyperparameters(self) -> int:
        return sum(self.sizes.get(name, 1) for name in self.bounds)

    @property
    def scoring(self) -> str:
        return "neg_log_loss" if self.examples.num_classes else "neg_mean_squared_error"

    def estimator(self) -> Pipeline:
        """The model behind a scaler, which each fold fits by itself."""
        return make_pipeline(StandardScaler(), clone(self.model))

    def key(self, name: str) -> str:
        """The name of a hyperparameter in the pipeline."""
        return f"{type(self.model).__name__.lower()}__{name}"


def contests_of(knobs: Config, seed: int) -> list[Contest]:
    """Those of --data.

    Args:
        seed: of what is drawn: data sets, and examples of a file.

    Raises:
        UserError: bad data.
    """
    if knobs.data == "built-in":
        return built_in(seed)
    examples = load(knobs.data, knobs.data_root, task=knobs.task)
    chosen = split(examples, [knobs.examples], seed)[0] if knobs.examples else examples
    return of_file(chosen, knobs.per_feature)


def built_in(seed: int) -> list[Contest]:
    """From one hyperparameter to a thousand, on sets that ship with scikit-learn and two that it draws."""
    diabetes = load("diabetes", task="regression")
    digits = load("digits")
    few = np.random.default_rng(seed).permutation(len(digits))[:400]
    friedman = numbers("friedman1", *make_friedman1(300, 10, noise=1.0, random_state=seed))
    wide = numbers("wide", *make_regression(400, 1000, n_informative=20, noise=10.0, random_state=seed))
    logistic = LogisticRegression(max_iter=2000)
    support = {"C": (1e-1, 1e3), "epsilon": (1e-3, 1e1), "gamma": (1e-3, 1e1)}
    widths = {"alpha": PENALTIES, "gammas": (1e-4, 1e1)}
    return [
        Contest("diabetes, ridge", diabetes, Ridge(), {"alpha": PENALTIES}, {}, 25),
        Contest("breast cancer, logistic", load("breast_cancer"), logistic, {"C": PENALTIES}, {}, 25),
        Contest("digits, logistic", digits.subset(few), logistic, {"C": PENALTIES}, {}, 13),
        Contest("friedman1, support vectors", friedman, SVR(), support, {}, 4),
        Contest("diabetes, penalty a feature", diabetes, FeatureRidge(), {"alphas": PENALTIES}, {"alphas": 10}, 25),
        Contest("friedman1, width a feature", friedman, FeatureKernelRidge(), widths, {"gammas": 10}, 7),
        penalty_for_each_feature("wine", load("wine")),
        penalty_for_each_feature("1,000 features", wide),
    ]


def of_file(examples: Examples, per_feature: bool = True) -> list[Contest]:
    """One penalty, and a penalty for each feature, on the user's examples."""
    if examples.num_classes:
        model, bounds = LogisticRegression(max_iter=2000), {"C": PENALTIES}
    else:
        model, bounds = Ridge(), {"alpha": PENALTIES}
    one = Contest("one penalty", examples, model, bounds, {}, 25)
    return [one, penalty_for_each_feature("", examples)] if per_feature else [one]


def penalty_for_each_feature(name: str, examples: Examples) -> Contest:
    """Ridge or logistic regression with as many penalties as features."""
    width = examples.features.shape[1]
    model, key = (FeatureLogistic(max_iter=2000), "penalties") if examples.num_classes else (FeatureRidge(), "alphas")
    title = f"{name}, penalty a feature".removeprefix(", ")
    return Contest(title, examples, model, {key: PENALTIES}, {key: width}, 25)


def numbers(name: str, x: np.ndarray, y: np.ndarray) -> Examples:
    """A drawn regression set."""
    return Examples(name, x, y, 0)
