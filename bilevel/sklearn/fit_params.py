"""What `fit` was given beside the examples: which step it is for, and what it makes of the examples' weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import sklearn
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metadata_routing import get_routing_for_object, process_routing
from sklearn.utils.validation import _check_sample_weight, has_fit_parameter

from .folds import Folds, check_classes, take_apart


def divide(estimator: BaseEstimator, params: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """Fit parameters of the steps before the model, and the model's weights of the examples.

    Args:
        params: as `estimator.fit` takes them: of a pipeline ``step__parameter``, or routed, where scikit-learn's
            metadata routing is enabled.

    Raises:
        ValueError: the pipeline does not take the parameter. TypeError: the model does not, or its derivative here
            does not know it.
    """
    params = {name: value for name, value in params.items() if value is not None}
    before, model, prefix = take_apart(estimator)
    if not prefix:
        return {}, weights_of(model, params)
    if sklearn.get_config()["enable_metadata_routing"]:
        own = process_routing(estimator, "fit", **params)[prefix.removesuffix("__")].fit if params else {}
        taken = get_routing_for_object(before).consumes("fit", params) if before is not None else ()
        return {name: params[name] for name in taken}, weights_of(model, own)
    steps = [name for name, _ in estimator.steps]
    for name in params:
        if name.partition("__")[0] not in steps or "__" not in name:
            raise ValueError(
                f"Pipeline.fit does not accept {name!r}: a parameter is for one step, such as {prefix}{name}=..."
            )
    own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    return {k: v for k, v in params.items() if not k.startswith(prefix)}, weights_of(model, own)


def score_weight_of(estimator: BaseEstimator | None, params: Mapping[str, Any]) -> Any:
    """The weights of the examples in the scores, or None.

    Args:
        estimator: whose own `score` it is, if any's.
        params: as that `score` takes them: of a pipeline under the names that its steps asked for.
    """
    prefix = take_apart(estimator)[2]
    if prefix and params and sklearn.get_config()["enable_metadata_routing"]:
        params = process_routing(estimator, "score", **params)[prefix.removesuffix("__")].score
    return params.get("sample_weight")


def weights_of(model: BaseEstimator, params: Mapping[str, Any]) -> np.ndarray | None:
    """``sample_weight``, the one fit parameter that models with hypergradients have, or None."""
    unknown = sorted(set(params) - {"sample_weight"})
    if unknown or (params and not has_fit_parameter(model, "sample_weight")):
        raise TypeError(f"{type(model).__name__}.fit takes no {', '.join(unknown) or 'sample_weight'} in this search.")
    return params.get("sample_weight")


def checked(weight: Any, n: int) -> np.ndarray | None:
    """Weights ``[n]``, or None; negative ones have no minimum.

    Raises:
        ValueError: another length, not finite, or negative.
    """
    if weight is None:
        return None
    with sklearn.config_context(array_api_dispatch=False):
        weights: np.ndarray = _check_sample_weight(weight, np.empty((n, 1)), dtype=np.float64)
    if (weights < 0).any():
        raise ValueError("sample_weight has negative entries: the training objective has no minimum then.")
    return weights


def weigh_classes(folds: Folds, class_weight: Any, classes: np.ndarray) -> None:
    """Multiply the training weights of each fold by those of the classes, as the model's `fit` does.

    Raises:
        ValueError: the objective has no minimum with them: one is negative, or a class of a fold counts for nothing.
    """
    if class_weight is None:
        return
    codes = folds.targets.numpy()
    for weights in folds.train.numpy():  # the tensor's own memory
        inside = weights > 0
        extra = {"y": classes[codes[inside]], "sample_weight": weights[inside]}
        if "sample_weight" not in inspect.signature(compute_class_weight).parameters:  # before scikit-learn 1.7
            del extra["sample_weight"]
        by_class = compute_class_weight(class_weight, classes=classes, **extra)
        if (by_class < 0).any():
            raise ValueError(f"class_weight is {class_weight!r}: with negative weights the objective has no minimum.")
        weights *= by_class[codes]
    check_classes(folds.train.numpy(), codes, classes, "class_weight")
