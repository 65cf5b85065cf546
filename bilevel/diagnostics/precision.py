"""A problem in double precision, whatever that of its params and data is: what rounding costs can be measured so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..tree import Tree, leaves, tree_map
from .problem import Bilevel


class DoubleOperands(TorchFunctionMode):
    """Operations under this mode see every floating-point operand in float64, data that a function captured as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(as_double, (args, kwargs or {}))
        return func(*args, **kwargs)


class DoubleProblem:
    """A problem whose functions compute in float64 from the values that it has, so that rounding is none of theirs.

    Attributes:
        init, hparams: those of the problem, in float64. kind, symmetric: as they are there.
    """

    def __init__(self, problem: Bilevel):
        self.problem, self.kind = problem, problem.kind
        self.symmetric = getattr(problem, "symmetric", False)
        self.init, self.hparams = (tree_map(as_double, tree) for tree in (problem.init, problem.hparams))

    def inner(self, params: Tree, hparams: Tree) -> Tree:
        """The loss, residual or map, from float64 operands."""
        return self._evaluated(self.problem.inner, params, hparams)

    def outer(self, params: Tree, hparams: Tree) -> Tensor:
        """The outer loss from float64 operands."""
        loss: Tensor = self._evaluated(self.problem.outer, params, hparams)
        return loss

    def residual(self, params: Tree, hparams: Tree) -> Tree:
        """What vanishes at the solution, of a problem that solves itself."""
        return self._evaluated(self.problem.residual, params, hparams)  # type: ignore[attr-defined]

    def _evaluated(self, fn: Callable[[Tree, Tree], Tree], params: Tree, hparams: Tree) -> Tree:
        with DoubleOperands():
            return tree_map(as_double, fn(params, hparams))


def as_double(value: Tree) -> Tree:
    """A real floating-point tensor in float64; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.double()
    return value


def in_double(problem: Bilevel, params: Tree, hparams: Tree) -> Bilevel:
    """The problem in float64, or as it is where it is so already or cannot be: some kernels know one precision only."""
    if all(leaf.dtype == torch.float64 for leaf in (*leaves(params), *leaves(hparams))):
        return problem
    lifted = DoubleProblem(problem)
    try:
        with torch.no_grad():
            point, where = (tree_map(as_double, tree) for tree in (params, hparams))
            lifted.outer(point, where)
            lifted.inner(point, where)
    except (RuntimeError, TypeError, NotImplementedError):
        return problem
    return lifted
