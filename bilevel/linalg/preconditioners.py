"""Preconditioners for `CG` and `MINRES`: diagonals, and an approximate inverse that somebody else made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..checks import check_fields
from .noise import signs
from .operator import Operator
from .solve import Precondition


@dataclass(frozen=True)
class Jacobi:
    """The diagonal of ``A``, its entries estimated with Hutchinson probes (Bekas et al. 2007).

    For problems whose parameters have very different curvatures, such as penalties of their own for each.

    Args:
        num_probes: products that it costs, once for each solve, or once in all where the state is carried on.
        seed: of the random signs.
    """

    num_probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_probes < 1:
            raise ValueError(f"num_probes is {self.num_probes}: at least one product is needed.")

    def __call__(self, operator: Operator) -> Precondition:
        total = torch.zeros(*operator.batch_shape, operator.size, dtype=operator.dtype, device=operator.device)
        for probe in signs((self.num_probes, *total.shape), self.seed, total.device).to(total.dtype):
            total = total + probe * operator.matvec(probe)
        diagonal = total / self.num_probes
        floor = diagonal.abs().amax(-1, keepdim=True) * 1e-3
        return _divide_by(torch.maximum(diagonal.abs(), floor))


@dataclass(frozen=True, eq=False)
class AdamPreconditioner:
    """``sqrt(v) + eps`` of an adaptive optimizer's second moment ``v``, at no product at all.

    For inner problems that Adam or RMSprop solved: its state knows the scales of the gradients, which stand for those
    of the curvature.

    Args:
        second_moment: flat, ``[*batch, n]`` or ``[n]``; such as ``fit.state.rule["exp_avg_sq"]`` of a `Steps` fit.
        eps: of the optimizer.
    """

    second_moment: Tensor
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.eps >= 0:
            raise ValueError(f"eps is {self.eps}: it cannot be negative.")

    def __call__(self, operator: Operator) -> Precondition:
        if self.second_moment.shape[-1:] != (operator.size,):
            raise ValueError(
                f"second_moment has shape {tuple(self.second_moment.shape)}: one entry for each of {operator.size} "
                "unknowns is needed."
            )
        return _divide_by(self.second_moment.detach().to(operator.device, operator.dtype).sqrt() + self.eps)


class Multiplies(Protocol):
    """What multiplies a flat vector: an `Operator`, an operator of curvlinops, a dense matrix."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class InversePreconditioner:
    """An approximate inverse that is at hand already, such as that of KFAC.

    With curvlinops: ``CG(preconditioner=InversePreconditioner(KFACInverseLinearOperator(kfac, damping=1e-3)))``.

    Args:
        inverse: symmetric and positive definite; an `Operator`, or anything that multiplies a flat vector by ``@`` and
            has a ``shape``: an operator of curvlinops, a dense matrix. Its vectors are the params in the order of the
            leaves of ``init``. Where many right-hand sides are solved at once, it serves them all.
    """

    inverse: Multiplies

    def __post_init__(self) -> None:
        if not (hasattr(self.inverse, "shape") and hasattr(self.inverse, "__matmul__")):
            raise TypeError(
                f"inverse is of type {type(self.inverse).__name__}: what multiplies a flat vector by @ and has a shape "
                "is needed, such as a matrix or an operator. Of a function: preconditioner=lambda operator: function."
            )

    def __call__(self, operator: Operator) -> Precondition:
        if self.inverse.shape[-1] != operator.size:
            raise ValueError(
                f"the approximate inverse has shape {tuple(self.inverse.shape)}, and the matrix {operator.size} "
                "unknowns: it is one of other parameters."
            )
        dtype = getattr(self.inverse, "dtype", operator.dtype)
        return lambda r: self._times(r.to(dtype)).to(r.dtype)

    def _times(self, r: Tensor) -> Tensor:
        """``[*batch, n]``: the same inverse for all problems of a batch, unless it is an operator of that batch."""
        inverse, rows = self.inverse, r.reshape(-1, r.shape[-1])
        product: Tensor
        if r.dim() == 1 or (isinstance(inverse, Operator) and inverse.batch_shape):
            product = inverse @ r
        elif isinstance(inverse, Operator):
            product = torch.stack([inverse @ row for row in rows])
        else:
            product = (inverse @ rows.T).T
        return product.reshape(r.shape)


def _divide_by(diagonal: Tensor) -> Precondition:
    inverse = 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny)
    return lambda r: r * inverse
