"""The first-order approximation: the solution moves with its start, and with nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Point, Pulled


@dataclass(frozen=True)
class FirstOrder:
    """``dy/d init = I``, and no other dependence: first-order MAML (Finn et al. 2017; Nichol et al. 2018).

    For meta-learning an initialisation by few, small steps. Costs nothing, and is biased: the error is that of
    ``prod (I - lr H) - I``. Hyperparameters other than ``init`` get their direct gradient only.
    """

    reaches_init: ClassVar[bool] = True

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        return Pulled([None] * len(point.hparams), start=point.raveler.unravel(cotangent))
