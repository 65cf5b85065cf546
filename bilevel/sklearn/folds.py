"""The folds of a cross-validation as one batch: features as each fold's own preprocessing gives them, and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import _check_method_params
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Folds:
    """K folds of the same n examples.

    Attributes:
        features: float64 ``[K, n, d]``, or ``[1, n, d]`` where all folds share them.
        targets: float64 ``[n]``, or int64 classes counted from 0.
        drawn: float64 ``[K, n]``: how often an example is in the training part of a fold.
        train: float64 ``[K, n]``: how much it counts in the fit of the fold: ``drawn`` times its weight.
        test, seen: float64 ``[K, n]``: how much it counts in the loss on the held-out part, and on the training part:
            as scikit-learn's scores, they know the weights that reach the scorer, not those of classes or of one step.
        num_classes: 0 for regression.
        even: whether all folds have the same number of columns; where one has fewer, zeros follow them.
    """

    features: Tensor
    targets: Tensor
    drawn: Tensor
    train: Tensor
    test: Tensor
    seen: Tensor
    num_classes: int
    even: bool

    @property
    def num_features(self) -> int:
        return self.features.shape[-1]

    def losses(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean loss of each fold ``[K]``: squared error, or log loss.

        Args:
            predictions: ``[K, n]``, logits of the second of two classes ``[K, n, 1]``, or of all ``[K, n, C]``.
            weights: ``[K, n]``.
        """
        each = self.each_loss(predictions)
        return torch.where(weights > 0, weights * each, torch.zeros_like(each)).sum(-1) / weights.sum(-1)

    def each_loss(self, predictions: Tensor) -> Tensor:
        """``[K, n]``"""
        if not self.num_classes:
            return (predictions - self.targets).square()
        if predictions.shape[-1] == 1:
            logits = predictions.squeeze(-1)
            return binary_cross_entropy_with_logits(logits, self.targets.to(logits).expand_as(logits), reduction="none")
        return cross_entropy(predictions.movedim(-1, 1), self.targets.expand(predictions.shape[:2]), reduction="none")

    def scale(self) -> float:
        """The loss of the best constant: what losses are measured in."""
        if not self.num_classes:
            return float(self.targets.var(correction=0)) or 1.0
        shares = torch.bincount(self.targets, minlength=self.num_classes) / len(self.targets)
        return float(torch.special.entr(shares).sum())


def make_folds(
    features: Sequence[np.ndarray],
    targets: np.ndarray,
    classes: np.ndarray | None,
    splits: Sequence[Split],
    fit_weight: np.ndarray | None = None,
    test_weight: np.ndarray | None = None,
) -> Folds:
    """Check the splits, and count the examples of each part.

    Args:
        features: of each fold, or of all, ``[n, d]``.
        targets: numbers, or classes counted from 0, ``[n]``.
        classes: labels of the classes; None for regression.
        fit_weight, test_weight: of each example ``[n]``, in the fits and in the held-out losses; None: one.

    Raises:
        ValueError: there is no fold, a part of one is empty, or the training part of one lacks a class.
    """
    if not splits:
        raise ValueError("cv gives no split: at least one pair of training and held-out examples is needed.")
    n = len(targets)
    counts_of = [[np.bincount(np.arange(n)[part], minlength=n).astype(float) for part in split] for split in splits]
    drawn, test = (np.stack(counts) for counts in zip(*counts_of, strict=True))
    fitted, scored = (1.0 if weight is None else weight for weight in (fit_weight, test_weight))
    train, test, seen = drawn * fitted, test * scored, drawn * scored
    for counts, name in ((train, "training"), (test, "held-out")):
        empty = np.flatnonzero(counts.sum(1) <= 0)
        if len(empty):
            raise ValueError(f"The {name} part of fold {empty[0]} has no example, or only such of sample_weight 0.")
    if classes is not None:
        check_classes(train, targets, classes, "sample_weight")
    stacked = np.zeros((len(features), n, max(part.shape[1] for part in features)))
    for k, part in enumerate(features):
        stacked[k, :, : part.shape[1]] = part
    kind = torch.float64 if classes is None else torch.int64
    return Folds(
        torch.from_numpy(stacked),
        torch.from_numpy(np.array(targets)).to(kind),
        torch.from_numpy(drawn),
        torch.from_numpy(train),
        torch.from_numpy(test),
        torch.from_numpy(seen),
        0 if classes is None else len(classes),
        len({part.shape[1] for part in features}) == 1,
    )


def check_classes(train: np.ndarray, targets: np.ndarray, classes: np.ndarray, weight: str) -> None:
    """Refuse a fit that does not see a class: it has no minimum, and an infinite loss where the class is held out.

    Args:
        weight: what may have made the class count for nothing, by name.

    Raises:
        ValueError: naming the fold and the class.
    """
    for k, counts in enumerate(train):
        seen = np.bincount(targets, weights=counts, minlength=len(classes)) > 0
        if not seen.all():
            missing = ", ".join(repr(label) for label in classes[~seen].tolist())
            raise ValueError(
                f"The training part of fold {k} has no example of class {missing}, or only such of {weight} 0: "
                "its model cannot predict it. Use a stratified cv (StratifiedKFold(shuffle=True)) with fewer folds, or "
                "leave out classes that are so rare."
            )


def features_of(
    before: Pipeline | None,
    model: BaseEstimator,
    X: Any,
    y: Any,
    splits: Sequence[Split],
    params: Mapping[str, Any],
    n_jobs: int | None = None,
    pre_dispatch: int | str = "2*n_jobs",
) -> list[np.ndarray]:
    """Fit the preprocessing on the training part of each fold, and transform its held-out part by it.

    Args:
        before: the steps before the model; None: the examples are features already.
        X, y: as the user gave them; what types and missing values may be in them is the first step's business.
        params: of the fits of ``before``; those with an entry for each example are split like the examples.

    Returns:
        ``[n, d]`` of each fold, zeros where it has not drawn an example; or of all where there is nothing before the
        model.

    Raises:
        ValueError: the model is given what is no finite number, or not one row for each example, or other
            columns for held-out examples.
    """
    if before is None:
        return [dense(X, model)]
    versions = Parallel(n_jobs=n_jobs, pre_dispatch=pre_dispatch)(
        delayed(transformed)(clone(before), X, y, split, _check_method_params(X, params, indices=split[0]))
        for split in splits
    )
    return [dense(version, model) for version in versions]


def dense(X: Any, model: BaseEstimator) -> np.ndarray:
    """Features as the model's own `fit` takes them, float64 ``[n, d]``."""
    with config_context(array_api_dispatch=False):  # tensors of PyTorch too
        checked = check_array(
            X, accept_sparse=True, dtype=np.float64, estimator=model, input_name="X", ensure_min_samples=2
        )
    return numbers(checked) if issparse(checked) else checked


def transformed(before: Pipeline, X: Any, y: Any, split: Split, params: Mapping[str, Any]) -> np.ndarray:
    """The examples of a fold, each part by itself, as in a pipeline's own fit and prediction."""
    train, test = split
    learned = before.fit_transform(_safe_indexing(X, train), _safe_indexing(y, train), **params)
    told = before.transform(_safe_indexing(X, test))
    inside, outside = numbers(learned), numbers(told)
    if inside.shape[1:] != outside.shape[1:] or [*getattr(learned, "columns", ())] != [*getattr(told, "columns", ())]:
        raise ValueError(
            "The steps before the model give other columns for the held-out part of a fold than for its training part: "
            "take steps that remember what they were fitted on, such as OneHotEncoder(handle_unknown='ignore')."
        )
    every = np.arange(len(y))
    if (len(inside), len(outside)) != (len(every[train]), len(every[test])):
        raise ValueError("The steps before the model change the number of examples: a row for each is needed.")
    found = np.zeros((len(y), inside.shape[1]))
    found[test], found[train] = outside, inside
    return found


def numbers(features: Any) -> np.ndarray:
    """Dense float64, of its own memory."""
    return np.array(features.toarray() if hasattr(features, "toarray") else features, np.float64)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Where the search makes and differentiates tensors of its own.

    They are on the CPU, and have derivatives, under no_grad, inference mode and other default devices as well.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
    ):
        yield


def take_apart(estimator: BaseEstimator) -> tuple[Pipeline | None, BaseEstimator, str]:
    """The steps before the model, the model, and what its parameters' names begin with."""
    if not isinstance(estimator, Pipeline):
        return None, estimator, ""
    before = estimator[:-1] if len(estimator) > 1 else None
    name, model = estimator.steps[-1]
    return before, model, f"{name}__"
