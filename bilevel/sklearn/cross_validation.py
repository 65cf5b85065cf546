"""The cross-validation loss and its hypergradient, and the descent on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning

from ..notices import tell
from .folds import Folds, on_cpu
from .models import Predict
from .space import Space

LINE_SEARCH = 8
"""Evaluations along one direction at most: where the loss has kinks, more find nothing."""

PLACES = 5
"""Places across the bounds that are looked at where the loss is flat at the first start."""


@dataclass(frozen=True)
class Evaluation:
    """The cross-validation loss at one place.

    Attributes:
        x: search coordinates.
        test_losses, train_losses: of each fold.
        gradient: of the mean test loss, by coordinate.
    """

    x: np.ndarray
    test_losses: np.ndarray
    train_losses: np.ndarray
    gradient: np.ndarray
    seconds: float


@dataclass
class CrossValidation:
    """x to the mean loss over the folds and its hypergradient; it remembers each evaluation.

    Attributes:
        heard: is called with each new evaluation.
    """

    folds: Folds
    space: Space
    predict: Predict
    constants: dict[str, torch.Tensor]
    history: list[Evaluation] = field(default_factory=list)
    heard: Callable[[Evaluation], None] = lambda evaluation: None

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if self.history and np.array_equal(self.history[-1].x, x):
            return float(self.history[-1].test_losses.mean()), self.history[-1].gradient
        found = self.evaluate(x)
        self.history.append(found)
        self.heard(found)
        return float(found.test_losses.mean()), found.gradient

    @on_cpu()
    def evaluate(self, x: np.ndarray) -> Evaluation:
        """The loss and its hypergradient at x, not remembered."""
        begin = time.perf_counter()
        point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        predictions = self.predict({**self.constants, **self.space.tensors(point)})
        losses = self.folds.losses(predictions, self.folds.test)
        (gradient,) = torch.autograd.grad(losses.mean(), point)
        with torch.no_grad():
            train_losses = self.folds.losses(predictions, self.folds.seen)
        seconds = time.perf_counter() - begin
        return Evaluation(x.copy(), losses.detach().numpy(), train_losses.numpy(), gradient.numpy(), seconds)

    def minimize(self, start: np.ndarray, max_iter: int, tol: float) -> int:
        """L-BFGS-B within the bounds; the number of its steps.

        Warns:
            ConvergenceWarning: ``max_iter`` was reached.
        """
        start = self.alive(start, tol)
        _, gradient = self(start)
        # Within bounds L-BFGS-B's first step is the gradient itself: scaled, it is about one in each coordinate.
        scale = np.sqrt(len(start)) / (float(np.linalg.norm(gradient)) or 1.0)

        def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = self(x)
            return scale * loss, scale * gradient

        found = scipy.optimize.minimize(
            scaled,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack(self.space.bounds(), 1),
            options={
                "maxiter": max_iter,
                "ftol": tol / 100,
                "gtol": tol * scale * self.folds.scale(),
                "maxls": LINE_SEARCH,
            },
        )
        if found.nit >= max_iter:
            message = f"The search made {found.nit} steps (max_iter) without converging. Raise max_iter or tol."
            tell(message, ConvergenceWarning)
        return int(found.nit)

    def alive(self, start: np.ndarray, tol: float) -> np.ndarray:
        """The start, or the best place of a few across the bounds where the loss is flat at the first start.

        Such is a Lasso whose penalty leaves no feature, or a kernel so narrow that no example knows another.
        """
        self(start)
        if len(self.history) > 1 or self.norm(self.history[0]) >= tol:
            return start
        low, high = self.space.bounds()
        for share in np.linspace(0, 1, PLACES):
            self(low + share * (high - low))
        return min(self.history, key=lambda e: np.nan_to_num(e.test_losses.mean(), nan=np.inf)).x

    def norm(self, evaluation: Evaluation) -> float:
        """Norm of the projected hypergradient there, with the loss measured in that of the best constant."""
        x, step = evaluation.x, evaluation.gradient / self.folds.scale()
        return float(np.linalg.norm(np.clip(x - step, *self.space.bounds()) - x))
