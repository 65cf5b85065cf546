"""A second look at what an inner solver found: saddles that it did not leave, objectives that are random."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.jacobian import GraphJacobian
from ..linalg.minres import MINRES
from ..linalg.noise import normal
from ..linalg.operator import Operator, Restricted
from ..problem import Problem
from ..recording import recording
from ..solution import Advice, Result, Solution, marked

PROBES = 5
"""Products that the look at the curvature of a stationary start costs."""

RANDOM_ADVICE = (
    "The objective gives another value each time that it is evaluated at the same params: it is random (dropout, "
    "noise, a batch drawn inside), and line searches and hypergradients need one function. Put modules into eval(), "
    "draw the noise before, or take a stochastic method (bilevel.stochastic)"
)


def suspicious(found: Solution) -> Tensor:
    """Where a solver found a gradient of zero or made no step, and calls it good."""
    stats = found.stats
    return ((stats["num_steps"] == 0) | (stats["residual_norm"] == 0)) & (stats["result"] <= int(Result.STEPS_DONE))


def look_closer(problem: Problem, found: Solution, kept: Tensor | None = None) -> Solution[Tensor]:
    """Give a start that is stationary, but no minimum, its result: nothing moves a solver from there.

    A few products with random vectors tell; only a solve that is `suspicious` is asked.

    Args:
        kept: which params are free to move, ``[*batch, n]``; None: all.
    """
    stats, idle = found.stats, suspicious(found)
    at = problem.linearize(found.value.detach())
    if not any(residual.requires_grad for residual in at.residual):
        return found  # linear: no curvature at all
    hessian: Operator = GraphJacobian(problem.raveler, at, symmetric=True)
    probe = _random(found.value)
    if kept is not None:
        hessian, probe = Restricted(hessian, kept), torch.where(kept, probe, torch.zeros_like(probe))
    curvature = MINRES(max_steps=min(PROBES, hessian.size)).solve(hessian, probe).curvature
    assert curvature is not None
    smallest, largest = curvature
    saddle = idle & (smallest < -(torch.finfo(hessian.dtype).eps ** 0.5) * torch.maximum(largest.abs(), smallest.abs()))
    codes = marked(stats["result"], saddle, Result.NEGATIVE_CURVATURE)
    return found.with_stats(result=codes)


def advice_for(problem: Problem, found: Solution, advice: Advice) -> Advice:
    """What to try after a solve that failed; an objective that is random explains most of it."""
    if recording() or found.result.ok or not bool(torch.isfinite(found.value).all()):
        return advice
    first, second = (problem.evaluate(found.value.detach()) for _ in range(2))
    apart = (first.f - second.f).abs() > torch.finfo(first.g.dtype).eps ** 0.75 * first.f.abs()
    return RANDOM_ADVICE if bool(apart.any()) else advice


def _random(like: Tensor) -> Tensor:
    return normal(like.shape, 0, like.device).to(like.dtype)
