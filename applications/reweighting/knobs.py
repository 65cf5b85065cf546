"""What can be chosen, and what follows from it: training sets, classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from applications.frame.command import DataKnobs, Purposes, SolverKnobs, require, require_each_once
from applications.frame.data import Examples
from applications.frame.device import select_device
from applications.reweighting.drawing import Drawn, Problem, draw
from applications.reweighting.networks import Mlp, ResNet32
from applications.reweighting.train import ClassifierTraining, Rule, Settings
from applications.reweighting.weighting import Inputs, Method, rehearse


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """Loss weights learned by a small network (Meta-Weight-Net), on long-tailed and on noisy labels."""

    data: str = "digits"
    """digits, mnist, cifar10, another set that ships with scikit-learn, or a .npz file."""
    problems: tuple[Problem, ...] = ("long-tail", "noise")
    """What is wrong with the training set."""
    methods: tuple[Method, ...] = ("unroll",)
    """Hypergradients of the weight net, one row each: unroll, one-step, sama, neumann, cg."""
    imbalance: float = 50.0
    """Long tail: largest class over smallest."""
    long_tail_inputs: Inputs = "loss-and-class"
    """Long tail: what the weight net sees; the loss tells little of how rare a class is, once learned by heart."""
    noise: float = 0.4
    """Noise: part of the labels that are drawn anew."""
    repeats: int = 5
    """Training sets, of which the tables give means."""
    meta_per_class: int = 10
    """Clean examples of each class that the weight net learns on."""
    validation_per_class: int = 15
    """Clean examples of each class that choose the step to stop at."""
    test_per_class: int = 40
    """Where the data set has no published test set."""
    model: Literal["mlp", "resnet32"] = "mlp"
    """The classifier; ResNet-32 takes colour images of 32 x 32."""
    hidden: int = 100
    """Units of the one hidden layer of the mlp."""
    steps: int = 600
    """Steps of each classifier."""
    batch: int = 100
    """Examples of a step, and of a step of the weight net."""
    lr: float = 0.05
    """Step size of the classifier."""
    momentum: float = 0.9
    """Momentum of the classifier."""
    weight_decay: float = 5e-4
    """Weight decay of the classifier."""
    meta_lr: float = 3e-3
    """Step size of the weight net."""
    warm_up: int = 100
    """Steps before the weight net learns."""
    focal_gamma: float = 1.0
    """Exponent of the focal loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    solver_settings = ("hypergrad", "meta_lr")

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        return {
            "--problems long-tail": ("long-tail" in self.problems, ("imbalance", "long_tail_inputs")),
            "--problems noise": ("noise" in self.problems, ("noise",)),
            "--model mlp": (self.model == "mlp", ("hidden",)),
        }

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        if "hypergrad" in settings:
            rehearse(settings["hypergrad"])

    def replaced(self) -> Mapping[str, Collection[str]]:
        """See `SolverKnobs`."""
        return {"meta_lr": ("meta_lr",)}

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "steps", "focal_gamma"

    def check(self) -> None:
        """See `Knobs`."""
        for name in ("repeats", "meta_per_class", "validation_per_class", "test_per_class", "hidden", "steps", "batch"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} is {getattr(self, name)}: at least 1.")
        alone = self.solver is None or self.methods == ("unroll",)
        require(alone, "--solver says which hypergradient: leave --methods out.")
        for name in ("lr", "meta_lr"):
            require(0 < getattr(self, name) < 10, f"--{name.replace('_', '-')} is {getattr(self, name)}: in (0, 10).")
        require(self.imbalance >= 1, f"--imbalance is {self.imbalance}: largest over smallest class, at least 1.")
        require(0 <= self.noise < 1, f"--noise is {self.noise}: the part of the labels drawn anew, in [0, 1).")
        require(self.warm_up >= 0, f"--warm-up is {self.warm_up}: not negative.")
        learns = self.warm_up < self.steps
        require(learns, f"--warm-up is {self.warm_up}: fewer than --steps {self.steps}, or no weight is ever learned.")
        require(0 <= self.momentum < 1, f"--momentum is {self.momentum}: in [0, 1).")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}: not negative.")
        require(self.focal_gamma >= 0, f"--focal-gamma is {self.focal_gamma}: not negative.")
        require_each_once(self, "problems", "methods")
        select_device(self.device)

    @property
    def settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})


def draw_for(knobs: Config, examples: Examples, problem: Problem) -> Drawn:
    return draw(
        examples,
        problem,
        repeats=knobs.repeats,
        imbalance=knobs.imbalance,
        noise=knobs.noise,
        meta_per_class=knobs.meta_per_class,
        validation_per_class=knobs.validation_per_class,
        test_per_class=knobs.test_per_class,
        seed=knobs.seed,
    )


def check_model(knobs: Config, examples: Examples) -> None:
    fits = knobs.model == "mlp" or (examples.image is not None and examples.image[1:] == (32, 32))
    require(fits, f"--model {knobs.model} takes images of 32 x 32; {examples.name} has none. Use --model mlp.")


def classifier(knobs: Config, examples: Examples) -> Callable[[], nn.Module]:
    """Makes one with random parameters."""
    if knobs.model == "resnet32":
        assert examples.image is not None
        return partial(ResNet32, examples.num_classes, examples.image[0])
    return partial(Mlp, examples.features.shape[1], knobs.hidden, examples.num_classes)


def training(
    knobs: Config, examples: Examples, problem: Problem, drawn: Drawn, rule: Rule, settings: Mapping[str, Any]
) -> ClassifierTraining:
    """The classifiers of one rule.

    Args:
        settings: ``hypergrad`` and ``meta_lr`` of the weight net, in place of the knobs'.
    """
    inputs: Inputs = knobs.long_tail_inputs if problem == "long-tail" else "loss"
    own = dataclasses.replace(knobs.settings, meta_lr=settings.get("meta_lr", knobs.meta_lr))
    return ClassifierTraining(classifier(knobs, examples), drawn, rule, own, inputs, settings.get("hypergrad"))
