"""Every method with step sizes that suit the two problems, and the batches that each of them wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel import problems, stochastic

Problem = problems.finite_sums.Quadratics | problems.finite_sums.Logistic


@dataclass(frozen=True)
class Tuning:
    """What the two problems need: their curvatures differ, and with them every step size."""

    lr: float
    """Below 1/L for each batch."""
    outer: float
    """The outer step, as a multiple of the inner one."""
    terms: int
    """Terms of the Neumann series, about 2/(lr mu)."""
    barrier: float
    """The first joint step of BOME."""


TUNING: dict[type, Tuning] = {
    problems.finite_sums.Quadratics: Tuning(0.4, 0.5, 40, 0.4),
    problems.finite_sums.Logistic: Tuning(0.5, 8.0, 20, 1.0),
}


def methods(problem: Problem, num_batches: int) -> dict[str, stochastic.Stochastic]:
    """One of each, from the same start, by name."""
    tuning = TUNING[type(problem)]
    lr, outer = tuning.lr, tuning.outer
    decay, s = stochastic.Decay, stochastic
    # Mini-batches without variance reduction: steps of one order until noise counts, then decreasing.
    single: dict[str, Any] = {"inner_lr": decay(lr, 0.5, 200), "outer_lr": decay(outer * lr, 1.0, 200)}
    double: dict[str, Any] = {"inner_lr": decay(lr, 0.5, 200), "outer_lr": decay(1.5 * outer * lr, 1.0, 50)}
    constant: dict[str, Any] = {"inner_lr": lr, "outer_lr": outer * lr / 2}
    neumann: dict[str, Any] = {"num_terms": tuning.terms, "neumann_lr": lr}
    mixing = decay(0.5, 0.66, 20)
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "SOBA": (s.SOBA, single),
        "SABA": (s.SABA, {**constant, "inner_batches": num_batches, "outer_batches": num_batches}),
        "SRBA": (s.SRBA, {**constant, "period": num_batches}),
        "FSLA": (s.FSLA, {**single, "mixing": 0.1}),
        "MA-SOBA": (s.MASOBA, {**single, "mixing": 0.3}),
        "SPABA": (s.SPABA, {**constant, "probability": 1 / num_batches}),
        "AmIGO": (s.AmIGO, {**double, "num_inner_steps": 3, "num_linear_steps": 3}),
        "stocBiO": (s.StocBiO, {**double, **neumann, "num_inner_steps": 3}),
        "BSA": (s.BSA, {**double, **neumann, "num_inner_steps": 3}),
        "TTSA": (s.TTSA, {**single, **neumann}),
        "MRBO": (s.MRBO, {**double, **neumann, "mixing": mixing}),
        "SUSTAIN": (s.SUSTAIN, {**single, **neumann, "mixing": mixing}),
        "VRBO": (s.VRBO, {**constant, **neumann, "outer_lr": outer * lr, "num_inner_steps": 3, "period": num_batches}),
        "F2SA": (s.F2SA, {**single, "penalty": 10.0, "penalty_growth": 0.1, "num_inner_steps": 5}),
        "BOME": (s.BOME, {"inner_lr": lr, "outer_lr": decay(tuning.barrier, 1.0, 50), "num_inner_steps": 40}),
    }
    return {
        name: kind(*problem.start(), problem.inner_loss, problem.outer_loss, **settings)
        for name, (kind, settings) in classes.items()
    }
