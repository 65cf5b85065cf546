"""Direct solvers: the matrix is formed from n products and factorised. For small problems, and as the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checks import check_fields
from ..recording import recording
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm
from .operator import Operator, widened
from .solve import LinearState, normalise, report, require_symmetric


@dataclass(frozen=True)
class Cholesky:
    """Factorise the symmetric positive definite ``A``; up to ``max_size`` unknowns for each problem.

    A matrix that is not positive definite gives `Result.NEGATIVE_CURVATURE` and a zero solution for that
    problem. The residual is that of ``A`` itself: where that is not symmetric, it is large.
    """

    max_size: int = 4096

    def __post_init__(self) -> None:
        _check(self)

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`."""
        require_symmetric(operator, "Cholesky")
        matrix = _dense(operator, self.max_size, "Cholesky")
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
        unit, length = normalise(widened(b))
        x = torch.cholesky_solve(unit.unsqueeze(-1), factor).squeeze(-1)
        found = _together(operator, b, matrix, _report(matrix, x, unit, length, info == 0, b.dtype))
        return _with_spectrum(found, matrix, lambda v: torch.cholesky_solve(v, factor))


@dataclass(frozen=True)
class LU:
    """Factorise a regular ``A``, symmetric or not; up to ``max_size`` unknowns.

    A singular matrix gives `Result.STAGNATED` and a zero solution for that problem.
    """

    max_size: int = 4096

    def __post_init__(self) -> None:
        _check(self)

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`."""
        matrix = _dense(operator, self.max_size, "LU")
        unit, length = normalise(widened(b))
        factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
        x = torch.linalg.lu_solve(factor, pivots, unit.unsqueeze(-1)).squeeze(-1)
        found = _report(matrix, x, unit, length, info == 0, b.dtype, Result.STAGNATED)
        found = _together(operator, b, matrix, found)

        def solve(v: Tensor, transposed: bool = False) -> Tensor:
            found: Tensor = torch.linalg.lu_solve(factor, pivots, v, adjoint=transposed)
            return found

        if operator.symmetric:
            return _with_spectrum(found, matrix, solve)
        condition, _ = _spectrum(matrix, partial(solve, transposed=True), solve)
        return found.with_stats(condition=condition)


@dataclass(frozen=True)
class LeastNorm:
    """Solves a singular consistent system for its solution of least norm, by an SVD, and a regular one as `LU` does.

    For KKT systems with constraints that depend on each other. An inconsistent system gives its least-squares solution,
    with `Result.STAGNATED`.

    Args:
        max_size: unknowns at most.
        max_condition: a matrix of more, in the 1-norm, counts as singular: rounding alone makes it regular. None: 1e13
            in float64, 1e6 in float32.
    """

    max_size: int = 4096
    max_condition: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.max_condition is not None and not self.max_condition >= 1:
            raise ValueError(f"max_condition is {self.max_condition}: no matrix has a condition below 1.")

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`."""
        matrix = _dense(operator, self.max_size, "LeastNorm")
        unit, length = normalise(b)
        unit = unit.to(matrix.dtype)  # which is wider than half precision
        x = least_norm(matrix, unit, self.max_condition)
        consistent = norm(unit - (matrix @ x.unsqueeze(-1)).squeeze(-1)) <= CONSISTENT * torch.finfo(b.dtype).eps ** 0.5
        found = _report(matrix, x, unit, length, torch.ones_like(consistent), b.dtype)
        codes = found.stats["result"]
        doubtful = ~consistent & (codes <= int(Result.STEPS_DONE)) & (length > 0)
        return found.with_stats(result=marked(codes, doubtful, Result.STAGNATED))


CONSISTENT = 3.0
"""In square roots of the rounding error: the relative residual of a singular system that still counts as solved."""


def least_norm(matrix: Tensor, b: Tensor, max_condition: float | None = None) -> Tensor:
    """``matrix^{-1} b`` in float64, by the pseudo-inverse where it is singular: ``[*batch, n, n] x [*batch, n]``."""
    limit = max_condition or (1e13 if matrix.dtype == torch.float64 else 1e6)
    wide, right = matrix.double(), b.double().unsqueeze(-1)
    x: Tensor
    x, info = torch.linalg.solve_ex(wide, right)
    singular = (is_singular(wide, limit) | (info != 0)) & torch.isfinite(wide).all(-1).all(-1)
    if recording():
        x = torch.where(singular[..., None, None], torch.linalg.pinv(wide, rtol=10 / limit) @ right, x)
    elif bool(singular.any()):
        x = x.clone()
        x[singular] = torch.linalg.pinv(wide[singular], rtol=10 / limit) @ right[singular]
    return x.squeeze(-1).to(b.dtype)


def is_singular(matrix: Tensor, max_condition: float) -> Tensor:
    """Whether the condition in the 1-norm is larger, ``[*batch]``."""
    info: Tensor
    inverse, info = torch.linalg.inv_ex(matrix)
    condition: Tensor = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    return (info != 0) | ~(condition < max_condition)


def _together(operator: Operator, b: Tensor, matrix: Tensor, found: Solution[Tensor]) -> Solution[Tensor]:
    """What was found, held against a product of all problems: the blocks are others where they depend on each other."""
    if not operator.batch_shape:
        return found
    x, codes = found.value, found.stats["result"]
    left = norm(b - operator.matvec(x))
    rounding = torch.finfo(b.dtype).eps ** 0.5 * (norm(b) + torch.linalg.matrix_norm(matrix).double() * norm(x))
    apart = (left > rounding) & (codes <= int(Result.STEPS_DONE))
    size = found.stats["residual_norm"]
    relative = torch.where(apart, left / norm(b), found.stats["relative_residual"])
    codes = marked(codes, apart, Result.STAGNATED)
    return found.with_stats(result=codes, residual_norm=torch.where(apart, left, size), relative_residual=relative)


def _with_spectrum(found: Solution, matrix: Tensor, solve: Callable[[Tensor], Tensor]) -> Solution:
    """Add the condition number and the smallest eigenvalue, about, by a few inverse iterations on the factors."""
    condition, least = _spectrum(matrix, solve)
    return found.with_stats(condition=condition, least_curvature=least)


def _spectrum(matrix: Tensor, *solves: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The condition number and the smallest singular value; of a matrix that is not symmetric by both its solves."""
    turns = torch.arange(matrix.shape[-1], device=matrix.device, dtype=torch.float64) * 0.6180339887498949
    v = torch.where(turns % 1 < 0.5, 1.0, -1.0).to(matrix.dtype).expand(matrix.shape[:-1]).unsqueeze(-1)
    for _ in range(INVERSE_ITERATIONS):
        sizes = []
        for solve in solves:
            w = solve(v)
            sizes.append(norm(v.squeeze(-1)) / norm(w.squeeze(-1)))
            v = w / w.abs().amax(-2, keepdim=True)
        least = torch.stack(sizes).log().mean(0).exp()
    largest = torch.linalg.matrix_norm(matrix).double() / matrix.shape[-1] ** 0.5
    condition = (largest / least).nan_to_num(1.0).clamp_min(1.0)
    return condition, least.nan_to_num(torch.inf)


INVERSE_ITERATIONS = 3


def _check(settings: Cholesky | LU | LeastNorm) -> None:
    check_fields(settings)
    if settings.max_size < 1:
        raise ValueError(f"max_size is {settings.max_size}: one unknown at least is needed.")


def _dense(operator: Operator, max_size: int, name: str) -> Tensor:
    if operator.size > max_size:
        gibibytes = operator.batch_shape.numel() * operator.size**2 * operator.dtype.itemsize / 2**30
        raise ValueError(
            f"{name} would form matrices of {operator.size} unknowns ({gibibytes:.3g} GiB); its max_size is "
            f"{max_size}. Use CG, or raise max_size."
        )
    return widened(operator.to_dense())


def _report(
    matrix: Tensor,
    x: Tensor,
    unit: Tensor,
    length: Tensor,
    regular: Tensor,
    dtype: torch.dtype,
    failure: Result = Result.NEGATIVE_CURVATURE,
) -> Solution[Tensor]:
    x = torch.where(regular.unsqueeze(-1), x, torch.zeros_like(x))
    relative = torch.where(length > 0, norm(unit - (matrix @ x.unsqueeze(-1)).squeeze(-1)), torch.zeros_like(length))
    codes = marked(make_codes(Result.CONVERGED, length), relative > 1e-2, Result.STAGNATED)
    codes = marked(codes, ~regular, failure)
    bad = ~torch.isfinite(length) | ~torch.isfinite(relative) | ~torch.isfinite(matrix).all(-1).all(-1)
    codes = marked(codes, bad, Result.NONFINITE)
    steps = torch.full_like(length, matrix.shape[-1], dtype=torch.int64)
    value = (torch.nan_to_num(length, 0, 0, 0).to(x.dtype).unsqueeze(-1) * x).to(dtype)
    return report(value, codes, steps, relative * length, length, LinearState(value))
