"""What can be chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from applications.frame.command import DataKnobs, Purposes, SolverKnobs, require, require_at_least_one
from applications.frame.tune import rehearse_minimum
from applications.regularization import augmentation, features, weights


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """Learn a penalty for each feature, a weight decay for each weight, or the strength of data augmentation."""

    problem: Literal["all", "features", "weights", "augmentation"] = "all"
    """Which of the three; all one after the other."""
    data: str = "embedded"
    """Documentation texts for features, scikit-learn's digits for the others; or digits, mnist, 20newsgroups (features
    only), another name, or a file of examples (see applications/frame/data)."""
    train: int = 0
    """Training examples; 0: a quarter of all for features, at most 5,000; 50 for weights; 200 for augmentation."""
    validation: int = 0
    """Validation examples; 0: a quarter of all for features, at most 5,000; 50 for weights; 500 for augmentation."""
    steps: int = 0
    """Outer steps; 0: 12 for features and weights, 60 for augmentation."""
    hidden: int = 1000
    """Units of each hidden layer, for weights: 1,000 are a million weights."""

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        return {"--problem weights": (self.problem in ("all", "weights"), ("hidden",))}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        own = {"features": features.SETTINGS, "weights": weights.SETTINGS, "augmentation": augmentation.SETTINGS}
        rehearse_minimum({**own[self.problem], **settings})

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return () if self.problem == "weights" else ("steps",)

    def check(self) -> None:
        for name in ("train", "validation", "steps"):
            value = getattr(self, name)
            require(value >= 0, f"--{name} is {value}: it is a number of them, or 0 for the default.")
        require_at_least_one(self, "hidden")
        require(
            not (self.data == "20newsgroups" and self.problem != "features"),
            "--data 20newsgroups is text, for penalties of features: add --problem features.",
        )
        require(
            self.solver is None or self.problem != "all",
            "--solver has settings for one of the three: add the --problem that they were tuned on.",
        )
