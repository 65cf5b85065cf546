"""Square linear operators, one for each problem of a batch, known by their products with a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor


class Operator(ABC):
    """A symmetric operator ``A`` on vectors ``[*batch, n]``: ``A @ v``.

    A new operator writes `matvec` and passes its shape to ``super().__init__``; it inherits the rest, and
    the conformance suite in ``tests/conformance.py``.

    Args:
        batch_shape: ``()`` for one matrix, ``(T,)`` for T matrices (a block-diagonal operator).
        size: n, the unknowns of one problem.
        dtype, device: of the vectors.
    """

    def __init__(self, batch_shape: Sequence[int], size: int, dtype: torch.dtype, device: torch.device):
        self.batch_shape, self.size = torch.Size(batch_shape), size
        self.dtype, self.device = dtype, device

    @property
    def shape(self) -> torch.Size:
        """``[*batch, n, n]``."""
        return torch.Size((*self.batch_shape, self.size, self.size))

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """``A v``: ``[*batch, n] -> [*batch, n]``."""

    def __matmul__(self, v: Tensor) -> Tensor:
        expected = torch.Size((*self.batch_shape, self.size))
        if v.shape != expected:
            raise ValueError(f"the operator of shape {tuple(self.shape)} cannot multiply a {tuple(v.shape)} tensor.")
        return self.matvec(v)

    def to_dense(self) -> Tensor:
        """The matrices ``[*batch, n, n]``, from n products. For small problems and for tests."""
        basis = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self.matvec(e.expand(*self.batch_shape, -1)) for e in basis], -1)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The whole batch as one float64 SciPy operator of size ``prod(batch) * n``."""
        total = self.batch_shape.numel() * self.size

        def product(x: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(x.reshape(-1), dtype=self.dtype, device=self.device)
            return to_numpy(self.matvec(v.view(*self.batch_shape, self.size)))

        return scipy.sparse.linalg.LinearOperator((total, total), matvec=product, rmatvec=product, dtype=np.float64)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A flat float64 copy on the host."""
    return tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()


class Dense(Operator):
    """Explicit symmetric matrices ``[*batch, n, n]``."""

    def __init__(self, matrix: Tensor):
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}: square matrices [*batch, n, n] are needed.")
        super().__init__(matrix.shape[:-2], matrix.shape[-1], matrix.dtype, matrix.device)
        self.matrix = matrix

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)


class Damped(Operator):
    """``A + damping I``: moves every eigenvalue up, at the price of a bias of first order in the damping."""

    def __init__(self, operator: Operator, damping: float):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device)
        self.operator, self.damping = operator, damping

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v) + self.damping * v
