"""Held-out accuracy with its interval, transductive and not, beside baselines that adapt nothing learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import bilevel as bl
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes, Sampler
from applications.few_shot.methods import Learner, Params, adapt
from applications.few_shot.models import BatchStatNorm, inductive

Classifier = Callable[[Episodes], Tensor]
"""From T tasks to the predicted labels of their queries, ``[T, n]``."""

CHUNK = 50


@dataclass(frozen=True)
class Accuracy:
    """Mean over tasks, and half the width of its 95 % interval, ``1.96 std / sqrt(num_tasks)``; both in percent."""

    mean: float
    interval: float
    num_tasks: int

    @classmethod
    def over(cls, per_task: Tensor) -> Accuracy:
        percent = 100 * per_task.double()
        spread = 1.96 * percent.std().item() / math.sqrt(len(percent)) if len(percent) > 1 else math.nan
        return cls(percent.mean().item(), spread, len(percent))

    def __str__(self) -> str:
        interval = " (one task)" if math.isnan(self.interval) else f" +- {self.interval:.2f}"
        return f"{self.mean:6.2f}{interval} %"


def measure(
    classifiers: dict[str, Classifier], sampler: Sampler, num_tasks: int, progress: bool
) -> dict[str, Accuracy]:
    """Every classifier on the same ``num_tasks`` tasks."""
    correct: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    sizes = [min(CHUNK, num_tasks - start) for start in range(0, num_tasks, CHUNK)]
    for step, size in enumerate(tqdm(sizes, desc="evaluate", unit="x50 tasks", disable=not progress, leave=False)):
        episodes = sampler.episodes(size, step)
        for name, classify in classifiers.items():
            correct[name].append((classify(episodes) == episodes.query_y).double().mean(-1).cpu())
    return {name: Accuracy.over(torch.cat(parts)) for name, parts in correct.items()}


def settings(learner: Learner) -> Iterator[tuple[str, Classifier]]:
    """How the network can classify: as one batch of queries, and query by query; one where they are the same.

    They share the adaptation, where one is asked right after the other.
    """
    learner = learner.for_evaluation()
    adapted = _Adapted(learner)
    if not any(isinstance(module, BatchStatNorm) for module in learner.net.modules()):
        yield "inductive: no query sees another", adapted.classifier(transductive)
        return
    yield "transductive: batch statistics of all queries", adapted.classifier(transductive)
    yield "not transductive: each query by itself", adapted.classifier(each_by_itself)


class _Adapted:
    """A learner adapted to the episodes that were seen last, so that several classifiers pay for it once."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self._last: tuple[Episodes, Params] | None = None

    def classifier(self, classify: Callable[[Learner, Params, Episodes], Tensor]) -> Classifier:
        def classifier(episodes: Episodes) -> Tensor:
            def chunk(params: Params, *tensors: Tensor) -> Tensor:
                return classify(self.learner, params, Episodes(*tensors))

            sharing = self.learner.sharing(torch.cat([episodes.support_x, episodes.query_x], 1))
            return bl.map_tasks(chunk, self.params(episodes), *episodes.tensors(), **sharing)

        return classifier

    def params(self, episodes: Episodes) -> Params:
        """The adapted parameters of T tasks, leaves ``[T, ...]``."""
        if self._last is None or self._last[0] is not episodes:

            def chunk(x: Tensor, y: Tensor) -> Params:
                return adapt(self.learner, x, y).value

            support = episodes.support_x, episodes.support_y
            vectors = sum(param.numel() for param in self.learner.meta.values())  # of many steps, beside few images
            sharing = self.learner.sharing(episodes.support_x, vectors)
            self._last = episodes, bl.map_tasks(chunk, *support, **sharing)
        return self._last[1]


def transductive(learner: Learner, params: Params, episodes: Episodes) -> Tensor:
    """Labels ``[T, n]`` where the queries of a task are one batch of the network."""
    return learner.predict(params, episodes.query_x).argmax(-1)


def each_by_itself(learner: Learner, params: Params, episodes: Episodes) -> Tensor:
    """Labels ``[T, n]`` where each query is normalised with the support set and itself alone."""
    num_support = episodes.support_x.shape[1]
    images = torch.cat([episodes.support_x, episodes.query_x], 1)
    with inductive(num_support):
        return learner.predict(params, images)[:, num_support:].argmax(-1)


def nearest_neighbour(episodes: Episodes) -> Tensor:
    """The label of the support image that is nearest in pixels."""
    nearest = torch.cdist(episodes.query_x.flatten(2), episodes.support_x.flatten(2)).argmin(-1)
    return episodes.support_y.gather(-1, nearest)


def linear_on_pixels(episodes: Episodes) -> Tensor:
    """Softmax regression on the pixels of the support set, with the penalty ``||w||^2 / 2n`` (scikit-learn's C = 1).

    The weights stay in the span of the images, where they are few numbers: the steps of L-BFGS are the same in it.
    """
    basis, coordinates = torch.linalg.qr(episodes.support_x.flatten(2).mT)
    x = coordinates.mT.contiguous()
    ways = int(episodes.support_y.max()) + 1

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = x @ params["weight"] + params["bias"]
        return cross_entropy(logits, y) + params["weight"].square().sum() / 2 / len(x)

    start = {"weight": x.new_zeros(len(x), x.shape[-1], ways), "bias": x.new_zeros(len(x), ways)}
    solver = bl.LBFGS(max_steps=100, gtol=1e-3)
    fit = bl.argmin(torch.vmap(loss), start, x, episodes.support_y, solver=solver, hypergrad=None, throw="ignore")
    scores = episodes.query_x.flatten(2) @ basis @ fit.value["weight"] + fit.value["bias"].unsqueeze(1)
    return scores.argmax(-1)


def baselines(config: Config) -> dict[str, Classifier]:
    """`BASELINES`, by what they see."""
    seen = "pixels" if config.backbone is None else "features"
    return {name.replace("pixels", seen): classify for name, classify in BASELINES.items()}


BASELINES: dict[str, Classifier] = {
    "linear classifier on pixels": linear_on_pixels,
    "nearest neighbour on pixels": nearest_neighbour,
}
