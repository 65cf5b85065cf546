"""Operators of other libraries as operators of this one: SciPy's and curvlinops'.

The other way go `Operator.to_scipy` and `Operator.to_curvlinops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .operator import Operator, to_numpy


class ScipyOperator(Operator):
    """A `scipy.sparse.linalg.LinearOperator`, a sparse or a dense matrix; its products are made on the host.

    Args:
        linear: square, of size ``prod(batch_shape) * n``.
        symmetric: declared, never guessed.
        batch_shape, dtype, device: of the vectors ``[*batch, n]`` that it shall multiply.
    """

    def __init__(
        self,
        linear: Any,
        *,
        symmetric: bool,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        import scipy.sparse.linalg

        self.linear = scipy.sparse.linalg.aslinearoperator(linear)
        total, problems = self.linear.shape[1], torch.Size(batch_shape).numel()
        if self.linear.shape[0] != total or total % problems:
            raise ValueError(
                f"the SciPy operator has shape {self.linear.shape}: it has to be square, and {problems} problems have "
                "to share its rows evenly."
            )
        super().__init__(batch_shape, total // problems, dtype, torch.device(device), symmetric)

    def matvec(self, v: Tensor) -> Tensor:
        return self._like(v, self.linear.matvec(to_numpy(v)))

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.matvec(v) if self.symmetric else self._like(v, self.linear.rmatvec(to_numpy(v)))

    def _like(self, v: Tensor, product: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(product)).to(self.device, self.dtype).view_as(v)


class TorchLinear(Protocol):
    """The part of curvlinops' ``PyTorchLinearOperator`` that is needed here; nothing is imported from there."""

    shape: tuple[int, int]
    SELF_ADJOINT: bool

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, v: Any, /) -> Any: ...

    def adjoint(self) -> TorchLinear: ...


class CurvlinopsOperator(Operator):
    """A ``PyTorchLinearOperator`` of curvlinops: a Hessian, GGN, KFAC, or the inverse of one; one problem.

    Its vectors are the params in the order in which it was given them, which has to be that of the leaves of ``init``.

    Args:
        linear: a square one.
        symmetric: None: as it says itself.
    """

    def __init__(self, linear: TorchLinear, symmetric: bool | None = None):
        if linear.shape[0] != linear.shape[1]:
            raise ValueError(f"the curvlinops operator has shape {tuple(linear.shape)}: a square one is needed.")
        own = bool(linear.SELF_ADJOINT) if symmetric is None else symmetric
        super().__init__((), linear.shape[1], linear.dtype, linear.device, own)
        self.linear = linear

    def matvec(self, v: Tensor) -> Tensor:
        return self._product(self.linear, v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._product(self.linear.adjoint(), v)

    def _product(self, linear: TorchLinear, v: Tensor) -> Tensor:
        product: Tensor = linear @ v.detach().to(self.device, self.dtype)
        return product.to(v)
