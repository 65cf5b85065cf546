"""What the problems of the collection share: both levels, the exact solution, the exact hypergradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor

Kind = Literal["argmin", "root", "fixed_point", "composite", "qp"]


class BilevelTestProblem(ABC):
    """A bilevel problem whose solution is known to machine precision.

    Attributes:
        kind: what ``inner`` is: a loss for `argmin`, a residual for `root` (``symmetric``: with a symmetric Jacobian),
            a map for `fixed_point`, the smooth part of a ``"composite"`` loss, or the loss of a ``"qp"``; the last two
            bring ``solve_inner(hparams, **settings)``.
        matrix_kind: of the adjoint system, where the kind does not tell: ``"symmetric"`` (indefinite), ``"singular"``.
        init, hparams: where the inner solve starts, and where the hypergradient is asked for.
    """

    kind: ClassVar[Kind] = "argmin"
    symmetric: ClassVar[bool] = False
    matrix_kind: ClassVar[str | None] = None
    init: Tensor
    hparams: Tensor

    @abstractmethod
    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        """As ``kind`` says; of T problems a vector ``[T]`` of losses."""

    @abstractmethod
    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        """Outer loss, a scalar."""

    @abstractmethod
    def solution(self, hparams: Tensor) -> Tensor:
        """The exact solution, differentiable in hparams."""

    def residual(self, params: Tensor, hparams: Tensor) -> Tensor:
        """What vanishes at the solution."""
        if self.kind == "root":
            return self.inner(params, hparams)
        if self.kind == "fixed_point":
            return params - self.inner(params, hparams)
        grad: Tensor = torch.func.grad(lambda y: self.inner(y, hparams).sum())(params)
        return grad

    def hypergradient(self, hparams: Tensor) -> Tensor:
        """The exact gradient of the outer loss, through the exact solution."""
        x = hparams.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.outer(self.solution(x), x), x)
        return grad


class ClosedFormProblem(BilevelTestProblem):
    """A quadratic inner problem, ``1/2 y^T A(x) y - c(x)^T y``, under an outer loss; T of them or one."""

    @abstractmethod
    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` of shape ``[*batch, n, n]`` and ``c`` of shape ``[*batch, n]``, differentiable in hparams."""

    def solution(self, hparams: Tensor) -> Tensor:
        """``A^{-1} c``, ``[*batch, n]``."""
        matrix, c = self.system(hparams)
        y: Tensor = torch.linalg.solve(matrix, c.unsqueeze(-1)).squeeze(-1)
        return y

    def constants(self, hparams: Tensor) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of A, over all problems."""
        values = torch.linalg.eigvalsh(self.system(hparams.detach())[0])
        return float(values.min()), float(values.max())


class NewtonProblem(BilevelTestProblem):
    """A smooth problem without a closed form: dense Newton to machine precision, then one step that is differentiated.

    At the solution, the derivative of one exact Newton step is that of the implicit function theorem.
    """

    def solution(self, hparams: Tensor) -> Tensor:
        """The root of the residual, ``[n]``."""
        x, y = hparams.detach(), self.init.detach()
        for _ in range(50):
            step = torch.linalg.solve(self._jacobian(y, x), self.residual(y, x))
            y = y - step
            if step.norm() <= 1e-15 * (1 + y.norm()):
                break
        jacobian = self._jacobian(y, x)
        improved: Tensor = y - torch.linalg.solve(jacobian, self.residual(y, hparams))
        return improved

    def _jacobian(self, y: Tensor, x: Tensor) -> Tensor:
        jacobian: Tensor = torch.func.jacrev(self.residual)(y, x)
        return jacobian


def generator_of(seed: int, dtype: torch.dtype, **sizes: int) -> torch.Generator:
    """What the data of a problem are drawn with, once all that tells their shape has been looked at.

    Raises:
        TypeError: the seed or a size is no whole number, or the dtype has no floating-point numbers.
        ValueError: a size is less than 1.
    """
    for name, value in {"seed": seed, **sizes}.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}: a whole number is needed.")
        if name != "seed" and value < 1:
            raise ValueError(f"{name} is {value}: at least 1 is needed.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}: torch.float64 or torch.float32 is needed.")
    return torch.Generator().manual_seed(int(seed))


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
