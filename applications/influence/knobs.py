"""What can be chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from applications.frame.command import DataKnobs, Knobs, require, require_at_least_one


@dataclass(frozen=True)
class Config(DataKnobs, Knobs):
    """Influence: which training images made a prediction, what leaving some out does, which labels are wrong."""

    num_train: int = 500
    """Training examples."""
    num_queries: int = 100
    """Test examples whose losses are explained."""
    noise: float = 0.1
    """Part of the training labels that become wrong."""
    hidden: int = 16
    """Units of the network's hidden layer; 0: softmax regression."""
    decay: float = 1e-2
    """L2 penalty: ``decay / 2 * |params|^2``."""
    subsets: int = 20
    """Trainings without a random part of the examples, which the predictions are held against."""
    left_out: float = 0.1
    """That part."""

    def check(self) -> None:
        require_at_least_one(self, "num_train", "num_queries")
        require(self.subsets >= 2, f"--subsets is {self.subsets}: a rank correlation needs two at least.")
        require(self.hidden >= 0, f"--hidden is {self.hidden}: 0 units or more.")
        require(0 <= self.noise < 1, f"--noise is {self.noise}: a part of the labels, from 0 to below 1.")
        require(0 < self.left_out < 1, f"--left-out is {self.left_out}: a part of the examples, above 0 and below 1.")
        left = self.num_train - max(1, round(self.left_out * self.num_train))
        require(left >= 1, f"--left-out {self.left_out} leaves none of {self.num_train} examples to train on.")
        require(0 < self.decay < math.inf, f"--decay is {self.decay}: a positive penalty is needed.")
