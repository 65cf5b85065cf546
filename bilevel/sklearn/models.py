"""Which scikit-learn models can be searched: what their hyperparameters are, and their twins in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.svm import SVR
from torch import Tensor

from .elastic_net import ElasticNetTwin
from .feature_models import FeatureKernelRidge, FeatureLogistic, FeatureRidge, for_each_feature
from .folds import Folds
from .logistic import LogisticTwin
from .quadratic import KernelRidgeTwin, RidgeTwin
from .support_vectors import SVRTwin

Values = Mapping[str, Any]
Predict = Callable[[dict[str, Tensor]], Tensor]
LOGARITHMIC, SHARE, VECTOR = "logarithmic", "share", "vector"


@dataclass(frozen=True)
class Searchable:
    """A model whose hyperparameters have hypergradients.

    Attributes:
        kinds: ``LOGARITHMIC`` a positive number, ``SHARE`` one between 0 and 1, ``VECTOR`` a positive number for each
            feature.
        needs: settings that must have these values for the twin to be the same model.
        twin: from the folds and the model's settings a function of hyperparameters (those that are not searched are
            constants) that returns each fold's predictions for all examples, as `Folds.losses` takes them.
    """

    kinds: dict[str, str]
    needs: dict[str, Any]
    twin: Callable[[Folds, Values], Predict]

    def known(self, num_features: int) -> dict[str, tuple[int | None, bool]]:
        """As `make_space` takes it."""
        return {name: (num_features if kind == VECTOR else None, kind != SHARE) for name, kind in self.kinds.items()}


def ridge(folds: Folds, values: Values) -> Predict:
    twin = RidgeTwin(folds, values["fit_intercept"])
    return lambda h: twin.predictions(h["alpha"])


def feature_ridge(folds: Folds, values: Values) -> Predict:
    twin = RidgeTwin(folds, values["fit_intercept"])
    return lambda h: twin.predictions(h["alphas"])


def kernel_ridge(folds: Folds, values: Values) -> Predict:
    twin = KernelRidgeTwin(folds)
    gaussian = values["kernel"] == "rbf"
    return lambda h: twin.predictions(h["alpha"], h["gamma"] if gaussian else None)


def feature_kernel_ridge(folds: Folds, values: Values) -> Predict:
    twin = KernelRidgeTwin(folds)
    return lambda h: twin.predictions(h["alpha"], h["gammas"])


def logistic(folds: Folds, values: Values) -> Predict:
    """
    Raises:
        ValueError: liblinear's model is another one.
    """
    if values["solver"] == "liblinear" and (values["fit_intercept"] or folds.num_classes > 2):
        raise ValueError(
            "LogisticRegression(solver='liblinear') penalises its intercept, and has no softmax: its hypergradients "
            "here would be those of another model. Use another solver, such as 'lbfgs' (of two classes, "
            "fit_intercept=False will do)."
        )
    twin = LogisticTwin(folds, values["fit_intercept"])
    return lambda h: twin.predictions(1 / h["C"])


def feature_logistic(folds: Folds, values: Values) -> Predict:
    twin = LogisticTwin(folds, values["fit_intercept"])
    return lambda h: twin.predictions(h["penalties"])


def elastic_net(folds: Folds, values: Values) -> Predict:
    twin = ElasticNetTwin(folds, values["fit_intercept"])
    return lambda h: twin.predictions(h["alpha"], h["l1_ratio"] if "l1_ratio" in h else torch.ones_like(h["alpha"]))


def support_vectors(folds: Folds, values: Values) -> Predict:
    twin = SVRTwin(folds)
    return lambda h: twin.predictions(h["C"], h["epsilon"], h["gamma"])


MODELS: dict[type[BaseEstimator], Searchable] = {
    Ridge: Searchable({"alpha": LOGARITHMIC}, {"positive": (False,)}, ridge),
    FeatureRidge: Searchable({"alphas": VECTOR}, {}, feature_ridge),
    KernelRidge: Searchable({"alpha": LOGARITHMIC, "gamma": LOGARITHMIC}, {"kernel": ("linear", "rbf")}, kernel_ridge),
    FeatureKernelRidge: Searchable({"alpha": LOGARITHMIC, "gammas": VECTOR}, {}, feature_kernel_ridge),
    LogisticRegression: Searchable(
        {"C": LOGARITHMIC},
        {"l1_ratio": (None, 0), "penalty": ("deprecated", "l2"), "multi_class": ("deprecated", "auto")},
        logistic,
    ),
    FeatureLogistic: Searchable({"penalties": VECTOR}, {}, feature_logistic),
    ElasticNet: Searchable({"alpha": LOGARITHMIC, "l1_ratio": SHARE}, {"positive": (False,)}, elastic_net),
    Lasso: Searchable({"alpha": LOGARITHMIC}, {"positive": (False,)}, elastic_net),
    SVR: Searchable(
        {"C": LOGARITHMIC, "epsilon": LOGARITHMIC, "gamma": LOGARITHMIC}, {"kernel": ("rbf",)}, support_vectors
    ),
}


def searchable(model: BaseEstimator) -> Searchable:
    """The entry of the model.

    Raises:
        TypeError: it has none. ValueError: it has a setting that its twin does not know.
    """
    found = MODELS.get(type(model))
    if found is None:
        there = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(
            f"{type(model).__name__} has no hypergradients here: the estimator, or the last step of its pipeline, is "
            f"one of {there}."
        )
    values = model.get_params(deep=False)
    for name, allowed in found.needs.items():
        if name in values and values[name] not in allowed:
            raise ValueError(
                f"{type(model).__name__}({name}={values[name]!r}) has no hypergradients here: it must be "
                f"{' or '.join(map(repr, allowed))}."
            )
    if isinstance(model, KernelRidge) and model.kernel == "linear":  # it does not read gamma
        return replace(found, kinds={"alpha": LOGARITHMIC})
    return found


def hyperparameters(model: BaseEstimator, kinds: Mapping[str, str], folds: Folds) -> dict[str, Any]:
    """The values that the model has now; one that scikit-learn takes from the data for each fold, ``[K, 1, 1]``.

    Raises:
        ValueError: one depends on the number of columns, which is another one in another fold, or is none of that
            number.
    """
    values = {name: value for name, value in model.get_params(deep=False).items() if name in kinds}
    if not folds.even:
        for name, value in values.items():
            if kinds[name] == VECTOR or value is None or isinstance(value, str):
                raise ValueError(
                    f"The steps before the model give another number of columns in another fold, on which {name} of "
                    f"{type(model).__name__} depends: let them give the same columns, or give {name} a number."
                )
    for name, value in values.items():
        if value is None or (isinstance(value, str) and value == "auto"):
            values[name] = 1 / folds.num_features
        elif kinds[name] == VECTOR:
            values[name] = for_each_feature(name, value, folds.num_features)
        elif np.size(value) != 1:
            raise ValueError(
                f"{type(model).__name__}({name}=...) has {np.size(value)} numbers, one for each of several targets: y "
                f"is one target here, and {name} one number."
            )
        elif isinstance(value, str):  # "scale"
            share = (folds.drawn / folds.drawn.sum(-1, keepdim=True)).unsqueeze(-1) / folds.num_features
            mean = (share * folds.features).sum((-2, -1), keepdim=True)
            variances = (share * (folds.features - mean).square()).sum((-2, -1), keepdim=True)
            values[name] = torch.where(variances > 0, 1 / (folds.num_features * variances), torch.ones_like(variances))
    return values
