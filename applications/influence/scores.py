"""What the influences are held against: retraining, and the labels that are wrong."""

from __future__ import annotations

import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from applications.influence.model import Batch, Model, Params, losses


def datamodeling_score(predicted: Tensor, truth: Tensor) -> float:
    """The linear datamodeling score (Park et al. 2023): rank correlation over subsets, mean over queries ``[s, q]``."""
    pairs = zip(predicted.T.numpy(), truth.T.numpy(), strict=True)
    return sum(float(spearmanr(a, b).statistic) for a, b in pairs) / predicted.shape[1]


def retrained(model: Model, params: Params, train: Batch, queries: Batch, out: Tensor) -> Tensor:
    """By how much each query's loss changes when a set is left out of the training ``[s, n] -> [s, q]``."""
    before = losses(model.outputs(params, queries), queries)
    again = [model.fit(train, (~mask).double(), params) for mask in out]
    return torch.stack([losses(model.outputs(fit, queries), queries) - before for fit in again])


def area_under_curve(scores: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong label has a higher score than a right one."""
    ranks = torch.tensor(rankdata(scores.numpy()))
    count = int(wrong.sum())
    return float((ranks[wrong].sum() - count * (count + 1) / 2) / (count * (len(wrong) - count)))


def found_first(scores: Tensor, wrong: Tensor) -> float:
    """In percent, how many of the labels with the highest scores are wrong, of as many as there are wrong ones."""
    count = int(wrong.sum())
    return 100 * float(wrong[scores.argsort(descending=True)[:count]].double().mean())
