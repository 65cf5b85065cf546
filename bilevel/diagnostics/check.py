"""Is this hypergradient right? Against finite differences, and against the exact answer where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solution import Throw
from ..tree import Tree, leaves, tree_map
from .checked import distance
from .problem import Bilevel, leaf_copies, solve


class HypergradientError(RuntimeError):
    """A hypergradient does not agree with finite differences, or with the exact one."""


@dataclass(frozen=True)
class HypergradientCheck:
    """What `check_hypergradient` found.

    Attributes:
        finite_difference: for each direction, the slope of the outer loss by central differences.
        slope: for each direction, that of the hypergradient.
        relative_error: ``||slope - finite_difference|| / ||finite_difference||`` over the directions.
        uncertainty: of the finite differences themselves, relative: two step sizes, and how they differ.
        exact_error: relative error against the problem's own closed form; None where it has none.
        tolerance: what was asked for.
    """

    finite_difference: Tensor
    slope: Tensor
    relative_error: float
    uncertainty: float
    exact_error: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the errors are within the tolerance, or within what finite differences can tell."""
        by_difference = self.relative_error <= max(self.tolerance, 3 * self.uncertainty)
        return by_difference and (self.exact_error is None or self.exact_error <= self.tolerance)

    def __str__(self) -> str:
        exact = "" if self.exact_error is None else f"; from the exact one {self.exact_error:.2e}"
        return (
            f"{'right' if self.ok else 'WRONG'}: relative error from finite differences {self.relative_error:.2e} "
            f"(they are certain to {self.uncertainty:.1e}){exact}; tolerance {self.tolerance:.0e}"
        )


def check_hypergradient(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Any = None,
    hypergrad: Any = None,
    reference_solver: Any = None,
    num_directions: int = 3,
    step: float | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
    throw: Throw = "warn",
    raise_exception: bool = True,
) -> HypergradientCheck:
    """Compare a hypergradient with central differences of the outer loss, along random directions.

    In float64: in float32 finite differences are right to two or three digits only, and the report says so.

    Args:
        problem: with both levels; see `Bilevel`.
        hparams: where; the problem's own by default.
        solver, hypergrad, throw: what is checked, as in `argmin`.
        reference_solver: solves the inner problem for the differences; ``solver`` by default. It has to solve much
            better than ``step``.
        num_directions: two inner solves each, and two more for the uncertainty.
        step: of the differences, relative to ``1 + ||hparams||``; None: 1e-4 (float64) or 1e-2 (float32).
        tolerance: relative error that passes.
        raise_exception: raise where the check fails, as `torch.autograd.gradcheck` does; else return the report.

    Raises:
        HypergradientError: the hypergradient is wrong, with both slopes in the message.
    """
    x = leaf_copies(problem.hparams if hparams is None else hparams)
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw=throw)
    grads = torch.autograd.grad(problem.outer(fit.value, x), leaves(x), allow_unused=True)
    found = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves(x), strict=True)]
    reference = reference_solver if reference_solver is not None else solver
    dtype = leaves(x)[0].dtype
    relative = (1e-4 if dtype is torch.float64 else 1e-2) if step is None else step
    size = relative * (1 + float(torch.cat([leaf.detach().reshape(-1) for leaf in leaves(x)]).norm()))
    generator = torch.Generator().manual_seed(seed)
    slopes: list[float] = []
    fine: list[float] = []
    coarse: list[float] = []
    for _ in range(num_directions):
        directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves(x)]
        length = float(torch.cat([d.reshape(-1) for d in directions]).norm())
        directions = [d / length for d in directions]
        slopes.append(sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True)))
        for h, differences in ((size, fine), (2 * size, coarse)):
            above, below = (_outer_at(problem, x, directions, sign * h, reference, throw) for sign in (1, -1))
            differences.append((above - below) / (2 * h))
    slope, near, far = (torch.tensor(values, dtype=torch.float64) for values in (slopes, fine, coarse))
    scale = float(near.norm()) or 1.0
    exact = problem.hypergradient(tree_map(torch.detach, x)) if hasattr(problem, "hypergradient") else None
    exact_error = None
    if exact is not None:
        exact_error = float(distance(found, leaves(exact)) / (torch.cat([e.reshape(-1) for e in leaves(exact)]).norm()))
    report = HypergradientCheck(
        near,
        slope,
        float((slope - near).norm()) / scale,
        float((near - far).norm()) / scale,
        exact_error,
        tolerance,
    )
    if raise_exception and not report.ok:
        raise HypergradientError(
            f"{report}. Slopes along {num_directions} random directions: hypergradient {slope.tolist()}, finite "
            f"differences {near.tolist()}. Residual norm of the inner solve: "
            f"{float(fit.stats['residual_norm'].max()):.1e}. "
            "Solve both systems more accurately (gtol, rtol); if it stays wrong, look for parts of the objective that "
            "are detached or not differentiable."
        )
    return report


def _outer_at(problem: Bilevel, x: Tree, directions: list[Tensor], size: float, solver: Any, throw: Throw) -> float:
    with torch.no_grad():
        rest = iter(directions)
        moved = tree_map(lambda leaf: leaf + size * next(rest), x)
        fit = solve(problem, moved, solver=solver, throw=throw)
        return float(problem.outer(fit.value, moved))
