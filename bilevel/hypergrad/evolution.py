"""Evolution strategies: the derivative of a black-box inner solver from its answers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.noise import normal
from ..tree import is_continuous
from .base import Point, Pulled


@dataclass(frozen=True)
class EvolutionStrategies:
    """``mean_i e_i <grad_y f, (y(x + sigma e_i) - y(x - sigma e_i)) / 2 sigma>`` over Gaussian directions ``e_i``.

    For inner solvers that are a black box, and problems that are not smooth: the gradient of the solution map smoothed
    by noise of size sigma (Salimans et al. 2017, antithetic; as an estimate of the Jacobian, PZOBO: Sow et al. 2022).
    Unbiased for it, with a relative standard error of about ``sqrt((p + 1) / num_samples)`` for p hyperparameters. Two
    inner solves a sample, from the solution at hand. The outer loss is differentiated as ever.

    Args:
        num_samples: directions. sigma: their length for each hyperparameter.
        seed: of the directions; the same seed, the same answer.
    """

    num_samples: int = 16
    sigma: float = 1e-2
    seed: int = 0
    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: at least one is needed.")
        if not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}: it must be positive.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        point.check_unchanged()
        moving = [is_continuous(tensor) for tensor in point.hparams]
        total = [torch.zeros_like(tensor) for tensor in point.hparams]
        count = len(point.hparams)
        for sample in range(self.num_samples):
            first = (self.seed * self.num_samples + sample) * count
            noise = [
                _noise(t, first + index) if moves else torch.zeros_like(t)
                for index, (t, moves) in enumerate(zip(point.hparams, moving, strict=True))
            ]
            ahead, behind = (self._solved(point, noise, sign * self.sigma) for sign in (1, -1))
            slope = ((ahead - behind) * cotangent).sum() / (2 * self.sigma)
            total = [
                t + slope.to(t.dtype) * e if moves else t for t, e, moves in zip(total, noise, moving, strict=True)
            ]
        return Pulled([t / self.num_samples if moves else None for t, moves in zip(total, moving, strict=True)])

    def _solved(self, point: Point, noise: list[Tensor], size: float) -> Tensor:
        moved = [t + size * e for t, e in zip(point.hparams, noise, strict=True)]
        return point.solve(lambda params: point.statement.closure(params, moved), "A perturbed inner solve")


def _noise(like: Tensor, seed: int) -> Tensor:
    """Noise of variance one for each real number; a complex number is two."""
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    noise = normal(shape, seed, like.device)
    return (torch.view_as_complex(noise) if like.is_complex() else noise).to(like)
