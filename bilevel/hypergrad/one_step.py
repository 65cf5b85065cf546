"""One-step differentiation: the derivative of the last step alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_fields, check_step_size
from .base import Point, Pulled


@dataclass(frozen=True)
class OneStep:
    """Differentiate one more gradient step from the solution, ``y - step_size grad_y g``, and nothing before it.

    For fast solvers (Newton, quasi-Newton, quickly contracting maps), whose last step determines the derivative: the
    error is the contraction factor ``||I - step_size H||`` of that step (Bolte, Pauwels, Vaiter 2023). No Hessian
    product; one reverse pass through the gradient. For `fixed_point`, ``OneStep(1.0)`` is one application of the map.

    Args:
        step_size: of the step; ``1 / L`` for an inner loss whose largest curvature is L.
    """

    step_size: float = 1.0
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_step_size(self.step_size, "step_size", "This method makes one step")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        return Pulled(point.linearization().pull(point.raveler.unravel(self.step_size * cotangent)))
