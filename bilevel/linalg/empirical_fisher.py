"""The empirical Fisher matrix in place of the Hessian: positive semi-definite, from gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..closure import Tracer
from ..problem import Linearization, Objective, Problem
from .gauss_newton import Sandwich, check_outputs, free_leaves, hessian_of
from .operator import Operator


@dataclass(frozen=True)
class EmpiricalFisher:
    """``1/n sum_i g_i g_i^T + H_rest`` with the gradient ``g_i`` of the i-th example's loss.

    For log-likelihoods of a well-specified model with much data, where it approaches the Hessian; far from that it can
    mislead (Kunstner, Hennig and Balles 2019), so prefer `GaussNewton`. It has rank n at most: keep a penalty in
    ``rest``, or damp. A product costs about as much as one with the Hessian; neither the matrix nor the gradients of
    single examples are formed.

    Args:
        losses: ``losses(params, *args)``, one for each example: ``[n]``, or ``[T, n]`` of T problems, not reduced.
        rest: ``rest(params, *args)``, the part of the objective whose Hessian is kept exactly, such as the penalty.

    Raises, at the call:
        ValueError: ``losses`` is reduced, does not depend on params, or does not count the T problems.
    """

    losses: Callable[..., Tensor]
    rest: Objective | None = None

    def __call__(self, problem: Problem, at: Linearization) -> Operator:
        free = free_leaves(at)
        with torch.enable_grad(), problem.autocast.evaluating(), Tracer(differentiable=False):
            losses = self.losses(problem.raveler.unflatten(free), *problem.args)
        check_outputs("losses", losses, problem)
        expected = len(problem.raveler.batch_shape) + 1
        if losses.dim() != expected:
            raise ValueError(
                f"losses returned a tensor of shape {tuple(losses.shape)}: one loss for each example is needed, in "
                f"{expected} dimensions. Take reduction='none'."
            )
        rest = None if self.rest is None else hessian_of(problem, free, self.rest)
        return Sandwich(problem, free, [losses], lambda tangents: [tangents[0] / losses.shape[-1]], rest)
