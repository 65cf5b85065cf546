"""Square linear operators, one for each problem of a batch, known by their products with a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse.linalg


class Operator(ABC):
    """A square operator ``A`` on vectors ``[*batch, n]``: ``A @ v``, ``A.T @ v``.

    A new operator writes `matvec`, and `rmatvec` where it is not symmetric, and passes its shape to
    ``super().__init__``; it inherits the rest, and its tests from `bilevel.testing.OperatorTests`.

    Args:
        batch_shape: ``()`` for one matrix, ``(T,)`` for T matrices (a block-diagonal operator).
        size: n, the unknowns of one problem.
        dtype, device: of the vectors.
        symmetric: declared, never guessed; solvers for symmetric matrices refuse others.
    """

    def __init__(
        self,
        batch_shape: Sequence[int],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        symmetric: bool = True,
    ):
        self.batch_shape, self.size = torch.Size(batch_shape), size
        self.dtype, self.device, self.symmetric = dtype, device, symmetric

    @property
    def shape(self) -> torch.Size:
        """``[*batch, n, n]``."""
        return torch.Size((*self.batch_shape, self.size, self.size))

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """``A v``: ``[*batch, n] -> [*batch, n]``."""

    def rmatvec(self, v: Tensor) -> Tensor:
        """``A^T v``: ``[*batch, n] -> [*batch, n]``."""
        if not self.symmetric:
            raise NotImplementedError(
                f"{type(self).__name__} is not symmetric and has no transposed product: this solver needs one. "
                "Write rmatvec, or take GMRES, BiCGSTAB or Neumann, which multiply by A only."
            )
        return self.matvec(v)

    @property
    def T(self) -> Operator:
        """The transposed operator."""
        return self if self.symmetric else Transposed(self)

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
        import scipy.sparse.linalg

        total = self.batch_shape.numel() * self.size

        def on_host(product: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            def of_numpy(x: np.ndarray) -> np.ndarray:
                # A copy: SciPy works in place on what it is given, which may be its own vector (A = I).
                v = torch.tensor(x.reshape(-1), dtype=self.dtype, device=self.device)
                return to_numpy(product(v.view(*self.batch_shape, self.size)))

            return of_numpy

        return scipy.sparse.linalg.LinearOperator(
            (total, total), matvec=on_host(self.matvec), rmatvec=on_host(self.rmatvec), dtype=np.float64
        )

    def to_curvlinops(self, shapes: Sequence[Sequence[int]] | None = None) -> Any:
        """The whole batch as one ``PyTorchLinearOperator`` of curvlinops.

        Args:
            shapes: of the tensors whose entries are the vector, as curvlinops multiplies lists of them; None: one flat
                tensor of ``prod(batch) * n`` entries.

        Raises:
            ImportError: curvlinops is not installed.
        """
        try:
            from curvlinops._torch_base import PyTorchLinearOperator  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ImportError("to_curvlinops needs curvlinops: pip install curvlinops-for-pytorch") from error
        return _exported(PyTorchLinearOperator, self, shapes or [(self.batch_shape.numel() * self.size,)])


def _exported(base: Any, operator: Operator, shapes: Sequence[Sequence[int]]) -> Any:
    """An instance of a subclass of ``base``, which is defined here because ``base`` may not be installed."""

    class Exported(base):  # type: ignore[misc]
        SELF_ADJOINT = operator.symmetric
        dtype, device = operator.dtype, operator.device

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = torch.cat([part.reshape(-1, part.shape[-1]) for part in X])
            shape = (*operator.batch_shape, operator.size)
            product = torch.stack([(operator @ column.reshape(shape)).reshape(-1) for column in columns.T], -1)
            parts = product.split([part.shape[:-1].numel() for part in X])
            return [part.reshape(like.shape) for part, like in zip(parts, X, strict=True)]

        def _adjoint(self) -> Any:
            return _exported(base, operator.T, shapes)

    return Exported([tuple(shape) for shape in shapes], [tuple(shape) for shape in shapes])


def widened(tensor: Tensor) -> Tensor:
    """In float32 where it is of half precision, in which nothing can be factorised."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A flat float64 copy on the host."""
    return tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()


class Dense(Operator):
    """Explicit matrices ``[*batch, n, n]``."""

    def __init__(self, matrix: Tensor, symmetric: bool = True):
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}: square matrices [*batch, n, n] are needed.")
        super().__init__(matrix.shape[:-2], matrix.shape[-1], matrix.dtype, matrix.device, symmetric)
        self.matrix = matrix

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        return (self.matrix.mT @ v.unsqueeze(-1)).squeeze(-1)


class Transposed(Operator):
    """``A^T``."""

    def __init__(self, operator: Operator):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator = operator

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)


class Damped(Operator):
    """``A + damping I``: moves every eigenvalue up, at the price of a bias of first order in the damping."""

    def __init__(self, operator: Operator, damping: float | Tensor):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator, self.damping = operator, damping

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v) + (self.damping * v).to(v.dtype)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v) + (self.damping * v).to(v.dtype)


class Restricted(Operator):
    """``P A P`` with P the projection onto the unknowns of a mask ``[*batch, n]``; zero off it."""

    def __init__(self, operator: Operator, kept: Tensor):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator, self.kept = operator, kept

    def matvec(self, v: Tensor) -> Tensor:
        return self._project(self.operator.matvec(self._project(v)))

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._project(self.operator.rmatvec(self._project(v)))

    def _project(self, v: Tensor) -> Tensor:
        return torch.where(self.kept, v, torch.zeros_like(v))
