"""The empirical Fisher matrix in place of the Hessian: positive semi-definite, from gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..problem import Objective, Problem
from ..tree import Tree
from .gauss_newton import Middle, OfOutputs, check_outputs


@dataclass(frozen=True)
class EmpiricalFisher(OfOutputs):
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

    def through(self, problem: Problem, params: Tree) -> tuple[Tensor, Middle, Tensor]:
        """The losses, the identity over their number, and the slope of their mean."""
        losses = self.losses(params, *problem.args)
        check_outputs("losses", losses, problem)
        expected = len(problem.raveler.batch_shape) + 1
        if losses.dim() != expected:
            raise ValueError(
                f"losses returned a tensor of shape {tuple(losses.shape)}: one loss for each example is needed, in "
                f"{expected} dimensions. Take reduction='none'."
            )
        count = losses.shape[-1]
        return losses, lambda tangents: [tangents[0] / count], losses.new_full(losses.shape, 1 / count)
