"""How well wrong labels were found, and the model that is left when they are dropped."""

from __future__ import annotations

from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from torch import Tensor

from applications.data_cleaning.model import Model, Params
from applications.data_cleaning.task import Labelled, Task

THRESHOLD = 0.5
"""Examples of smaller trust are taken to be wrong."""


def detection(trust: Tensor, wrong: Tensor) -> dict[str, float]:
    """Wrong labels are what is to be found (the positive class); those of a trust ``[n]`` below 1/2 are reported.

    The area under the ROC curve judges the order alone: the chance that a right label is trusted more than a wrong one.
    """
    truth, found = wrong.numpy(), (trust < THRESHOLD).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(truth, found, average="binary", zero_division=0.0)
    mixed = 0 < truth.sum() < len(truth)
    auc = roc_auc_score(truth, -trust.numpy()) if mixed else float("nan")
    return {"F1": float(f1), "precision": float(precision), "recall": float(recall), "AUC": float(auc)}


def agreement(model: Model, params: Params, data: Labelled) -> Tensor:
    """The trust that a fitted classifier has in labels: above 1/2 exactly where it would have given the same one.

    With p the probability of the label and q that of the most probable other class, ``p / (p + q)``. Dropping what the
    classifier of the validation data disagrees with is cleaning without any hypergradient: the baseline to beat.
    """
    chances = model.logits(params, data.features).detach().softmax(1)
    given = chances.gather(1, data.labels[:, None])[:, 0]
    others = chances.scatter(1, data.labels[:, None], 0.0).amax(1)
    return given / (given + others)


def kept(task: Task, trust: Tensor) -> Labelled:
    """The training examples that are trusted, and the validation examples: what the final model is fitted to."""
    return task.train[trust >= THRESHOLD] + task.val
