"""What is told of a training that is done: accuracies, detection of wrong labels, the weights that were learned."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from torch import Tensor

from applications.reweighting.drawing import Drawn
from applications.reweighting.train import ClassifierTraining
from applications.reweighting.weighting import losses_of

LARGEST_LOSS, BINS = 6.0, 30


@torch.no_grad()
def measure(training: ClassifierTraining, drawn: Drawn) -> dict[str, Any]:
    """Lists of one number for each repeat, in percent, of the last step and of the best one on the validation set.

    ``auc``: of the learned weight, or of minus the loss where there is none, as a detector of true labels among the
    training examples of ``drawn``, of each repeat that has both; None where all are true or none was trained on.
    """
    row: dict[str, Any] = {"auc": None}
    for stop, params in (("last", training.params), ("stopped", training.best)):
        for part in ("validation", "test"):
            chosen = getattr(drawn, part)
            guesses = training.outputs(chosen, params).argmax(-1).cpu()
            pairs = list(zip(drawn.classes[chosen].cpu(), guesses, strict=True))
            row[f"{part}_{stop}"] = [100 * float(balanced_accuracy_score(*pair)) for pair in pairs]
            if (part, stop) == ("test", "last"):
                row["recalls"] = [(100 * recall_score(*pair, average=None, zero_division=0)).tolist() for pair in pairs]
    own, size = training.drawn, drawn.train.shape[1]
    losses = losses_of(training.outputs(own.train), own.labels)
    weights = training.weights(losses, training.frequencies.gather(1, own.labels))
    if own.train.shape[1] >= size and not drawn.clean.all():  # a meta set behind the training set is known to be clean
        scores = (-losses if training.net is None else weights)[:, :size].cpu()
        pairs = [pair for pair in zip(drawn.clean.cpu(), scores, strict=True) if len(pair[0].unique()) == 2]
        row["auc"] = [float(roc_auc_score(*pair)) for pair in pairs]
    if training.net is not None:
        row["curves"] = weight_curves(training, weights.mean(1, keepdim=True))
        row["histograms"] = {"true": histogram(losses[own.clean]), "wrong": histogram(losses[~own.clean])}
    return row


def weight_curves(training: ClassifierTraining, mean: Tensor) -> dict[str, list[list[float]]]:
    """The weight at `loss_grid`, over the ``mean [R, 1]`` of the training set, by repeat and kind of class."""
    frequencies = training.frequencies.sort(1, descending=True).values
    kinds = {"every class": 0}
    if training.net is not None and training.net.inputs == "loss-and-class":
        kinds = {"largest class": 0, "middle class": frequencies.shape[1] // 2, "smallest class": -1}
    losses = torch.tensor(loss_grid(), device=mean.device).expand(len(mean), -1)
    return {
        kind: (training.weights(losses, frequencies[:, index, None].expand_as(losses)) / mean).tolist()
        for kind, index in kinds.items()
    }


def loss_grid() -> list[float]:
    return [LARGEST_LOSS * index / 60 for index in range(61)]


def histogram(losses: Tensor) -> list[float]:
    """Numbers of losses in `BINS` equal bins up to `LARGEST_LOSS`; larger ones count in the last."""
    return torch.histc(losses.cpu().clamp(0, LARGEST_LOSS), BINS, 0, LARGEST_LOSS).tolist()
