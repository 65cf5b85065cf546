"""The checked hypergradient: the gradient, and how far it is from the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..linalg.cg import CG
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..linalg.scipy import GMRES
from ..solution import Solution, Throw
from ..tree import Tree, leaves, norm
from .problem import Bilevel, leaf_copies, solve, statement_of


@dataclass(frozen=True)
class Constants:
    """What is known of a problem with a strongly convex inner loss g, for an upper bound on the error.

    Args:
        strong_convexity: mu > 0, a lower bound on the eigenvalues of ``d_yy g``.
        cross: ``||d_xy g||``, an upper bound between the solution found and the exact one.
        cross_lipschitz: Lipschitz constant of ``d_xy g`` in y. hessian_lipschitz: of ``d_yy g`` in y.
        outer_gradient: ``||d_y f||``, an upper bound there. outer_smoothness: Lipschitz constant of ``d_y f`` in y.
        outer_cross: Lipschitz constant of ``d_x f`` in y.
    """

    strong_convexity: float
    cross: float
    cross_lipschitz: float = 0.0
    hessian_lipschitz: float = 0.0
    outer_gradient: float = 0.0
    outer_smoothness: float = 0.0
    outer_cross: float = 0.0

    def __post_init__(self) -> None:
        if not self.strong_convexity > 0:
            raise ValueError(
                f"strong_convexity is {self.strong_convexity}: the bound holds for a positive one only; without it, "
                "rely on the estimate."
            )

    def bound(self, inner_residual: float, linear_residual: float) -> float:
        """``||found - exact||`` at most (Ghadimi and Wang 2018, Lemma 2.2; Pedregosa 2016, Theorem 1).

        Args:
            inner_residual: ``||d_y g||`` at the solution found. linear_residual: ``||d_y f - H u||``.
        """
        mu = self.strong_convexity
        sensitivity = (
            self.outer_cross
            + self.cross * self.outer_smoothness / mu
            + self.outer_gradient * self.cross_lipschitz / mu
            + self.outer_gradient * self.cross * self.hessian_lipschitz / mu**2
        )
        return sensitivity * inner_residual / mu + self.cross * linear_residual / mu


def hypergradient(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: object = None,
    hypergrad: Implicit = Implicit(),  # noqa: B008 (frozen)
    constants: Constants | None = None,
    accuracy: float = 1e-3,
    throw: Throw = "warn",
) -> Solution:
    """The hypergradient of ``problem``, with an estimate of its own error, and a bound where constants are known.

    The estimate makes one Newton step from the solution found, solves the adjoint system there, starting from the one
    at hand, and compares: it sees the inner residual, the linear residual, damping and approximate operators alike. It
    costs about as much as the hypergradient did, less where that was accurate.

    Args:
        hparams: where; the problem's own by default.
        solver, hypergrad, throw: as in `argmin`.
        constants: for the bound.
        accuracy: relative accuracy of the two solves of the estimate.

    Returns:
        A `Solution` whose value is the hypergradient, a tree like hparams. Its stats: ``loss``, ``residual_norm`` and
        ``num_steps`` of the inner solve, ``linear_residual`` and ``linear_steps`` of the adjoint one,
        ``smallest_curvature`` and ``largest_curvature`` seen (NaN without a Lanczos process), ``error``, the estimated
        norm of the error, ``bound`` (inf without constants), and ``result``, the worse of the two solves. Its state is
        a tree like its value: the corrected hypergradient, whose error is smaller by orders where the problem is
        smooth.
    """
    where = problem.hparams if hparams is None else hparams
    x = leaf_copies(where)
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw=throw)
    loss, by_x, by_params = _outer_gradients(problem, fit.value, x)
    implicit = torch.autograd.grad(leaves(fit.value), leaves(x), by_params, allow_unused=True)
    found = [direct if more is None else direct + more for direct, more in zip(by_x, implicit, strict=True)]
    adjoint = fit.adjoint
    assert adjoint is not None
    corrected = _corrected(problem, hypergrad, fit, x, accuracy)
    nan = torch.full_like(adjoint.stats["residual_norm"], torch.nan)
    smallest, largest = adjoint.curvature or (nan, nan)
    sizes = (float(torch.linalg.vector_norm(part.stats["residual_norm"])) for part in (fit, adjoint))
    bound = constants.bound(*sizes) if constants else float("inf")
    stats = {
        "loss": loss,
        "residual_norm": fit.stats["residual_norm"],
        "num_steps": fit.stats["num_steps"],
        "linear_residual": adjoint.stats["residual_norm"],
        "linear_steps": adjoint.stats["num_steps"],
        "smallest_curvature": smallest,
        "largest_curvature": largest,
        "error": distance(corrected, found),
        "bound": torch.tensor(bound, dtype=torch.float64),
        "result": torch.maximum(fit.stats["result"], adjoint.stats["result"]),
    }
    spec = pytree.tree_structure(where)
    return Solution(
        pytree.tree_unflatten(found, spec),
        stats,
        (*fit.recovered, *adjoint.recovered),
        state=pytree.tree_unflatten(corrected, spec),
    )


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the difference of two lists of tensors, float64."""
    return norm(torch.cat([(one - other).reshape(-1).double() for one, other in zip(a, b, strict=True)]))


def _outer_gradients(problem: Bilevel, params: Tree, x: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outer loss at these params, and its partial derivatives by hparams and params."""
    free = leaf_copies(params)
    with torch.enable_grad():
        loss = problem.outer(free, x)
        wanted = [*leaves(x), *leaves(free)]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    filled = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, wanted, strict=True)]
    count = len(leaves(x))
    return loss.detach(), filled[:count], filled[count:]


def _corrected(problem: Bilevel, hypergrad: Implicit, fit: Solution, x: Tree, accuracy: float) -> list[Tensor]:
    """The hypergradient after one Newton step, with the adjoint solved from where it was left."""
    statement, flat = statement_of(problem, x)
    assert fit.adjoint is not None
    batch_dims = fit.stats["num_steps"].dim()
    hparams = [tensor.detach() for tensor in flat]
    first = Point(statement, [leaf.detach() for leaf in leaves(fit.value)], hparams, batch_dims, "ignore")
    raveler, exact = first.raveler, replace(hypergrad, operator="graph", damping=0.0)
    operator = exact.operator_at(first)
    residual = raveler.ravel([r.detach() for r in first.linearization().residual])
    step = _solve(operator, -residual, accuracy)
    params = raveler.unravel(raveler.ravel(first.params) + step)
    second = Point(statement, params, hparams, batch_dims, "ignore")
    tree = pytree.tree_unflatten(params, pytree.tree_structure(fit.value))
    _, by_x, by_params = _outer_gradients(problem, tree, x)
    operator = exact.operator_at(second).T
    u = raveler.ravel(leaves(fit.adjoint.value))
    u = u + _solve(operator, raveler.ravel(by_params) - operator.matvec(u), accuracy)
    implicit = second.linearization().pull(raveler.unravel(u))
    return [direct if more is None else direct + more for direct, more in zip(by_x, implicit, strict=True)]


def _solve(operator: Operator, b: Tensor, accuracy: float) -> Tensor:
    """As exact as asked for; where CG meets negative curvature, by MINRES."""
    if not operator.symmetric:
        return GMRES(rtol=accuracy).solve(operator, b).value
    found = CG(rtol=accuracy).solve(operator, b)
    return found.value if found.result.ok else MINRES(rtol=accuracy).solve(operator, b).value
