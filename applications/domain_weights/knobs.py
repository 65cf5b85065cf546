"""What can be chosen, and the trainings that follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from applications.domain_weights.corpus import TEXTS, Corpus, read
from applications.domain_weights.learning import METHODS, Method, rehearse
from applications.domain_weights.train import MixtureTraining, Settings
from applications.frame.command import (
    SolverKnobs,
    require,
    require_at_least_one,
    require_each_once,
    require_positive,
)
from applications.frame.device import select_device
from applications.frame.options import option


@dataclass(frozen=True)
class Config(SolverKnobs):
    """Weights for the domains of a text corpus: learned for a small transformer on a few pages of the text that counts.

    Under torchrun the windows of each step are shared out among the ranks, and the run is that of one process.
    """

    texts: Path | None = None
    """Folder of .txt files in UTF-8, one a domain and one the target; by default the texts that ship."""
    target: str = "sonnets"
    """The text that counts, by the name of its file without .txt."""
    validation: float = 0.15
    """The part of the target that weights are chosen by, from its begin; the rest is the test."""
    methods: tuple[Method, ...] = ("implicit", "sama", "penalty")
    """Hypergradients that the weights are learned by, one row each."""
    steps: int = 600
    """Steps of each transformer whose test loss is told."""
    learn_steps: int = 200
    """Steps of the transformer that weights are learned along with."""
    mixtures: int = 20
    """Mixtures that Optuna tries."""
    short_steps: int = 100
    """Steps of the transformer of each of them, and of those that are trained on one domain alone."""
    context: int = 32
    """Characters that the transformer sees."""
    width: int = 32
    """Its width."""
    heads: int = 4
    """Its attention heads."""
    layers: int = 2
    """Its layers."""
    batch: int = 16
    """Windows of a step."""
    lr: float = 3e-3
    """Step size of Adam, which falls to 0 by a cosine."""
    outer_batch: int = 8
    """Windows of each domain, and of the target, in a step of the weights."""
    outer_lr: float = 0.1
    """Step size of Adam on the scores, whose softmax the weights are."""
    warm_up: int = 50
    """Steps before the weights learn."""
    every: int = 5
    """Steps of the transformer for one of the weights."""
    precision: Literal["float32", "float64"] = "float32"
    """Floating-point numbers of all that is computed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    solver_settings = ("hypergrad", "outer_lr")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        if "hypergrad" in settings:
            rehearse(settings["hypergrad"])

    def replaced(self) -> Mapping[str, Collection[str]]:
        """See `SolverKnobs`."""
        return {"outer_lr": ("outer_lr",)}

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "steps", "learn_steps", "mixtures", "short_steps", "warm_up"

    def check(self) -> None:
        """See `Knobs`."""
        counts = ("steps", "learn_steps", "mixtures", "short_steps", "context", "width", "heads", "layers", "batch")
        require_at_least_one(self, *counts, "outer_batch", "every")
        require_positive(self, "lr", "outer_lr")
        require(self.width % self.heads == 0, f"--width is {self.width}: a multiple of --heads {self.heads} is needed.")
        require(0 < self.validation < 1, f"--validation is {self.validation}: a part of the target, in (0, 1).")
        require(self.warm_up < self.learn_steps, f"--warm-up is {self.warm_up}: fewer than --learn-steps are needed.")
        first = math.ceil(self.warm_up / self.every) * self.every
        require(
            first < self.learn_steps,
            f"--every is {self.every}: after {self.warm_up} steps of --warm-up the weights would learn at step {first} "
            f"first, and --learn-steps is {self.learn_steps}.",
        )
        require_each_once(self, "methods")
        alone = self.solver is None or self.methods == Config.methods
        require(alone, "--solver says which hypergradient: leave --methods out.")
        select_device(self.device)

    def check_ranks(self, ranks: int) -> None:
        """Refuse more ranks than windows; before there is a group, nobody knows how many they are."""
        for name in ("batch", "outer_batch"):
            size = getattr(self, name)
            require(size >= ranks, f"{option(name)} is {size} for {ranks} ranks: one window for each at least.")

    @property
    def settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})

    def hypergrads(self, settings: dict[str, Any]) -> dict[str, Any]:
        """By name; that of ``--solver`` alone, where it was given."""
        if "hypergrad" in settings:
            return {"tuned": settings["hypergrad"]}
        return {method: METHODS[method] for method in self.methods}

    def read(self) -> Corpus:
        """The texts, checked.

        Raises:
            UserError: see `corpus.read`.
        """
        decoy = "plays" if self.texts is None else None
        return read(self.texts or TEXTS, self.target, decoy, self.validation, self.context, self.seed)


def training(
    knobs: Config, corpus: Corpus, steps: int, scores: Tensor, hypergrad: Any = None, **settings: Any
) -> MixtureTraining:
    """One of the trainings of a run; ``settings`` in place of those of the knobs."""
    own = dataclasses.replace(knobs.settings, **settings)
    return MixtureTraining(corpus, own, steps, scores, hypergrad, select_device(knobs.device))
