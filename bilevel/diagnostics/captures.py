"""Functions of the params alone, whose hyperparameters are tensors that they captured, as functions of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..closure import Substitute, Tracer
from ..context import EVALUATING, differentiates
from ..tree import Tree, leaves, tree_map

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def takes_params_only(fn: Callable[..., Any]) -> bool:
    """Whether a function has one argument without a default; one whose signature is not known has two."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return False
    return sum(parameter.kind in POSITIONAL and parameter.default is parameter.empty for parameter in parameters) == 1


@dataclass(frozen=True, eq=False)
class Opened:
    """``fn(params)`` as a function of params and hparams: whatever it reads of ``captured`` is replaced.

    Attributes:
        captured: the leaves of the hyperparameters that the user's function holds.
    """

    fn: Callable[[Tree], Tree]
    captured: Sequence[Tensor]

    def __call__(self, params: Tree, hparams: Tree) -> Tree:
        with Substitute(self.captured, leaves(hparams)):
            return self.fn(params)


@differentiates
def captured_hparams(functions: Sequence[Callable[[Tree], Tree]], init: Tree, hparams: Tree, *, complete: bool) -> Tree:
    """The hyperparameters of functions of the params alone; ``hparams`` where they are given.

    Args:
        functions: those of the two levels that take params only. complete: both do.

    Raises:
        TypeError, ValueError: as `BilevelProblem`.
    """
    if not functions and hparams is not None:
        return hparams
    if hparams is None and not complete:
        raise TypeError(
            "hparams is missing: inner and outer were not both functions of the params alone, so the hyperparameters "
            "are an argument. Pass them as hparams."
        )
    tracer = Tracer()
    params = tree_map(lambda leaf: leaf.detach().requires_grad_(), init)  # the objective may capture init itself
    tracer.know(leaves(params))
    with torch.enable_grad(), EVALUATING:
        for fn in functions:
            with tracer:
                fn(params)
    if hparams is None:
        if not tracer.captured:
            raise ValueError(
                "No hyperparameter was found: neither inner nor outer reads a tensor that requires grad beside the "
                "params that it is given. Let them compute with the hyperparameters themselves, not with what was "
                "computed from them or detached before."
            )
        return tuple(tracer.captured)
    unread = [index for index, leaf in enumerate(leaves(hparams)) if not tracer.has_read(leaf)]
    if complete and unread:
        raise ValueError(
            f"Leaf {unread[0]} of hparams, of shape {tuple(leaves(hparams)[unread[0]].shape)}, is read by neither "
            "inner nor outer, which take the params alone: let them compute with that very tensor, not with what was "
            "computed from it before, or write inner(params, hparams)."
        )
    return hparams
