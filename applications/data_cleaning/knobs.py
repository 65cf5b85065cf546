"""What can be chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from applications.data_cleaning.cleaning import SETTINGS
from applications.data_cleaning.model import ModelName
from applications.frame.command import DataKnobs, Purposes, SolverKnobs, require, require_at_least_one
from applications.frame.tune import rehearse_minimum


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """Hyper-cleaning: learn on clean validation data what weight each training example deserves; find wrong labels."""

    setting: Literal["cleaning", "stochastic"] = "cleaning"
    """Implicit differentiation beside its baselines, or (one seed) the methods on mini-batches, error against time."""
    model: ModelName = "softmax"
    """Softmax regression, or a network of one hidden layer."""
    hidden: int = 32
    """Units of that layer."""
    noise: float = 0.5
    """Part of the training labels that become wrong."""
    num_train: int | None = None
    """By default 5,000 of MNIST (20,000 with --setting stochastic), a third of other data."""
    num_val: int | None = None
    """By default 5,000 of MNIST, a third of other data."""
    repeats: int = 3
    """Seeds, from --seed on; the tables have means over them, the pictures the first."""
    steps: int = 40
    """Outer steps."""
    lr: float = 0.3
    """Step size of Adam on the weights' logits."""
    ridge: float = 1e-2
    """L2 penalty while the weights are learned."""
    fit_ridge: float = 1e-3
    """L2 penalty of the models whose accuracy is told, baselines too."""
    seconds: float = 2.0
    """Processor time of each curve with --setting stochastic; tuning a method's step sizes takes as much again."""

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        return {
            "--setting cleaning": (self.setting == "cleaning", ("repeats", "steps", "fit_ridge")),
            "--setting stochastic": (self.setting == "stochastic", ("seconds",)),
            "the network; add its --model": (self.model != "softmax", ("hidden",)),
        }

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        rehearse_minimum({**SETTINGS, **settings})

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "steps", "repeats", "fit_ridge"

    def check(self) -> None:
        require_at_least_one(self, "hidden", "repeats", "steps", "num_train", "num_val")
        require(0 <= self.noise < 1, f"--noise is {self.noise}: a part of the labels, from 0 to below 1.")
        require(0 < self.lr < math.inf, f"--lr is {self.lr}: a positive step size is needed.")
        require(0 < self.seconds < math.inf, f"--seconds is {self.seconds}: a positive time is needed.")
        require(self.solver is None or self.setting == "cleaning", "--solver is of --setting cleaning.")
        softmax = self.setting == "cleaning" or self.model == "softmax"
        require(softmax, f"--model {self.model}: --setting stochastic is of softmax regression. Leave it out.")
        for name in ("ridge", "fit_ridge"):
            value = getattr(self, name)
            positive = 0 < value < math.inf
            require(positive, f"--{name.replace('_', '-')} is {value}: the fits need a positive penalty.")
