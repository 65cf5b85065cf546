"""What can be chosen, and the trainings that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from applications.command import Knobs, require, require_at_least_one, require_positive
from applications.distillation import data
from applications.distillation.distill import Distillation, Schedule
from applications.distillation.inner import Inner
from applications.distillation.networks import ConvNet, Linear

INNER_STEPS, PRODUCTS = 30, 20
"""Of a ConvNet's training on the images by L-BFGS, and of the solve for its hypergradient."""


@dataclass(frozen=True)
class Config(Knobs):
    """A few synthetic images, learned so that a network trained on them alone classifies the real ones."""

    data: str = "digits"
    """digits (8 x 8, embedded) or mnist."""
    data_root: Path | None = None
    """Folder of MNIST; by default $BILEVEL_DATA, else the cache folder."""
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

    def check(self) -> None:
        require_at_least_one(self, "images_per_class", "steps", "convnet_steps", "width", "batch", "full_steps")
        require(self.seed >= 0, f"--seed is {self.seed}: it starts at 0.")
        require(self.repeats >= 2, f"--repeats is {self.repeats}: a mean with its spread needs 2.")
        require_positive(self, "lr", "l2", "convnet_lr", "convnet_l2")


def build(config: Config, kind: Literal["linear", "convnet"], parts: data.Parts) -> Inner:
    """The inner problem at its start."""
    _, channels, height, breadth = parts.train.x.shape
    shape = (channels, height, breadth)
    if kind == "linear":
        return Inner(Linear(shape, parts.num_classes), config.l2)
    network = ConvNet(shape, parts.num_classes, config.width)
    return Inner(network, config.convnet_l2, INNER_STEPS, PRODUCTS, gauss_newton=True)


def distillation(config: Config, inner: Inner, parts: data.Parts, fresh: bool) -> Distillation:
    """Its images start as the class means."""
    linear = isinstance(inner.network, Linear)
    steps = config.steps if linear else config.convnet_steps
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
