"""SAMA: the identity in place of the inverse Hessian, adapted to the inner optimizer, and a finite difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..inner.steps import LastStep, Rule
from .base import Point, Pulled
from .finite_difference import check_epsilon, mixed_difference


@dataclass(frozen=True)
class SAMA:
    """``u = -(d step / d g)^T grad_y f``, with the derivative of the inner optimizer's own update (Choe et al. 2023).

    For large models trained by Adam: where the solver is ``Steps(rule, ...)``, the last step of its rule says how the
    params answer to a change of the gradient; with `SGD` it is `FiniteDifference`. First derivatives only: three
    gradients in all. Biased as every method that replaces the inverse Hessian by one step.

    Args:
        rule: the step rule whose update is differentiated; None: the one that the solver made its last step with.
        epsilon: how far the params are moved for the difference; None: as in `FiniteDifference`.
    """

    rule: Rule | None = None
    epsilon: float | None = None
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise TypeError(f"rule is {self.rule!r}: it is the step rule of the solver, as Adam(lr=1e-3), or None.")
        check_epsilon(self.epsilon)

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        last = point.found.state if point.found is not None else None
        if not isinstance(last, LastStep):
            raise TypeError("hypergrad=SAMA() needs solver=Steps(rule, ...): it reads the state of its last step.")
        if last.g is None or last.y is None or last.before is None:
            raise ValueError(
                "hypergrad=SAMA() needs the last step of the solver, which made none: init met its gtol already. Leave "
                "gtol away, or use Implicit()."
            )
        rule, y, before, index = self.rule or last.by, last.y, last.before, last.index
        if rule is None or rule.init(y).keys() != before.keys():
            raise TypeError(f"hypergrad=SAMA({self.rule!r}) does not fit the solver, whose rule was {last.by!r}.")
        with torch.enable_grad():
            g = last.g.detach().requires_grad_()
            moved, _ = rule.step(y, g, before, index)
            (answer,) = torch.autograd.grad(moved, g, cotangent)
        return Pulled(mixed_difference(point, -answer, self.epsilon, "SAMA"))
