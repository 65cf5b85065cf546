"""Workload B: one hypergradient of classic hyperparameter optimization, a penalty for every feature of a classifier."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy.sparse.linalg
import torch
from scipy.special import log_softmax, softmax

import bilevel as bl
from applications.measurements.benchmarks.contest import Contestant, Workload
from applications.measurements.benchmarks.hyperparameters_task import RTOL, Data, objective
from applications.measurements.benchmarks.peers_hyperparameters import contestants
from bilevel import files

GTOL = 1e-4
"""Tolerance of the inner problem, which is solved once for all of them."""
MEAN_LOG_PENALTY, SPREAD_LOG_PENALTY, STRENGTH = -2.0, 0.75, 3.0
"""How the problem is drawn; see `Hyperparameters`."""


@dataclass(frozen=True)
class Hyperparameters(Workload):
    """Softmax regression on standard normal features with labels drawn from a random linear model.

    Inner loss: mean cross-entropy + 1/2 sum_f exp(log_penalty_f) sum_c W_cf^2. Outer: mean cross-entropy of half as
    many validation examples. The log-penalties are normal: their mean of -2 is the whole number whose validation loss
    is least, where a search for hyperparameters spends its time; their standard deviation of 0.75 is about as large as
    plain CG can take: it needs 34 steps at 5,000 x 2,000, and all of its 50 at 20,000 x 10,000.

    W is stored as `torch.nn.Linear` stores it, ``[classes, features]``, for every contestant: products with the other
    layout are several times slower in PyTorch.

    Args:
        num_examples, num_features: of the training set.
        seed: of everything that is drawn.
    """

    num_examples: int = 5000
    num_features: int = 2000
    num_classes: int = 10
    seed: int = 0

    letter: ClassVar[str] = "B"
    tolerance: ClassVar[float | None] = 1e-5

    def title(self) -> str:
        """See `Workload`."""
        return (
            f"B: one hypergradient towards {self.num_features:,} log-penalties, softmax regression "
            f"{self.num_examples:,} x {self.num_features:,}, {self.num_classes} classes, CG to {RTOL:g}"
        )

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return contestants(self.data)

    def data(self) -> Data:
        """The same bits in every process: what rounding could change is drawn and solved once, and kept in a file."""
        random = np.random.default_rng(self.seed)
        x_train, x_val = (
            random.standard_normal((count, self.num_features), dtype=np.float32)
            for count in (self.num_examples, self.num_examples // 2)
        )
        spread = SPREAD_LOG_PENALTY * random.standard_normal(self.num_features, dtype=np.float32)
        log_penalties = np.float32(MEAN_LOG_PENALTY) + spread
        path = self.cache()
        if not path.exists():
            y_train, y_val = self._labels(random, x_train, x_val)
            found = solve(x_train, y_train, log_penalties, self.num_classes)
            kept = {"y_train": y_train, "y_val": y_val, "solution": found}
            files.write_atomically(path, lambda file: np.savez(file, **kept))  # type: ignore[arg-type]
        with np.load(path) as kept_arrays:
            y_train, y_val, found = (kept_arrays[name] for name in ("y_train", "y_val", "solution"))
        return Data(x_train, y_train, x_val, y_val, log_penalties, found)

    def cache(self) -> Path:
        """Where labels and solution are kept; the name holds all that they depend on."""
        sizes = f"{self.num_examples}x{self.num_features}x{self.num_classes}-seed{self.seed}"
        drawn = f"{MEAN_LOG_PENALTY:g}_{SPREAD_LOG_PENALTY:g}_{STRENGTH:g}-gtol{GTOL:g}"
        return Path(tempfile.gettempdir()) / "bilevel-benchmarks" / f"hyperparameters-{sizes}-{drawn}.npz"

    def _labels(self, random: np.random.Generator, *features: np.ndarray) -> list[np.ndarray]:
        truth = random.standard_normal((self.num_classes, self.num_features), dtype=np.float32)
        truth *= np.float32(STRENGTH / self.num_features**0.5)
        scores = [x @ truth.T for x in features]
        return [(score + random.gumbel(size=score.shape)).argmax(1) for score in scores]

    def reference(self) -> np.ndarray:
        """See `Workload`: float64, NumPy and SciPy only, at the same W."""
        data = self.data()
        return -np.exp(data.log_penalties.astype(np.float64)) * (data.solution * _adjoint(data)).sum(0)


def solve(x: np.ndarray, y: np.ndarray, log_penalties: np.ndarray, num_classes: int) -> np.ndarray:
    """W at gradient norm `GTOL`."""
    args = [torch.from_numpy(array) for array in (log_penalties, x, y)]
    start = torch.zeros(num_classes, x.shape[1])
    fit = bl.argmin(objective, start, *args, solver=bl.LBFGS(gtol=GTOL), hypergrad=None, throw="raise")
    return fit.value.numpy()


def _adjoint(data: Data) -> np.ndarray:
    """``H^{-1}`` times the gradient of the validation loss, by CG to 1e-12."""
    params = data.solution.astype(np.float64)
    penalties = np.exp(data.log_penalties.astype(np.float64))
    right = _gradient(params, data.x_val, data.y_val)
    x = data.x_train.astype(np.float64)
    p = softmax(params @ x.T, 0)

    def product(v: np.ndarray) -> np.ndarray:
        moved = p * (v.reshape(params.shape) @ x.T)
        moved -= p * moved.sum(0)
        return (moved @ x / len(x) + penalties * v.reshape(params.shape)).ravel()

    def precondition(r: np.ndarray) -> np.ndarray:
        return (r.reshape(params.shape) / data.diagonal()).ravel()

    operator, inverse = (
        scipy.sparse.linalg.LinearOperator((params.size, params.size), matvec=made, dtype=np.float64)
        for made in (product, precondition)
    )
    found, failed = scipy.sparse.linalg.cg(operator, right.ravel(), rtol=1e-12, maxiter=1000, M=inverse)
    if failed:
        raise RuntimeError("The reference did not converge to 1e-12.")
    return found.reshape(params.shape)


def _gradient(params: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gradient of the mean cross-entropy."""
    x = features.astype(np.float64)
    p = np.exp(log_softmax(params @ x.T, 0))
    p[labels, np.arange(len(x))] -= 1
    return p @ x / len(x)
