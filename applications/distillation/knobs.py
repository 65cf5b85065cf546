"""What can be chosen, and the trainings that follow from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from applications.distillation import data
from applications.distillation.distill import Distillation, Schedule
from applications.distillation.inner import CUT_OFF, Inner
from applications.distillation.networks import ConvNet, Linear
from applications.frame.command import DataKnobs, Purposes, SolverKnobs, require, require_at_least_one, require_positive
from applications.frame.tune import rehearse_minimum


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """A few synthetic images, learned so that a network trained on them alone classifies the real ones."""

    data: str = "digits"
    """digits (8 x 8, embedded) or mnist."""
    network: Literal["both", "linear", "convnet"] = "both"
    """What is trained on the images."""
    images_per_class: int = 1
    """Synthetic images of each class."""
    steps: int = 100
    """Outer steps of the images for the linear classifier."""
    lr: float = 0.03
    """Step size of their Adam."""
    l2: float = 1e-3
    """Weight decay of the linear classifier, trained to its minimum."""
    convnet_steps: int = 40
    """Outer steps of the images for the ConvNet."""
    convnet_lr: float = 0.03
    """Step size of their Adam."""
    convnet_l2: float = 0.05
    """Pull of the ConvNet to its initialisation."""
    width: int = 16
    """Channels of the ConvNet."""
    batch: int = 256
    """Real images of an outer step with the ConvNet; the linear classifier sees all."""
    repeats: int = 5
    """Fresh initialisations, and draws of real images, that the tables have the means of."""
    full_steps: int = 600
    """Steps of the ConvNet on batches of all training images, the ceiling."""

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        convnet = ("convnet_steps", "convnet_lr", "convnet_l2", "width", "batch", "full_steps")
        return {
            "the linear classifier": (self.network != "convnet", ("steps", "lr", "l2")),
            "the ConvNet": (self.network != "linear", convnet),
        }

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        rehearse_minimum({**CUT_OFF, **settings})

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "steps", "lr", "l2", "convnet_steps", "repeats", "full_steps"

    def check(self) -> None:
        require_at_least_one(self, "images_per_class", "steps", "convnet_steps", "width", "batch", "full_steps")
        require(self.seed >= 0, f"--seed is {self.seed}: it starts at 0.")
        require(self.repeats >= 2, f"--repeats is {self.repeats}: a mean with its spread needs 2.")
        require(
            self.solver is None or self.network != "linear",
            "--solver is of the ConvNet; the linear classifier is trained to its minimum. Leave --network out.",
        )
        require_positive(self, "lr", "l2", "convnet_lr", "convnet_l2")


def build(
    config: Config, kind: Literal["linear", "convnet"], parts: data.Parts, settings: Mapping[str, Any] | None = None
) -> Inner:
    """The inner problem at its start.

    Args:
        settings: of the ConvNet's solvers, in place of `CUT_OFF`.
    """
    _, channels, height, breadth = parts.train.x.shape
    shape = (channels, height, breadth)
    if kind == "linear":
        return Inner(Linear(shape, parts.num_classes), config.l2)
    network = ConvNet(shape, parts.num_classes, config.width)
    return Inner(network, config.convnet_l2, {**CUT_OFF, **(settings or {})}, gauss_newton=True, throw="ignore")


def distillation(
    config: Config, inner: Inner, parts: data.Parts, fresh: bool, steps: int | None = None
) -> Distillation:
    """Its images start as the class means.

    Args:
        steps: in place of the knobs'.
    """
    linear = isinstance(inner.network, Linear)
    steps = steps or (config.steps if linear else config.convnet_steps)
    schedule = Schedule(
        steps,
        lr=config.lr if linear else config.convnet_lr,
        batch=len(parts.train.y) if linear else config.batch,
        seed=config.seed,
        fresh=fresh,
        warm=linear,
        validate_every=max(1, steps // 30),
    )
    images = data.class_means(parts.train, parts.num_classes, config.images_per_class)
    return Distillation(inner, images, data.labels(parts.num_classes, config.images_per_class), parts, schedule)
