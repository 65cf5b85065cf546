"""Gradient descent on log-penalties that finds its own step size, as a training that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from applications.sparse_regression.criterion import Criterion, Evaluation

FIRST_MOVE, LARGEST_MOVE, SMALLEST_MOVE = 0.5, 1.0, 1e-3
"""Change of a log-penalty in one step: at the first, at any, and where the descent ends."""
SMALLEST_GAIN = 1e-4
"""Part of the objective by which a step has to lower it, for the descent to go on."""
FLOOR = 1e-4
"""Penalties stay above this part of where they start: below it, nothing more is gained."""
STATE = ("point", "trial", "step", "rate", "ended", "path")


class Descent:
    """``x <- x - rate * gradient``, with the rate of Barzilai and Borwein (1988) for the next step.

    The criterion is smooth only between changes of the support, so a step that does not lower the objective is taken
    back and its rate divided by three. It ends where no log-penalty would move by `SMALLEST_MOVE`, at a step that gains
    less than `SMALLEST_GAIN`, or where ``steps`` evaluations are made.

    Attributes:
        point: the best log-penalties so far. at: their evaluation; None before the first.
        path: the log-penalties of every evaluation.
    """

    def __init__(self, criterion: Criterion, start: Tensor, steps: int):
        self.criterion, self.steps = criterion, steps
        self.floor = start + math.log(FLOOR)
        self.point, self.trial = start, start
        self.at: Evaluation | None = None
        self.step, self.rate, self.ended = 0, 0.0, False
        self.path: list[Tensor] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        while self.step < self.steps and not self.ended:
            new = self.criterion(self.trial, None if self.at is None else self.at.coefficients)
            self.step += 1
            self.path.append(self.trial)
            if self.at is None:
                self.rate = FIRST_MOVE / max(new.gradient.abs().max().item(), 1e-300)
                self.at = new
            elif new.objective < self.at.objective:
                self.rate = self._longer(new)
                self.ended = self.at.objective - new.objective < SMALLEST_GAIN * abs(new.objective)
                self.point, self.at = self.trial, new
            else:
                self.rate /= 3
            move = (self.rate * self.at.gradient).clamp(-LARGEST_MOVE, LARGEST_MOVE)
            self.trial = torch.maximum(self.point - move, self.floor)
            self.ended |= (self.trial - self.point).abs().max().item() < SMALLEST_MOVE
            yield {
                "step": self.step,
                "criterion": new.criterion,
                "best": self.at.criterion,
                "objective": new.objective,
                "smallest": self.path[-1].min().exp().item(),
                "largest": self.path[-1].max().exp().item(),
                "support": new.support,
            }

    def state(self) -> dict[str, Any]:
        at = None if self.at is None else vars(self.at)
        return {name: getattr(self, name) for name in STATE} | {"at": at}

    def restore(self, state: dict[str, Any]) -> None:
        if state["point"].shape != self.point.shape:
            raise ValueError(f"{len(state['point'])} penalties, not {len(self.point)}")
        for name in STATE:
            setattr(self, name, state[name])
        self.at = None if state["at"] is None else Evaluation(**state["at"])

    def _longer(self, new: Evaluation) -> float:
        """``s's / s'd`` for the step s and the change d of the gradient; twice as long where it curves downwards."""
        assert self.at is not None
        s, d = self.trial - self.point, new.gradient - self.at.gradient
        curvature = torch.dot(s, d).item()
        return torch.dot(s, s).item() / curvature if curvature > 0 else 2 * self.rate


def run(descent: Descent) -> Descent:
    """To its end, without a run folder."""
    for _ in descent.rows():
        pass
    return descent
