"""The checked hypergradient: the gradient, and how far it is from the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .._torch import pytree
from ..checks import check_fields
from ..context import differentiates
from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..linalg.cg import CG
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..solution import Solution, Throw
from ..tree import Tree, filled, leaves, norm, tree_map
from .precision import as_double, in_double
from .problem import SOLVED_KINDS, Bilevel, Solver, as_solved, leaf_copies, solve, statement_of


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
        check_fields(self)
        if not self.strong_convexity > 0:
            raise ValueError(
                f"strong_convexity is {self.strong_convexity}: the bound holds for a positive one only; without it, "
                "rely on the estimate."
            )
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: a bound on a norm is not negative.")

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


@differentiates
def hypergradient(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Solver | None = None,
    hypergrad: Implicit = Implicit(),  # noqa: B008 (frozen)
    constants: Constants | None = None,
    accuracy: float = 1e-3,
    throw: Throw = "warn",
) -> Solution:
    """The hypergradient of ``problem``, with an estimate of its own error, and a bound where constants are known.

    The estimate makes Newton steps from the solution found, in float64 whatever the precision of the problem, solves
    the adjoint system where they end, and compares: it sees the inner residual, the linear residual, rounding below
    float64, damping and approximate operators alike. It costs about as much as the hypergradient did, less where that
    was accurate; with up to 512 unknowns it factorises.

    Args:
        hparams: where; the problem's own by default.
        solver, hypergrad, throw: as in `argmin`.
        constants: for the bound.
        accuracy: relative accuracy of the estimate.

    Returns:
        A `Solution` whose value is the hypergradient, a tree like hparams. Its stats: ``loss``, ``residual_norm`` and
        ``num_steps`` of the inner solve, ``linear_residual`` and ``linear_steps`` of the adjoint one,
        ``smallest_curvature`` and ``largest_curvature`` seen (NaN without a Lanczos process), ``error``, the estimated
        norm of the error (inf where Newton steps find no solution near the one at hand, or cannot be computed, and
        where the adjoint system has no solution),
        ``bound`` (inf without constants), and ``result``, the worse of the two solves. Its state is a tree like its
        value: the corrected hypergradient, whose error is smaller by orders where the problem is smooth.
    """
    where = problem.hparams if hparams is None else hparams
    x = leaf_copies(where)
    problem, solver = as_solved(problem, solver)
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw=throw)
    loss, by_x, by_params = outer_gradients(problem, fit.value, x)
    implicit = torch.autograd.grad(leaves(fit.value), leaves(x), by_params, allow_unused=True)
    found = _summed(by_x, implicit)
    adjoint = fit.adjoint
    assert adjoint is not None
    corrected, solved = corrected_hypergradient(problem, fit, x, accuracy)
    error = distance(corrected, found)
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
        "error": error if solved else torch.full_like(error, torch.inf),
        "bound": torch.tensor(bound, dtype=torch.float64, device="cpu"),
        "result": torch.maximum(fit.stats["result"], adjoint.stats["result"]),
    }
    spec = pytree.tree_structure(where)
    return Solution(
        pytree.tree_unflatten(found, spec),
        stats,
        (*fit.recovered, *adjoint.recovered),
        state=pytree.tree_unflatten([c.to(f.dtype) for c, f in zip(corrected, found, strict=True)], spec),
    )


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the difference of two lists of tensors, float64."""
    return norm(torch.cat([(one - other).reshape(-1).double() for one, other in zip(a, b, strict=True)]))


def outer_gradients(problem: Bilevel, params: Tree, x: Tree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outer loss at these params, and its partial derivatives by hparams and params."""
    free = leaf_copies(params)
    with torch.enable_grad():
        loss = problem.outer(free, x)
        wanted = [*leaves(x), *leaves(free)]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    count, all_grads = len(leaves(x)), filled(grads, wanted)
    return loss.detach(), all_grads[:count], all_grads[count:]


def corrected_hypergradient(problem: Bilevel, fit: Solution, x: Tree, accuracy: float) -> tuple[list[Tensor], bool]:
    """The hypergradient where Newton steps from the solution found end, float64 leaves, and whether that is a root."""
    problem = in_double(problem, fit.value, x)
    x, value = (tree_map(lambda leaf: as_double(leaf.detach()), tree) for tree in (x, fit.value))
    x = leaf_copies(x)
    point, solved = refined(problem, value, x, fit.stats["num_steps"].dim(), accuracy)
    tree = pytree.tree_unflatten(point.params, pytree.tree_structure(value))
    _, by_x, by_params = outer_gradients(problem, tree, x)
    operator, raveler = _jacobian(point).T, point.raveler
    b = raveler.ravel(by_params)
    u = torch.zeros_like(b)
    if problem.kind in SOLVED_KINDS and fit.adjoint is not None:
        u = raveler.ravel([as_double(leaf) for leaf in leaves(fit.adjoint.value)])
    change, reached = _solve(operator, b - operator.matvec(u), accuracy)
    pulled = point.linearization().pull(raveler.unravel(u + change))
    return _summed(by_x, pulled), solved and reached


def refined(
    problem: Bilevel, params: Tree, x: Tree, batch_dims: int, accuracy: float, most: int | None = None
) -> tuple[Point, bool]:
    """The point where Newton steps from ``params`` have become small beside the way that they went.

    The ratio is ``accuracy``. They end earlier where none of 1, 1/2, 1/4, ... of a step shrinks the residual: at
    rounding, or where there is no root. The second value is False where the last step was not small beside the params,
    so that no root is near, or where no step could be computed.

    Args:
        most: steps of a linear solve of more unknowns than are factorised, and then few Newton steps; None: as many
            as it takes.
    """
    statement, flat = statement_of(problem, x)
    hparams = [tensor.detach() for tensor in flat]

    def at(y: Sequence[Tensor]) -> Point:
        return Point(statement, list(y), hparams, batch_dims, "ignore")

    point = at([leaf.detach() for leaf in leaves(params)])
    raveler = point.raveler
    start = y = raveler.ravel(point.params)
    far = raveler.ravel([leaf.detach() for leaf in leaves(problem.init)])
    for _ in range(MOST_NEWTON_STEPS if most is None else FEW_NEWTON_STEPS):
        residual = _residual(point)
        step, reached = _solve(_jacobian(point), -residual, accuracy, most)
        scale = torch.maximum(norm(y), norm(y - far))
        for halvings in range(MOST_HALVINGS):
            trial = at(raveler.unravel(y + step / 2**halvings))
            better = norm(_residual(trial)) < (1 - 0.1 / 2**halvings) * norm(residual)
            if bool(better.any()):
                break
        if not (reached and bool(better.any())):
            break
        y = torch.where(better.unsqueeze(-1), raveler.ravel(trial.params), y)
        point = trial if bool(better.all()) else at(raveler.unravel(y))
        if bool((norm(step) <= accuracy * norm(y - start)).all()):
            return point, True
    return point, reached and bool((norm(step) <= accuracy * scale).all())  # at rounding, where small gains go on


MOST_NEWTON_STEPS, FEW_NEWTON_STEPS, MOST_HALVINGS, LARGEST_FACTORISED = 50, 10, 10, 512


def _residual(point: Point) -> Tensor:
    """The residual at a point, flat ``[*batch, n]``."""
    return point.raveler.ravel([r.detach() for r in point.linearization().residual])


def _jacobian(point: Point) -> Operator:
    return Implicit().operator_at(point)


def _summed(direct: Sequence[Tensor], more: Sequence[Tensor | None]) -> list[Tensor]:
    return [one if other is None else one + other for one, other in zip(direct, more, strict=True)]


def _solve(operator: Operator, b: Tensor, accuracy: float, most: int | None = None) -> tuple[Tensor, bool]:
    """The solution of least norm, to a relative error of ``accuracy`` as far as the condition number is seen.

    The second value is False where not even the residual became as small.
    """
    if operator.size <= LARGEST_FACTORISED:
        matrix = operator.to_dense()
        cutoff = operator.size * torch.finfo(matrix.dtype).eps
        x = (torch.linalg.pinv(matrix, rtol=cutoff) @ b.unsqueeze(-1)).squeeze(-1)
        return x, bool((norm(b - operator.matvec(x)) <= accuracy * norm(b)).all())
    if not operator.symmetric:
        found = GMRES(rtol=accuracy, max_steps=most).solve(operator, b)
        return found.value, found.result.ok
    found = CG(rtol=accuracy, max_steps=most).solve(operator, b)
    if not found.result.ok or found.curvature is None:
        found = MINRES(rtol=accuracy, max_steps=most).solve(operator, b)
        return found.value, found.result.ok
    low, high = found.curvature
    tight = accuracy * float((low / high).nan_to_num(1.0).clamp(1e-12, 1.0).min()) ** 0.5
    return CG(rtol=tight, max_steps=most).solve(operator, b, found.state).value, True
