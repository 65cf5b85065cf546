"""A low-rank sketch of the operator: as an approximate inverse, and as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_fields
from ..recording import recording
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm
from .noise import normal, uniform
from .operator import Operator, widened
from .solve import LinearState, Precondition, normalise, report, require_symmetric

SketchKind = Literal["gaussian", "columns"]


@dataclass(frozen=True)
class Nystrom:
    """``x = (A_k + damping I)^{-1} b`` with a Nystrom approximation ``A_k`` of rank k (Hataya and Yamada 2023).

    For Hessians with few large eigenvalues, as those of networks: ``rank`` products that do not depend on ``b`` and can
    be reused from step to step (`LinearState`), no iteration and nothing to diverge. Everything outside of the sketch
    is taken for ``damping``, so the error is that of the part of the spectrum that the sketch misses, and the bias of
    the damping; with ``rank >= n`` it is exact for ``A + damping I``.

    ``A_k = Y (W^T Y)^{-1} Y^T`` with ``Y = A W``; the inverse is Woodbury's formula, in the eigenbasis of ``A_k``
    (Tropp et al. 2017), which is stable where the core is close to singular. The result is `Result.STEPS_DONE`:
    an approximation that was asked for; ``residual_norm`` is the true ``||b - A x||`` (one more product). Where the
    sketch is not positive semi-definite: `Result.NEGATIVE_CURVATURE` and a zero solution for that problem.

    Args:
        rank: products; memory is ``rank`` vectors.
        damping: stands for the eigenvalues that the sketch does not see.
        seed: of the sketch, the same for all problems of a batch and for each solve.
        sketch: what W is: ``"gaussian"`` (orthonormalised), or random ``"columns"`` of the identity, as in the paper.
    """

    rank: int = 10
    damping: float = 1e-2
    seed: int = 0
    sketch: SketchKind = "gaussian"

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.rank, self.sketch)
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}: it must be positive, it divides what the sketch misses.")

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`."""
        require_symmetric(operator, "Nystrom")
        unit, length = normalise(b)
        kept = state.precondition if state is not None and state.made_by(self) else None
        reuse = isinstance(kept, Inverse) and kept.basis.shape[:-1] == b.shape
        inverse = kept if reuse else self._invert(operator)
        assert isinstance(inverse, Inverse)
        x, relative = inverse.applied(operator, unit)
        if reuse and not recording() and bool((relative > inverse.expected).any()):
            reuse, inverse = False, self._invert(operator)
            x, relative = inverse.applied(operator, unit)
        inverse = inverse if reuse else replace(inverse, relative=relative)
        codes = marked(make_codes(Result.STEPS_DONE, length), ~inverse.usable, Result.NEGATIVE_CURVATURE)
        codes = marked(codes, length == 0, Result.CONVERGED)
        bad = ~torch.isfinite(length) | ~torch.isfinite(relative)
        codes = marked(codes, bad, Result.NONFINITE)
        steps = torch.full_like(length, 0 if reuse else inverse.basis.shape[-1], dtype=torch.int64)
        value = torch.nan_to_num(length, 0, 0, 0).to(b.dtype).unsqueeze(-1) * x
        return report(value, codes, steps, relative * length, length, LinearState(value, inverse, maker=self))

    def _invert(self, operator: Operator) -> Inverse:
        basis, eigenvalues, usable = sketch(operator, self.rank, self.seed, self.sketch)
        inside = 1 / (eigenvalues + self.damping)
        # With all n directions nothing is outside; a small damping would only amplify the rounding of U U^T.
        outside = 0.0 if basis.shape[-1] == operator.size else 1 / self.damping
        return Inverse(basis, inside, torch.full_like(inside[..., 0], outside), usable)


STALE, STALE_FLOOR = 3.0, 1e-6
"""A sketch is made anew where it leaves a residual of so many times what it left when it was made."""


@dataclass(frozen=True)
class NystromPreconditioner:
    """Flattens the top of the spectrum (Frangella, Tropp and Udell 2023), for `CG` and `MINRES`.

    For systems with a few large eigenvalues: ``rank`` products, once for each solve, or once in all where the state is
    carried on; after them the condition number is about that of the part the sketch misses. The inverse is
    ``U (l_k + mu) (L + mu)^{-1} U^T + (I - U U^T)`` with the eigenvalues L of the sketch and ``l_k`` the least of them.
    Where the sketch is not positive semi-definite, the problem goes without a preconditioner.

    Args:
        rank: products; memory is ``rank`` vectors.
        seed: of the sketch.
        damping: mu; what the operator adds to the identity beyond the matrix of decaying spectrum.
        sketch: as in `Nystrom`.
    """

    rank: int = 10
    seed: int = 0
    damping: float = 0.0
    sketch: SketchKind = "gaussian"

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.rank, self.sketch)
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}: it cannot be negative.")

    def __call__(self, operator: Operator) -> Precondition:
        basis, eigenvalues, usable = sketch(operator, self.rank, self.seed, self.sketch)
        largest = eigenvalues.amax(-1, keepdim=True).clamp_min(torch.finfo(basis.dtype).tiny)
        shifted = torch.maximum(eigenvalues, 1e-3 * torch.finfo(basis.dtype).eps ** 0.5 * largest) + self.damping
        inside = shifted.amin(-1, keepdim=True) / shifted
        inside = torch.where(usable.unsqueeze(-1), inside, torch.ones_like(inside))
        return Inverse(basis, inside, torch.ones_like(inside[..., 0]), usable)


@dataclass(frozen=True, eq=False)
class Inverse:
    """``U diag(inside) U^T r + outside (r - U U^T r)``: symmetric positive definite for positive entries.

    Attributes:
        basis: U, ``[*batch, n, k]`` with orthonormal columns. inside: ``[*batch, k]``. outside, usable: ``[*batch]``.
        relative: the residual that it left as an approximate inverse when it was made, ``[*batch]``.
    """

    basis: Tensor
    inside: Tensor
    outside: Tensor
    usable: Tensor
    relative: Tensor | None = None

    def __call__(self, r: Tensor) -> Tensor:
        given, r = r.dtype, widened(r)
        within = (self.basis.mT @ r.unsqueeze(-1)).squeeze(-1)
        weights = (self.inside - self.outside.unsqueeze(-1)) * within
        return (self.outside.unsqueeze(-1) * r + (self.basis @ weights.unsqueeze(-1)).squeeze(-1)).to(given)

    @property
    def expected(self) -> Tensor:
        """The residual above which it is taken for that of another matrix."""
        made = torch.ones_like(self.outside) if self.relative is None else self.relative.clamp_min(STALE_FLOOR)
        return STALE * made

    def applied(self, operator: Operator, unit: Tensor) -> tuple[Tensor, Tensor]:
        """The approximate solution of ``A x = unit``, zero where the sketch is of no use, and its residual norm."""
        x = self(unit)
        x = torch.where(self.usable.unsqueeze(-1), x, torch.zeros_like(x))
        return x, norm(unit - operator.matvec(x))


def sketch(operator: Operator, rank: int, seed: int, kind: SketchKind) -> tuple[Tensor, Tensor, Tensor]:
    """The Nystrom approximation ``U diag(L) U^T`` from ``min(rank, n)`` products.

    Returns:
        U ``[*batch, n, k]``, orthonormal; L ``[*batch, k]``, descending and not negative; and ``[*batch]``, whether the
        sketch was positive semi-definite (U, L are zero where it was not).
    """
    size, rank = operator.size, min(rank, operator.size)
    if kind == "columns":
        chosen = uniform((size,), seed, operator.device).argsort()[:rank]
        probes = (torch.arange(size, device=operator.device).unsqueeze(-1) == chosen).to(operator.dtype)
    else:
        probes = torch.linalg.qr(normal((size, rank), seed, operator.device))[0].to(operator.dtype)
    columns = [operator.matvec(probe.expand(*operator.batch_shape, size)) for probe in probes.T]
    product, probes = widened(torch.stack(columns, -1)), widened(probes)
    finite = torch.isfinite(product).all(-1).all(-1)
    product = torch.where(finite[..., None, None], product, torch.zeros_like(product))
    # A shift of the size of the rounding error makes the core definite, and is taken off again (Tropp et al. 2017).
    scale = torch.linalg.matrix_norm(product)
    shift = (scale * torch.finfo(operator.dtype).eps * size**0.5).clamp_min(torch.finfo(product.dtype).tiny)
    shifted = product + shift[..., None, None] * probes
    core = probes.mT @ shifted
    factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
    definite = (info == 0)[..., None, None]
    factor = torch.where(definite, factor, torch.eye(rank, dtype=factor.dtype, device=factor.device))
    half = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
    # Curvature at the edge of what the precision can hold: its square root may overflow.
    finite = finite & torch.isfinite(half).all(-1).all(-1)
    half = torch.where(finite[..., None, None], half, torch.zeros_like(half))
    basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
    eigenvalues = (singular.square() - shift.unsqueeze(-1)).clamp_min(0)
    usable = (info == 0) & finite
    blank = torch.where(usable, torch.ones_like(shift), torch.zeros_like(shift))
    poison = torch.where(finite, torch.zeros_like(shift), torch.full_like(shift, torch.nan))
    return basis * blank[..., None, None] + poison[..., None, None], eigenvalues * blank.unsqueeze(-1), usable


def _check(rank: int, kind: str) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}: at least one product is needed.")
    if kind not in ("gaussian", "columns"):
        raise ValueError(f"sketch is {kind!r}: it is 'gaussian' or 'columns'.")
