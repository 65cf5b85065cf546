"""A solver of benchopt's benchmark_bilevel: our stochastic methods, with the parameters that its own solvers have.

    python -m benchopt run CHECKOUT -d simulated -s applications/measurements/benchmark_bilevel/solver.py -s SOBA

from the root of this repository, where ``applications`` can be imported; README.md says more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion

from applications.frame.mini_batches import STOCHASTIC, Batches
from applications.measurements.benchmark_bilevel.bridge import JaxLoss, Loss, to_jax, to_torch
from bilevel import SolveError, stochastic

PATIENCE = 12_800
"""Evaluations without progress after which a run ends, as for the benchmark's own solvers."""

CONSTANT = ("SABA", "SRBA", "SPABA", "VRBO")
"""Methods whose variance vanishes: their step sizes stay, those of others decay by the root of the step number."""


class Slices(Batches):
    """The batches of the benchmark: slices of the data, each by where it begins."""

    def __init__(self, num_samples: tuple[int, int], batch_sizes: tuple[int, int], seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.inner, self.outer = (
            [size * index for index in range(math.ceil(count / size))]
            for count, size in zip(num_samples, batch_sizes, strict=True)
        )
        self.num_batches = max(len(self.inner), len(self.outer))


class Solver(BaseSolver):
    """The stochastic methods of `bilevel`, in PyTorch, on losses that JAX evaluates."""

    name = "bilevel"
    requirements = ("pip::torch", "jax")
    stopping_criterion = SufficientProgressCriterion(patience=PATIENCE, strategy="callback")
    parameters = {  # noqa: RUF012 - the name and kind are benchopt's
        "method": ["SOBA"],
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        "eval_freq": [128],
        "random_state": [1],
    }

    def set_objective(
        self,
        f_inner: JaxLoss,
        f_outer: JaxLoss,
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: Any,
        outer_var0: Any,
    ) -> None:
        """What the benchmark's objective gives: losses on slices, numbers of samples, and the start."""
        self.num_samples = n_inner_samples, n_outer_samples
        full = self.batch_size == "full"
        self.batch_sizes = self.num_samples if full else (self.batch_size, self.batch_size)
        pairs = zip((f_inner, f_outer), self.batch_sizes, self.num_samples, strict=True)
        self.losses = tuple(Loss(loss, size, count) for loss, size, count in pairs)
        self.start = inner_var0, outer_var0
        self.run_once(2)  # compiles, off the clock

    @staticmethod
    def get_next(stop_val: int) -> int:
        """Evaluations follow each other at ``eval_freq`` steps."""
        return stop_val + 1

    def run(self, callback: Callable[[], bool]) -> None:
        """As many steps as the runner asks for; the iterates stay where they were where steps are too long."""
        self.inner_var, self.outer_var = self.start
        batches = Slices(self.num_samples, self.batch_sizes, self.random_state)
        params, hparams = (to_torch(tree) for tree in self.start)
        method = self._method(params, hparams, batches)
        while callback():
            try:
                for _ in range(self.eval_freq):
                    batches.step(method)
            except SolveError as error:
                print(f"{self.method} stopped: {error}")
                return
            self.inner_var, self.outer_var = to_jax(params), to_jax(hparams)

    def get_result(self) -> dict[str, Any]:
        """The iterates, for the objective's metrics."""
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}

    def _method(self, params: Any, hparams: Any, batches: Slices) -> stochastic.Stochastic:
        kind, _, settings = STOCHASTIC[self.method]
        period = len(batches.inner) + len(batches.outer)
        own: dict[str, dict[str, Any]] = {
            "SABA": {"inner_batches": len(batches.inner), "outer_batches": len(batches.outer)},
            "SRBA": {"period": max(1, period // 2)},
            "VRBO": {"period": max(1, period // 2)},
            "SPABA": {"probability": 2 / max(2, period)},
        }
        power = 0.0 if self.method in CONSTANT else 0.5
        sizes = {
            "inner_lr": stochastic.Decay(self.step_size, power),
            "outer_lr": stochastic.Decay(self.step_size / self.outer_ratio, power),
        }
        method: stochastic.Stochastic = kind(
            params, hparams, *self.losses, **{**settings, **own.get(self.method, {}), **sizes}
        )
        return method
