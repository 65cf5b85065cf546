"""Stochastic methods on mini-batches: settings that suit regressions, and what draws the batches that each wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bilevel import stochastic

BATCHES = 8
"""Mini-batches that each data set is cut into for the stochastic methods."""

NEUMANN: dict[str, Any] = {"num_terms": 10}
RARE: dict[str, Any] = {"num_inner_steps": 5}
STOCHASTIC: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "SOBA": (stochastic.SOBA, 1.0, {}),
    "SABA": (stochastic.SABA, 1.0, {"inner_batches": BATCHES, "outer_batches": BATCHES}),
    "SRBA": (stochastic.SRBA, 4.0, {"period": BATCHES}),
    "FSLA": (stochastic.FSLA, 1.0, {"mixing": 0.1}),
    "MA-SOBA": (stochastic.MASOBA, 1.0, {"mixing": 0.1}),
    "SPABA": (stochastic.SPABA, 4.0, {"probability": 1 / BATCHES}),
    "AmIGO": (stochastic.AmIGO, 4.0, {**RARE, "num_linear_steps": 5}),
    "stocBiO": (stochastic.StocBiO, 4.0, {**RARE, **NEUMANN}),
    "BSA": (stochastic.BSA, 1.0, {**RARE, **NEUMANN}),
    "TTSA": (stochastic.TTSA, 1.0, NEUMANN),
    "MRBO": (stochastic.MRBO, 4.0, {**NEUMANN, "mixing": 0.5}),
    "SUSTAIN": (stochastic.SUSTAIN, 1.0, {**NEUMANN, "mixing": 0.5}),
    "VRBO": (stochastic.VRBO, 4.0, {**NEUMANN, "num_inner_steps": 3, "period": BATCHES}),
    "F2SA": (stochastic.F2SA, 4.0, {**RARE, "penalty": 10.0}),
    "BOME": (stochastic.BOME, 0.0, {"num_inner_steps": 10}),
}
"""Class, outer step as a multiple of the task's, settings: from a coarse search over powers of 4 on penalties alone."""


class Batches:
    """A data set of each level cut into fixed batches, drawn uniformly; each method is given what it asks for.

    Args:
        num_outer: samples of the outer data set, where it has not as many as the inner one.
    """

    def __init__(self, num_samples: int, num_batches: int, seed: int = 0, num_outer: int | None = None):
        self.random = torch.Generator().manual_seed(seed)
        self.inner: Sequence[Any]
        self.outer: Sequence[Any]
        self.inner, self.outer = (
            torch.randperm(size, generator=self.random).tensor_split(num_batches)
            for size in (num_samples, num_outer or num_samples)
        )
        self.num_batches = num_batches

    def step(self, method: stochastic.Stochastic) -> float:
        """One step; returns its cost: gradients and products, in passes over a whole data set."""
        if isinstance(method, stochastic.SABA):
            i, j = self._pick(self.inner), self._pick(self.outer)
            record = method.step(self.inner[i], self.outer[j], inner_index=i, outer_index=j)
            return (record.gradients + record.products) / self.num_batches
        full = method.wants_full_batch
        inner: list[Any] = [self.inner[self._pick(self.inner)] for _ in range(method.inner_draws)]
        outer: list[Any] = [self.outer[self._pick(self.outer)] for _ in range(method.outer_draws)]
        if full:
            inner[0] = outer[0] = None
        record = method.step(stochastic.Draws(inner), stochastic.Draws(outer))
        cost = (record.gradients + record.products) / self.num_batches
        if full:  # gradients of both losses and the products of one estimate, at the price of all the data
            terms = method.num_terms if isinstance(method, stochastic.VRBO) else 0
            cost += (3 + terms) * (1 - 1 / self.num_batches)
        return cost

    def _pick(self, batches: Sequence[Any]) -> int:
        return int(torch.randint(len(batches), (), generator=self.random))
