"""Classifiers trained on weighted losses, R at once, and the weight nets beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

import bilevel as bl
from applications.frame.checkpoint import restore_optimizer
from applications.reweighting.drawing import Drawn
from applications.reweighting.networks import Params, stacked
from applications.reweighting.weighting import (
    METHODS,
    BatchLoss,
    Hypergrad,
    Inputs,
    Method,
    WeightNet,
    focal_loss,
    look_ahead,
    losses_of,
    weighted_mean,
)

Rule = Literal["unweighted", "focal", "class-frequency"] | Method


def is_method(rule: Rule) -> TypeGuard[Method]:
    """Whether a weight net learns by it."""
    return rule in get_args(Method)


EVALUATIONS = 20
CHUNK = 2_000
"""Images of each repeat that are evaluated at once."""


@dataclass(frozen=True)
class Settings:
    """Settings of all trainings of a run.

    Args:
        lr, momentum, weight_decay: of the classifier's stochastic gradient descent; the rate falls to 0 by a cosine.
        meta_lr: of Adam on the weight net; it falls likewise.
        warm_up: steps before the weight net learns: a classifier that knows nothing yet gains most from the largest
            losses, right or wrong, and the weights would rise with the loss and saturate.
    """

    steps: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    meta_lr: float
    warm_up: int
    focal_gamma: float
    seed: int


class ClassifierTraining:
    """R classifiers on R training sets, by one rule of weighting; a `Training`.

    Each repeat draws its own batches; nothing of one reaches another.

    Args:
        make: one classifier with random parameters.
        rule: ``"unweighted"``, ``"focal"``, ``"class-frequency"`` (weights ``1 / n_class``), or the method whose
            hypergradient the weight net learns by.
        inputs: of the weight net.
        hypergrad: in place of the one that the rule names.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        drawn: Drawn,
        rule: Rule,
        settings: Settings,
        inputs: Inputs = "loss",
        hypergrad: Hypergrad | None = None,
    ):
        self.drawn, self.rule, self.settings, self.steps = drawn, rule, settings, settings.steps
        device, repeats = drawn.images.device, len(drawn.train)
        self.module, self.params = stacked(make, repeats, settings.seed, device)
        self.frequencies = drawn.counts / drawn.counts.amax(1, keepdim=True)
        self.optimizer = torch.optim.SGD(
            self.params.values(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.net: WeightNet | None = None
        self.fit: bl.Solution | None = None
        if is_method(rule):
            self.hypergrad = hypergrad or METHODS[rule]
            self.net = WeightNet(repeats, inputs, settings.seed + 1, device)
            self.meta_optimizer = torch.optim.Adam(self.net.params.values(), settings.meta_lr)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.best = {name: value.detach().clone() for name, value in self.params.items()}
        self.best_validation = torch.zeros(repeats)

    def rows(self) -> Iterator[dict[str, Any]]:
        """See `Training`; accuracies are lists, one number for each repeat."""
        while self.step < self.steps:
            fraction = (1 + math.cos(math.pi * self.step / self.steps)) / 2
            self.optimizer.param_groups[0]["lr"] = self.settings.lr * fraction
            indices, labels, frequencies = self.batch()
            row: dict[str, Any] = {}
            if self.net is not None and self.step >= self.settings.warm_up:
                self.meta_optimizer.param_groups[0]["lr"] = self.settings.meta_lr * fraction
                row["meta_loss"] = self.meta_step(indices, labels, frequencies, self.settings.lr * fraction)
            row = {"loss": self.classifier_step(indices, labels, frequencies), **row}
            self.step += 1
            if self.step % max(1, self.steps // EVALUATIONS) == 0 or self.step == self.steps:
                row["validation"] = self.keep_best().tolist()
            yield {"step": self.step, **row}

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, labels and class frequencies of training examples, ``[R, batch]``."""
        drawn, size = self.drawn, (len(self.drawn.train), self.settings.batch)
        chosen = torch.randint(drawn.train.shape[1], size, generator=self.generator).to(drawn.train.device)
        labels = drawn.labels.gather(1, chosen)
        return drawn.train.gather(1, chosen), labels, self.frequencies.gather(1, labels)

    def meta_batch(self) -> Tensor:
        """Indices ``[R, n]``: all of the meta set, where it is no larger than a batch."""
        meta, size = self.drawn.meta, self.settings.batch
        if meta.shape[1] <= size:
            return meta
        chosen = torch.randint(meta.shape[1], (len(meta), size), generator=self.generator)
        return meta.gather(1, chosen.to(meta.device))

    def meta_step(self, indices: Tensor, labels: Tensor, frequencies: Tensor, lr: float) -> float:
        """The weight nets follow the loss on the meta set of classifiers that made one step more."""
        assert self.net is not None
        images, meta = self.drawn.images[indices], self.meta_batch()
        batch = BatchLoss(lambda params: self.predict(params, images), labels, frequencies, self.net)
        ahead = self.fit = look_ahead(self.params, batch, self.hypergrad, lr)
        outputs = self.predict(ahead.value, self.drawn.images[meta])
        meta_losses = losses_of(outputs, self.drawn.classes[meta]).mean(-1)
        weights = list(self.net.params.values())
        for param, grad in zip(weights, torch.autograd.grad(meta_losses.sum(), weights), strict=True):
            param.grad = grad
        self.meta_optimizer.step()
        return meta_losses.mean().item()

    def classifier_step(self, indices: Tensor, labels: Tensor, frequencies: Tensor) -> float:
        """One step on the weighted loss."""
        losses = losses_of(self.predict(self.params, self.drawn.images[indices]), labels)
        if self.rule == "focal":
            loss = focal_loss(losses, self.settings.focal_gamma)
        else:
            loss = weighted_mean(self.weights(losses, frequencies), losses)
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        return loss.mean().item()

    @torch.no_grad()
    def weights(self, losses: Tensor, frequencies: Tensor) -> Tensor:
        """Weights of examples with these losses, ``[R, n]``."""
        if self.net is not None:
            return self.net(losses, frequencies)
        return 1 / frequencies if self.rule == "class-frequency" else torch.ones_like(losses)

    def predict(self, params: Params, images: Tensor) -> Tensor:
        outputs: Tensor = bl.nn.functional_call(self.module, params, (images,))
        return outputs

    @torch.no_grad()
    def outputs(self, indices: Tensor, params: Params | None = None) -> Tensor:
        """Logits of the trained classifiers, or of those with ``params``, in chunks, ``[R, n, C]``."""
        params = self.params if params is None else params
        return torch.cat([self.predict(params, self.drawn.images[part]) for part in indices.split(CHUNK, 1)], 1)

    def keep_best(self) -> Tensor:
        """Validation accuracies ``[R]``; each repeat keeps its parameters of the best one, the latest of equals."""
        chosen = self.drawn.validation
        right = (self.outputs(chosen).argmax(-1) == self.drawn.classes[chosen]).float().mean(1).cpu()
        better = right >= self.best_validation
        self.best_validation = torch.where(better, right, self.best_validation)
        for name, value in self.params.items():
            mask = better.to(value.device).view(-1, *[1] * (value.dim() - 1))
            self.best[name] = torch.where(mask, value.detach(), self.best[name])
        return right

    def state(self) -> dict[str, Any]:
        """See `Training`."""
        state = {
            "step": self.step,
            "params": {name: value.detach() for name, value in self.params.items()},
            "best": self.best,
            "best_validation": self.best_validation,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        if self.net is not None:
            state["net"] = {name: value.detach() for name, value in self.net.params.items()}
            state["meta_optimizer"] = self.meta_optimizer.state_dict()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """See `Training`."""
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(state["params"][name])
                self.best[name].copy_(state["best"][name])
            if self.net is not None:
                for name, value in self.net.params.items():
                    value.copy_(state["net"][name])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.net is not None:
            restore_optimizer(self.meta_optimizer, state["meta_optimizer"])
        self.step, self.best_validation = state["step"], state["best_validation"]
        self.generator.set_state(state["generator"])
