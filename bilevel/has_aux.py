"""Functions that return something beside the loss or residual: ``has_aux=True``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .closure import Autocast, Tracer
from .solution import Solution
from .tree import leaves


@dataclass(frozen=True, eq=False)
class WithoutAux:
    """The first part of the pair that ``fn`` returns, as a function of the same arguments."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.pair(*args)[0]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The user's own, for `inspect.unwrap`."""
        return self.fn

    def pair(self, *args: Any) -> tuple[Any, Any]:
        """Both parts.

        Raises:
            ValueError: ``fn`` does not return a pair.
        """
        found = self.fn(*args)
        if not isinstance(found, tuple) or len(found) != 2:
            what = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
            raise ValueError(f"With has_aux=True the function returns a pair (result, aux), and this one {what}.")
        return found


def with_aux(
    solve: Callable[[WithoutAux], Solution], fn: Callable[..., Any], args: tuple[Any, ...], differentiable: bool
) -> Solution:
    """What ``solve`` finds of the first part of ``fn``, with the other part there; no state of ``fn`` is changed."""
    plain = WithoutAux(fn)
    fit = solve(plain)
    autocast = Autocast.current(leaves(fit.value)[0].device)
    tracer = Tracer(differentiable=False)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), autocast.evaluating(), tracer:
        _, aux = plain.pair(fit.value, *args)
    return replace(fit, aux=aux)
