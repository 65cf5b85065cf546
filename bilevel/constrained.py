"""`constrained`: minima under equality constraints, differentiable through the conditions of Lagrange."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from .argmin import Params
from .checks import check_function, check_hypergrad, check_numbers, check_solver, check_start, check_warm_start
from .closure import Closure, Tracer, VmappedClosure
from .context import solves
from .hypergrad.base import Hypergrad, PathMethod
from .hypergrad.differentiate import differentiable_solve
from .hypergrad.implicit import Implicit
from .hypergrad.search import Search
from .hypergrad.statement import SymmetricResidualStatement
from .inner.lbfgs import LBFGS
from .inner.minimize import InnerSolver
from .inner.nearness import STILL, Goal
from .inner.proximal import minimises_more
from .inner.roots import Newton, RootSolver
from .linalg.direct import LeastNorm
from .linalg.jacobian import GraphJacobian
from .linalg.noise import normal, signs
from .linalg.operator import widened
from .linalg.scaled import SMALL
from .notices import tell
from .problem import Problem, RootProblem, check_batch, check_init
from .recording import recording
from .solution import Result, Solution, SolveWarning, Throw, check_throw, marked
from .tree import Raveler, Tree, axpy, leaves, norm, scale, tree_map

MOVE = 1e-3
"""Relative change of the params by which the sizes of losses and constraints are found."""

FLAT = 1e-2
"""Part of a change at a distance that is none beside the start."""

ADVICE = (
    "The hypergradient holds at a constrained minimum only: start closer to it, look whether any point meets all "
    "constraints and whether their gradients are independent there, or raise max_steps"
)
SADDLE = (
    "The conditions of Lagrange hold, but at a saddle or maximum along the constraints: start elsewhere, or look "
    "whether the objective has a minimum there or falls without end (a maximum is the minimum of minus the objective)"
)
UNBOUNDED = (
    "The objective seems to fall without end where the constraints hold: constrain or penalise what grows, or start "
    "closer to the minimum (a maximum is the minimum of minus the objective). If there is a minimum, hold the "
    "constraints more strongly from the start: AugmentedLagrangian(strength=1e4)"
)

DEGENERATE = (
    "The constrained problem is degenerate: its constraints depend on each other, or its minimum is not isolated, so "
    "that multipliers and derivatives are not unique. Drop constraints that say nothing new, penalise the objective, "
    "or pass throw='ignore'."
)


class ConstrainedSolution(NamedTuple, Generic[Params]):
    """The minimum, a tree like ``init``, and the multipliers, ``[*batch, m]``."""

    params: Params
    multipliers: Tensor


@solves
def constrained(
    objective: Callable[..., Tensor],
    constraints: Callable[..., Tensor],
    init: Params,
    *args: Any,
    solver: RootSolver | None = None,
    hypergrad: Hypergrad | None = Implicit(),  # noqa: B008 (frozen)
    batched: bool = False,
    throw: Throw = "warn",
    warm_start: Solution | None = None,
) -> Solution[ConstrainedSolution[Params]]:
    """Minimise ``objective(params, *args)`` where ``constraints(params, *args) = 0``; the solution is differentiable.

    It is the root of ``(grad f + J' nu, c)``, the gradient of the Lagrangian ``f + nu . c``, whose Jacobian is
    symmetric and indefinite: the adjoint is solved by `MINRES`. Both parts of the solution are differentiable; a
    multiplier is the price of its constraint, minus the slope of the minimum by the value that c is held at. Loss and
    constraints are divided by their slopes around the start first, so that their units do not matter.

    Args:
        objective, constraints: a scalar, and a vector ``[m]`` of fewer constraints than params; both differentiable
            twice, the constraints with independent gradients at the solution.
        init: where to start; it need not meet the constraints.
        solver: `AugmentedLagrangian` by default, which finds minima; `Newton` finds the nearest stationary point.
        hypergrad: `Implicit` or another method that `root` takes.
        batched: T problems: every leaf has T first, objective returns ``[T]`` and constraints ``[T, m]``.
        args, throw, warm_start: as in `argmin`.

    Returns:
        A `Solution` whose value is a `ConstrainedSolution`. ``stats["residual_norm"]`` is that of the root, of
        scaled functions. A stationary point that is no minimum along the constraints has `Result.NEGATIVE_CURVATURE`,
        and ``stats["degenerate"]`` says where neither the multipliers nor the derivative are unique, which warns; both
        are looked at up to 512 unknowns.

    Raises:
        TypeError, ValueError: bad input. SolveError: as ``throw`` says.
    """
    check_throw(throw)
    check_function("objective", objective, init, "constrained")
    check_function("constraints", constraints, init, "constrained")
    check_start(init)
    check_solver(solver, "find", "constrained")
    check_init(init)
    check_hypergrad(hypergrad)
    check_warm_start(warm_start)
    if isinstance(hypergrad, PathMethod):
        raise TypeError(f"hypergrad is {hypergrad!r}: a constrained problem takes Implicit(linear_solver), or None.")
    dims = int(batched)
    batch = check_batch(init, dims)
    detached = tree_map(torch.Tensor.detach, init)
    aside = Tracer(differentiable=False)  # which gives evaluations copies of tensors of inference mode
    with torch.no_grad(), aside:
        loss, found = objective(detached, *args), constraints(detached, *args)
    if not isinstance(found, Tensor) or found.shape[:-1] != batch or found.dim() != dims + 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"constraints returned {shape}: a vector [m], or [T, m] with batched=True, is needed.")
    if not isinstance(loss, Tensor) or loss.shape != batch or not loss.is_floating_point():
        kind = f"{tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective returned {kind}: a scalar, or [T] with batched=True, is needed, of floating point."
        )
    start = ConstrainedSolution(init, torch.zeros_like(found))
    with torch.no_grad(), aside:
        units = Units.at(
            lambda params: objective(params, *args), lambda params: constraints(params, *args), detached, len(batch)
        ).within(loss.dtype, found.dtype)

    def scaled_objective(params: Tree, *args: Any) -> Tensor:
        *own, units = args
        loss = objective(params, *own)
        scaled: Tensor = loss / units.loss.to(loss.dtype)
        return scaled

    def scaled_constraints(params: Tree, *args: Any) -> Tensor:
        *own, units = args
        gap = constraints(params, *own)
        scaled: Tensor = gap / units.gap.to(gap.dtype)
        return scaled

    def stationarity(point: ConstrainedSolution[Tree], *args: Any) -> ConstrainedSolution[Tree]:
        def lagrangian(params: Tree) -> tuple[Tensor, Tensor]:
            gap = scaled_constraints(params, *args)
            return scaled_objective(params, *args).sum() + (point.multipliers * gap).sum(), gap

        slope, gap = torch.func.grad(lagrangian, has_aux=True)(point.params)
        return ConstrainedSolution(slope, gap)

    def build(tracer: Tracer) -> RootProblem:
        problem = RootProblem(stationarity, start, (*args, units), batch_dims=dims, tracer=tracer)
        problem.data = (
            lambda point: problem.under_rules(scaled_objective, problem.raveler.unflatten(point).params),
            lambda point: problem.under_rules(scaled_constraints, problem.raveler.unflatten(point).params),
        )
        return problem

    method = solver or AugmentedLagrangian()
    tells = throw != "ignore" and hypergrad is not None
    solution = differentiable_solve(
        lambda closure: LagrangianStatement(
            closure,
            replace(closure, fn=lambda point, *args: scaled_objective(point.params, *args)),
            replace(closure, fn=lambda point, *args: scaled_constraints(point.params, *args)),
        ),
        stationarity,
        start,
        (*args, units),
        build=build,
        batch_dims_of=lambda _, __: dims,
        search=Search(
            method.find, throw, "The constrained solve", _advice, complete=partial(_look_at_curvature, warn=tells)
        ),
        hypergrad=hypergrad,
        warm_start=warm_start,
    )
    price = units.loss.unsqueeze(-1) / units.gap
    found = solution.value
    return solution.with_value(ConstrainedSolution(found.params, found.multipliers * price.to(found.multipliers.dtype)))


class Units(NamedTuple):
    """What the loss and each constraint change by, about, over a unit of the params: ``[*batch]``, ``[*batch, m]``.

    Divided by them, gradients of both have the size of one, multipliers that of the params. They are powers of two, by
    which no digit changes.
    """

    loss: Tensor
    gap: Tensor

    @classmethod
    def at(
        cls, objective: Callable[[Tree], Tensor], constraints: Callable[[Tree], Tensor], init: Tree, batch_dims: int
    ) -> Units:
        """Found by differences beside the start, where gradients may vanish; none of it is differentiated.

        The size of the params is that of the start, or the way from there to where the constraints hold, or to the
        minimum of the loss without them.
        """
        raveler = Raveler(init, leaves(init)[0].shape[:batch_dims])
        y = raveler.ravel(leaves(init))

        def gap(y: Tensor) -> Tensor:
            return widened(constraints(raveler.unflatten(raveler.unravel(y)))).double()

        def slope(y: Tensor) -> Tensor:
            grads = torch.func.grad(lambda params: objective(params).sum())(raveler.unflatten(raveler.unravel(y)))
            return raveler.ravel(leaves(grads))

        def beside(fn: Callable[[Tensor], Tensor], like: Tensor, reach: Tensor, wave: Tensor) -> Tensor:
            try:
                return fn(axpy(reach, wave, y))
            except (
                ArithmeticError,
                ValueError,
                RuntimeError,
            ):  # outside of the domain (of a solve inside, too)
                return torch.full_like(like, torch.nan)

        def steepness(reach: Tensor) -> Tensor:
            changes = [(beside(gap, here, reach, wave) - here).abs().nan_to_num(0, 0, 0) for wave in waves]
            steep: Tensor = torch.stack(changes).amax(0) / reach.unsqueeze(-1)
            return steep

        def curvature(reach: Tensor) -> Tensor:
            curved: Tensor = norm(beside(slope, ground, reach, waves[0]) - ground) / (reach * root)
            return curved

        def first(*sizes: Tensor) -> Tensor:
            """The first that is a size."""
            found = torch.ones_like(sizes[0])
            for size in reversed(sizes):
                found = torch.where((size > 0) & torch.isfinite(size), size, found)
            return found

        def unless_flat(near: Tensor, far: Tensor) -> Tensor:
            return torch.where((near > FLAT * far) | ~torch.isfinite(far), near, far)

        root = raveler.size**0.5
        waves = [normal(y.shape, seed, y.device).to(y.dtype) for seed in range(3)]
        here, ground = gap(y), slope(y)
        size = norm(y) / root
        length = first(size)
        for last in (False, True):
            steep = unless_flat(steepness(MOVE * length), steepness(length))
            steep = first(steep, steep.amax(-1, keepdim=True).expand_as(steep))
            away = here.abs() / steep
            nearest = torch.where(away > 0, away, away.amax(-1, keepdim=True)).amin(-1)
            # What is flat seems far away, until it is seen from a distance: half of the way by orders of magnitude.
            away = away.amax(-1) / root if last else (length * nearest / root).sqrt()
            curved = curvature(MOVE * length)
            length = first(torch.maximum(size, away), size, norm(ground) / root / curved)
        near = torch.maximum(curved.nan_to_num(0, 0, 0), norm(ground) / root / length)
        loss = first(unless_flat(near, curvature(length)))
        return cls(*(unit.log2().round().exp2().detach() for unit in (loss, steep)))

    def within(self, loss: torch.dtype, gap: torch.dtype) -> Units:
        """The same in these dtypes, as near as they go."""
        limits = (torch.finfo(dtype) for dtype in (loss, gap))
        found = [unit.clamp(info.smallest_normal, info.max / 2) for unit, info in zip(self, limits, strict=True)]
        return Units(found[0].to(loss), found[1].to(gap))


@dataclass(frozen=True)
class LagrangianStatement(SymmetricResidualStatement):
    """The conditions of Lagrange, with the two functions for the solver."""

    objective: Closure | VmappedClosure
    constraints: Closure | VmappedClosure

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> RootProblem:
        problem = super().problem(start, hparams, batch_dims)
        problem.data = (lambda point: self.objective(point, hparams), lambda point: self.constraints(point, hparams))
        return problem

    def vmapped(self, in_dims: tuple[int | None, ...]) -> LagrangianStatement:
        parts = (self.closure, self.objective, self.constraints)
        return LagrangianStatement(*(VmappedClosure(part, in_dims) for part in parts))


@dataclass(frozen=True)
class AugmentedLagrangian:
    """Augmented Lagrangian (Hestenes 1969): minimise, move the multipliers, in turns; then Newton's steps.

    Minimised is ``f + <nu, c> + mu ||c||^2 / 2``, and ``nu <- nu + mu c`` follows.

    Args:
        inner: what minimises. rounds: turns at most. strength: mu of the first one, for functions of slopes of one;
            tenfold where a turn does not take three quarters off ``||c||``.
        newton: makes the end accurate.
    """

    inner: InnerSolver = LBFGS(max_steps=200)  # noqa: RUF009 (frozen)
    rounds: int = 12
    strength: float = 10.0
    newton: Newton = Newton(LeastNorm())  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.rounds < 1 or not self.strength > 0:
            raise ValueError(f"rounds is {self.rounds} and strength {self.strength}: both are positive.")

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root that is a minimum; see `RootSolver`.

        Raises:
            TypeError: the system is not that of a Lagrangian.
        """
        if not isinstance(problem.data, tuple) or len(problem.data) != 2:
            raise TypeError(
                "AugmentedLagrangian serves bl.constrained, whose objective it needs; take Newton() for root."
            )
        near = copy.copy(problem)
        near.y, fell = self._near(problem)
        near.r = problem.evaluate(near.y)
        found = self.newton.find(near)
        codes = found.stats["result"]
        worse = (codes <= int(Result.STEPS_DONE)) & (norm(problem.evaluate(found.value)) > norm(problem.r))
        codes = marked(codes, worse | self._apart(problem, found.value), Result.STAGNATED)
        doubtful = (codes > int(Result.STEPS_DONE)) | (problem.raveler.size > SMALL)  # a small root is looked at
        return found.with_stats(result=marked(codes, fell & doubtful, Result.UNBOUNDED))

    def _apart(self, problem: RootProblem, y: Tensor) -> Tensor:
        """Whether constraints are left that no point meets: by what they are beside their changes with the params.

        Newton's step is none there, and large multipliers hide what is left.
        """
        constraints = problem.data[1]
        *params, multipliers = problem.raveler.unravel(y.detach())
        with torch.no_grad():

            def gap(leaves: list[Tensor]) -> Tensor:
                return widened(constraints([*leaves, multipliers]))

            left = gap(params)
            largest = norm(gap(problem.raveler.unravel(problem.y)[:-1]))
            for seed in (None, 0, 1):
                moved = [
                    leaf * (1 + MOVE * (1 if seed is None else signs(leaf.shape, seed, leaf.device).to(leaf.dtype)))
                    for leaf in params
                ]
                largest = torch.maximum(largest, norm(gap(moved) - left) / MOVE)
        return norm(left) > Goal.of(y.dtype, problem.raveler.coarsest).promised * largest

    def _near(self, problem: RootProblem) -> tuple[Tensor, Tensor]:
        """A point near the minimum, and which problems fell without end in a turn."""
        objective, constraints = problem.data
        *params, multipliers = problem.raveler.unravel(problem.y)
        if minimises_more(self.inner, objective, params):
            raise TypeError(
                f"inner is {self.inner!r}, with bounds, a prox or a weight decay, which the solution would not have: "
                "the conditions of Lagrange are those of the objective and the equality constraints alone. Put a "
                "penalty into the objective, or take quadratic_program, which has inequalities."
            )
        mu = torch.full(problem.y.shape[:-1], self.strength, dtype=torch.float64, device=problem.y.device)
        fell = torch.zeros_like(mu, dtype=torch.bool)
        rounding = torch.finfo(problem.raveler.coarsest).eps
        enough = max(1e-4, rounding)
        gap = first = None
        for _ in range(self.rounds):

            def augmented(params: list[Tensor], nu: Tensor = multipliers, mu: Tensor = mu) -> Tensor:
                c = widened(constraints([*params, nu]))
                found: Tensor = objective([*params, nu]) + (nu * c).sum(-1) + mu.to(c.dtype) / 2 * c.square().sum(-1)
                return found

            inner = Problem(augmented, params, max_batch_dims=mu.dim())
            found = self.inner.minimize(inner)
            # Where mu is smaller than the curvature that the constraints hold, it falls for ever: that turn is lost.
            with torch.no_grad():
                reached = inner.raveler.unravel(found.value.detach())
                ahead = augmented(reached, mu=100 * mu)
                # Too long steps, which a larger mu makes longer yet.
                rose = augmented(reached) > inner.start.f + rounding**0.75 * inner.start.f.abs()
                fallen = (found.stats["result"] >= int(Result.UNBOUNDED)) | ~torch.isfinite(ahead)
                lost = rose | fallen
                params = inner.raveler.unravel(torch.where(lost.unsqueeze(-1), inner.start.y, found.value.detach()))
                c = widened(constraints([*params, multipliers]))
            fell = fell | (fallen & ~rose)
            if bool(rose.all()):
                break
            if not bool(torch.isfinite(c).all()):
                return problem.y, fell
            multipliers = multipliers + scale(torch.where(lost, 0.0, mu), c)
            size = norm(c)
            first = size if first is None else torch.maximum(first, size)
            # Params that stay where they are: a larger mu would multiply what rounding leaves of the constraints.
            still = (norm(found.value - inner.start.y) <= rounding * norm(found.value)) & (size <= STILL * first)
            if bool((~lost & (still | (size <= enough * first))).all()):
                break
            slow = lost if gap is None else lost | (~still & (size > 0.25 * gap))
            mu, gap = torch.where(slow & ~rose, 10 * mu, mu), size
        return problem.raveler.ravel([*params, multipliers]), fell


def _advice(_: RootProblem, found: Solution[Tensor]) -> str:
    return {Result.NEGATIVE_CURVATURE: SADDLE, Result.UNBOUNDED: UNBOUNDED}.get(found.result, ADVICE)


def _look_at_curvature(problem: RootProblem, found: Solution[Tensor], *, warn: bool) -> Solution[Tensor]:
    """At a minimum the Jacobian has as many negative eigenvalues as there are constraints, and none that is zero."""
    good = found.stats["result"] <= int(Result.STEPS_DONE)
    flagged = found.with_stats(degenerate=torch.zeros_like(good))
    if recording() or problem.raveler.size > SMALL or not bool(good.any()):
        return flagged
    jacobian = GraphJacobian(problem.raveler, problem.linearize(found.value.detach()), symmetric=True)
    matrix = jacobian.to_dense().double().nan_to_num(0, 0, 0)
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    rounding = torch.finfo(jacobian.dtype).eps ** 0.75 * values.abs().amax(-1, keepdim=True)
    saddle = (values < -rounding).sum(-1) > problem.raveler.sizes[-1]
    degenerate = good & (values.abs() <= rounding).any(-1)
    if warn and bool(degenerate.any()):
        tell(DEGENERATE, SolveWarning)
    codes = marked(found.stats["result"], good & saddle, Result.NEGATIVE_CURVATURE)
    return flagged.with_stats(result=codes, degenerate=degenerate)
