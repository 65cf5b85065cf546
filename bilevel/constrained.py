"""`constrained`: minima under equality constraints, differentiable through the conditions of Lagrange."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from .argmin import Params
from .checks import (
    check_fields,
    check_flag,
    check_function,
    check_hypergrad,
    check_solver,
    check_start,
    check_warm_start,
)
from .closure import Closure, Tracer, VmappedClosure, in_transform
from .context import solves
from .hypergrad.base import Hypergrad, PathMethod, Point
from .hypergrad.differentiate import differentiable_solve
from .hypergrad.implicit import Implicit
from .hypergrad.search import Search
from .hypergrad.statement import Solve, SymmetricResidualStatement
from .inner.lbfgs import LBFGS
from .inner.minimize import InnerSolver
from .inner.nearness import Goal
from .inner.proximal import minimises_more
from .inner.roots import Newton, RootSolver
from .inner.watch import seen_as
from .linalg.direct import LeastNorm
from .linalg.jacobian import GraphJacobian
from .linalg.noise import normal, signs
from .linalg.operator import Operator, widened
from .linalg.scaled import SMALL
from .notices import tell
from .problem import Problem, RootProblem, check_batch, check_init, gradient_or_zero
from .recording import recording
from .solution import Result, Solution, SolveWarning, Throw, check_throw, marked
from .tree import Raveler, Tree, axpy, leaves, norm, tree_map

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
    multiplier is the price of its constraint, minus the slope of the minimum by the value that c is held at. All is
    scaled within, so that the units of the loss, of each constraint and of each leaf of the params do not matter.

    Args:
        objective, constraints: a scalar, and a vector ``[m]`` of fewer constraints than params; both differentiable
            twice, the constraints with independent gradients at the solution.
        init: where to start; it need not meet the constraints.
        solver: `AugmentedLagrangian` by default, which finds minima; `Newton` finds the nearest stationary point.
        hypergrad: `Implicit` or another method that `root` takes.
        batched: T problems: every leaf has T first, objective returns ``[T]`` and constraints ``[T, m]``.
        args, throw, warm_start: as in `argmin`.

    Returns:
        A `Solution` whose value is a `ConstrainedSolution`. ``stats["residual_norm"]`` is that of the root. A
        stationary point that is no minimum along the constraints has `Result.NEGATIVE_CURVATURE`, and
        ``stats["degenerate"]`` says where neither the multipliers nor the derivative are unique, which warns; both are
        looked at up to 512 unknowns.

    Raises:
        TypeError, ValueError: bad input. SolveError: as ``throw`` says.
    """
    check_throw(throw)
    check_flag("batched", batched)
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
    tracer = Tracer(differentiable=False)  # which leaves running statistics as they are
    detached = tree_map(torch.Tensor.detach, init)
    if not in_transform():
        detached = tree_map(torch.Tensor.requires_grad_, detached)
    with torch.enable_grad(), tracer:
        loss, found = objective(detached, *args), constraints(detached, *args)
    if tracer.differentiates:
        raise NotImplementedError(
            "The objective or a constraint takes gradients by torch.autograd.grad, and constrained differentiates them "
            "with torch.func, where that does not work: write torch.func.grad, vjp or jvp in its place."
        )
    if not isinstance(found, Tensor) or found.shape[:-1] != batch or found.dim() != dims + 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"constraints returned {shape}: a vector [m], or [T, m] with batched=True, is needed.")
    if found.shape[-1] == 0:
        raise ValueError("constraints returned no numbers, [0]: without constraints take argmin.")
    if not found.is_floating_point():
        raise ValueError(f"constraints returned a vector of {found.dtype}: floating point is needed.")
    if not isinstance(loss, Tensor) or loss.shape != batch or not loss.is_floating_point():
        kind = f"{tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective returned {kind}: a scalar, or [T] with batched=True, is needed, of floating point."
        )
    start = ConstrainedSolution(init, torch.zeros_like(found))

    def stationarity(point: ConstrainedSolution[Tree], *args: Any) -> ConstrainedSolution[Tree]:
        def lagrangian(params: Tree) -> tuple[Tensor, Tensor]:
            gap = constraints(params, *args)
            return objective(params, *args).sum() + (point.multipliers * gap).sum(), gap

        slope, gap = torch.func.grad(lagrangian, has_aux=True)(point.params)
        return ConstrainedSolution(slope, gap)

    def build(tracer: Tracer) -> RootProblem:
        problem = RootProblem(stationarity, start, args, batch_dims=dims, tracer=tracer)
        held = weakref.proxy(problem)  # it is the problem that holds them
        problem.data = (
            lambda point: held.under_rules(objective, held.raveler.unflatten(point).params),
            lambda point: held.under_rules(constraints, held.raveler.unflatten(point).params),
        )
        return problem

    method = solver or AugmentedLagrangian()
    if not isinstance(method, AugmentedLagrangian):
        method = Balanced(method)
    tells = throw != "ignore" and hypergrad is not None
    return differentiable_solve(
        lambda closure: LagrangianStatement(
            closure,
            replace(closure, fn=lambda point, *args: objective(point.params, *args)),
            replace(closure, fn=lambda point, *args: constraints(point.params, *args)),
        ),
        stationarity,
        start,
        args,
        build=build,
        batch_dims_of=lambda _, __: dims,
        search=Search(
            method.find, throw, "The constrained solve", _advice, complete=partial(_look_at_curvature, warn=tells)
        ),
        hypergrad=hypergrad,
        warm_start=warm_start,
    )


class Units(NamedTuple):
    """What the loss and each constraint change by, about, over a unit of the params: ``[*batch]``, ``[*batch, m]``.

    Divided by them, gradients of both have the size of one, multipliers that of the params. They are powers of two, by
    which no digit changes.
    """

    loss: Tensor
    gap: Tensor

    @classmethod
    def at(
        cls,
        objective: Callable[[list[Tensor]], Tensor],
        constraints: Callable[[list[Tensor]], Tensor],
        params: list[Tensor],
        batch_dims: int,
    ) -> Units:
        """Found by differences beside these params, where gradients may vanish.

        The size of the params is their own, or the way from there to where the constraints hold, or to the minimum of
        the loss without them.
        """
        raveler = Raveler(params, params[0].shape[:batch_dims])
        y = raveler.ravel(params)

        def gap(y: Tensor) -> Tensor:
            with torch.no_grad():
                return widened(constraints(raveler.unravel(y))).double()

        def slope(y: Tensor) -> Tensor:
            with torch.enable_grad():
                free = [leaf.detach().requires_grad_() for leaf in raveler.unravel(y)]
                return raveler.ravel(gradient_or_zero(objective(free).sum(), free))

        def beside(fn: Callable[[Tensor], Tensor], like: Tensor, reach: Tensor, wave: Tensor) -> Tensor:
            try:
                return fn(axpy(reach, wave, y))
            except (ArithmeticError, ValueError, RuntimeError):  # outside of the domain (of a solve inside, too)
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
        return cls(*map(power_of_two, (loss, steep)))


def power_of_two(size: Tensor) -> Tensor:
    """The nearest one, by which no digit changes."""
    return size.log2().round().exp2()


def balance(operator: Operator, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """``d [*batch, n + m]``, such that ``d K d`` has blocks of one size: the Hessian by leaves, and each constraint.

    K alone does not say how large the Hessian is beside the constraints: multipliers have units of their own. It is
    seen by products with random vectors. Where a loss is as good as linear, its gradient over the params stands for the
    Hessian, so that multipliers are not larger than the params, and both count in the length of a step.

    Args:
        operator: the Jacobian K of the conditions of Lagrange. y: params and multipliers. sizes: of the leaves of both.

    Returns:
        Powers of two, by which no digit changes.
    """
    parts = list(sizes[:-1])
    dual = torch.arange(y.shape[-1], device=y.device) >= sum(parts)
    blocks = torch.cat([torch.full((part,), index, device=y.device) for index, part in enumerate(parts)])

    def by_leaf(vector: Tensor) -> Tensor:
        """The root mean squares of the leaves of params, at each of their numbers, and one at multipliers."""
        means = [part.square().mean(-1, keepdim=True).sqrt() for part in vector[..., : len(blocks)].split(parts, -1)]
        rest = torch.ones_like(vector[..., len(blocks) :])
        return torch.cat([torch.cat(means, -1).index_select(-1, blocks), rest], -1)

    def product(vector: Tensor) -> Tensor:
        return operator.matvec(vector.to(y.dtype)).double()

    waves = [normal(y.shape, seed, y.device).masked_fill(dual, 0.0) for seed in range(3)]
    pull = product(y.masked_fill(~dual, 0.0))
    d = torch.ones_like(y, dtype=torch.float64)
    for _ in range(SWEEPS):
        rows = torch.stack([(d * product(d * wave)).square() for wave in waves]).mean(0).sqrt()
        bends, slope = by_leaf(rows), (by_leaf(d * pull) / by_leaf(y.double() / d)).nan_to_num(0.0, 0.0)
        most = torch.where(bends > 0, bends / torch.finfo(y.dtype).eps ** 0.5, torch.inf)  # the params may be zero
        size = torch.maximum(bends, torch.minimum(slope, most)).masked_fill(dual, 1.0)
        d = d * torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size)).rsqrt()
    rows = torch.stack([product(d * wave).square() for wave in waves]).mean(0).sqrt()
    return power_of_two(torch.where(dual & (rows > 0) & torch.isfinite(rows), 1 / rows, d)).to(y.dtype)


SWEEPS = 6
"""In which the sizes of leaves are balanced beside each other."""

TURNS = 6
"""Solves at most, each in the units of where the last one ended."""

RESTING = 1e-2
"""Part of the constraints that rounding may leave, at most, where the params do not move."""

STALE = 1e3
"""Times the params, in their units: longer multipliers are of where the params have been."""


@dataclass(frozen=True)
class Balanced:
    """A solver of the conditions of Lagrange in units of their own, measured again until they are those of its end."""

    solver: RootSolver

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """See `RootSolver`."""
        return self.find_from(problem, problem.y)[0]

    def find_from(self, problem: RootProblem, y: Tensor) -> tuple[Solution[Tensor], Tensor]:
        """What is found from ``y``, and the units of its end."""
        raveler = problem.raveler
        steps = torch.zeros(raveler.batch_shape, dtype=torch.int64, device=y.device)
        d = self.units(problem, y)
        for _ in range(TURNS):

            def residual(point: Tree, d: Tensor = d) -> Tree:
                found = d * problem.flat_residual(d * raveler.ravel(leaves(point)))
                return raveler.unflatten(raveler.unravel(found))

            solver = seen_as(self.solver, lambda step, d=d: replace(step, flat=d * step.flat))  # type: ignore[misc]
            start = raveler.unflatten(raveler.unravel(y / d))
            found = solver.find(RootProblem(residual, start, batch_dims=len(raveler.batch_shape)))
            y, steps, before = d * found.value, steps + found.stats["num_steps"], d
            moved = torch.ones_like(steps, dtype=torch.bool)
            if not bool(torch.isfinite(y).all()):
                break
            d = self.units(problem, y)
            moved = ((d / before).log2().abs() > 2).any(-1)
            if not bool(moved.any()):
                break
        codes = found.stats["result"]
        codes = marked(codes, moved & (codes <= int(Result.STEPS_DONE)), Result.STAGNATED)
        with torch.no_grad():  # where a loss is not defined its slopes may be
            lost = ~torch.isfinite(problem.data[0](raveler.unravel(y)))
        codes = marked(codes, lost, Result.NONFINITE)
        return found.with_value(y).with_stats(num_steps=steps, result=codes), d

    @staticmethod
    def units(problem: RootProblem, y: Tensor) -> Tensor:
        """`balance` there."""
        operator = GraphJacobian(problem.raveler, problem.linearize(y), symmetric=True)
        return balance(operator, y, problem.raveler.sizes)


class Rescaled(Operator):
    """``d A d``."""

    def __init__(self, operator: Operator, d: Tensor):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator, self.d = operator, d

    def matvec(self, v: Tensor) -> Tensor:
        return self.d * self.operator.matvec(self.d * v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.d * self.operator.rmatvec(self.d * v)


@dataclass(frozen=True)
class LagrangianStatement(SymmetricResidualStatement):
    """The conditions of Lagrange, with the two functions for the solver."""

    objective: Closure | VmappedClosure
    constraints: Closure | VmappedClosure

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> RootProblem:
        problem = super().problem(start, hparams, batch_dims)
        problem.data = (lambda point: self.objective(point, hparams), lambda point: self.constraints(point, hparams))
        return problem

    def solve(self, point: Point, operator: Operator, b: Tensor, transpose: bool, solve: Solve) -> Solution[Tensor]:
        """In balanced units."""

        def balanced(operator: Operator, b: Tensor) -> Solution[Tensor]:
            y = point.raveler.ravel(point.params)
            with torch.no_grad():
                d = balance(operator, y, point.raveler.sizes)
            found = solve(Rescaled(operator, d), d * b)
            return found.with_value(d * found.value)

        return super().solve(point, operator, b, transpose, balanced)

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
        check_fields(self)
        for name in ("rounds", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive.")
        for name, value, method in (("inner", self.inner, "minimize"), ("newton", self.newton, "find")):
            if isinstance(value, type) or not callable(getattr(value, method, None)):
                such = "LBFGS()" if method == "minimize" else "Newton(LeastNorm())"
                raise TypeError(f"{name} is {value!r}: a solver is needed, such as {such}.")

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root that is a minimum; see `RootSolver`.

        Raises:
            TypeError: the system is not that of a Lagrangian.
        """
        if not isinstance(problem.data, tuple) or len(problem.data) != 2:
            raise TypeError(
                "AugmentedLagrangian serves bl.constrained, whose objective it needs; take Newton() for root."
            )
        y, fell = self._near(problem)
        found, d = Balanced(self.newton).find_from(problem, self._priced(problem, y))
        codes = found.stats["result"]
        worse = (codes <= int(Result.STEPS_DONE)) & (norm(d * problem.evaluate(found.value)) > norm(d * problem.r))
        codes = marked(codes, worse | self._apart(problem, found.value), Result.STAGNATED)
        doubtful = (codes > int(Result.STEPS_DONE)) | (problem.raveler.size > SMALL)  # a small root is looked at
        return found.with_stats(result=marked(codes, fell & doubtful, Result.UNBOUNDED))

    def _priced(self, problem: RootProblem, y: Tensor) -> Tensor:
        """The same params with the multipliers of least ``||grad f + J' nu||``, in balanced units."""
        count = problem.raveler.sizes[-1]
        if y.shape[-1] > SMALL or not bool(torch.isfinite(y).all()):
            return y
        operator = GraphJacobian(problem.raveler, problem.linearize(y), symmetric=True)
        d = balance(operator, y, problem.raveler.sizes).double()
        basis = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)[-count:]
        columns = [operator.matvec(e.expand_as(y)).double()[..., :-count] for e in basis]
        pulled = d[..., :-count, None] * torch.stack(columns, -1) * d[..., None, -count:]
        alone = torch.cat([y[..., :-count], torch.zeros_like(y[..., -count:])], -1)
        slope = d[..., :-count] * problem.evaluate(alone).double()[..., :-count]
        if not bool(torch.isfinite(pulled).all() and torch.isfinite(slope).all()):
            return y
        prices = -(torch.linalg.pinv(pulled, rtol=1e-10) @ slope.unsqueeze(-1)).squeeze(-1)
        return torch.cat([y[..., :-count], (d[..., -count:] * prices).to(y.dtype)], -1)

    def _apart(self, problem: RootProblem, y: Tensor) -> Tensor:
        """Whether constraints are left that no point meets: by what they are beside their changes with the params.

        Newton's step is none there, and large multipliers hide what is left.
        """
        constraints = problem.data[1]
        *params, multipliers = problem.raveler.unravel(y.detach())
        move = max(MOVE, 8 * torch.finfo(problem.raveler.coarsest).eps)
        with torch.no_grad():

            def gap(leaves: list[Tensor]) -> Tensor:
                return widened(constraints([*leaves, multipliers]))

            left = gap(params)
            largest = norm(gap(problem.raveler.unravel(problem.y)[:-1]))
            for seed in (None, 0, 1):
                moved = [
                    leaf * (1 + move * (1 if seed is None else signs(leaf.shape, seed, leaf.device).to(leaf.dtype)))
                    for leaf in params
                ]
                largest = torch.maximum(largest, norm(gap(moved) - left) / move)
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
        gap = largest = None
        for _ in range(self.rounds):
            units = Units.at(
                lambda params: objective([*params, multipliers]),  # noqa: B023 (called at once)
                lambda params: constraints([*params, multipliers]),  # noqa: B023
                params,
                mu.dim(),
            )
            price = units.loss.unsqueeze(-1) / units.gap
            stale = norm(multipliers.double() / price) > STALE * norm(problem.raveler.ravel([*params, 0 * multipliers]))
            multipliers = multipliers.masked_fill(stale.unsqueeze(-1), 0.0)

            def augmented(params: Tree, nu: Tensor = multipliers, mu: Tensor = mu, units: Units = units) -> Tensor:
                point = [*leaves(params), nu]
                loss = objective(point)
                c = widened(constraints(point))
                c, nu = c / units.gap.to(c.dtype), (nu.double() / price).to(c.dtype)  # noqa: B023
                penalty: Tensor = (nu * c).sum(-1) + mu.to(c.dtype) / 2 * c.square().sum(-1)
                whole: Tensor = loss / units.loss.to(loss.dtype) + penalty
                return whole

            tree = problem.raveler.unflatten([*params, multipliers]).params
            inner = Problem(augmented, tree, max_batch_dims=mu.dim())
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
                c = widened(constraints([*params, multipliers])).double()
            fell = fell | (fallen & ~rose)
            if bool(rose.all()):
                break
            if not bool(torch.isfinite(c).all()):
                return problem.y, fell
            left, c = c.abs(), c / units.gap
            multipliers = multipliers + (torch.where(lost, 0.0, mu).unsqueeze(-1) * c * price).to(multipliers.dtype)
            largest = left if largest is None else torch.maximum(largest, left)
            size, first = norm(c), norm(largest / units.gap)
            # Params that stay where they are: a larger mu would multiply what rounding leaves of the constraints.
            still = (norm(found.value - inner.start.y) <= rounding * norm(found.value)) & (size <= RESTING * first)
            if bool((~lost & (still | (size <= enough * first))).all()):
                break
            slow = lost if gap is None else lost | (~still & (size > 0.25 * norm(gap / units.gap)))
            mu, gap = torch.where(slow & ~rose, 10 * mu, mu), left
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
    matrix = (matrix + matrix.mT) / 2
    d = balance(jacobian, found.value.detach(), problem.raveler.sizes).double()  # the signs stay (Sylvester)
    matrix = d.unsqueeze(-1) * matrix * d.unsqueeze(-2)
    values = torch.linalg.eigvalsh(matrix)
    rounding = torch.finfo(jacobian.dtype).eps ** 0.75 * values.abs().amax(-1, keepdim=True)
    saddle = (values < -rounding).sum(-1) > problem.raveler.sizes[-1]
    degenerate = good & (values.abs() <= rounding).any(-1)
    if warn and bool(degenerate.any()):
        tell(DEGENERATE, SolveWarning)
    codes = marked(found.stats["result"], good & saddle, Result.NEGATIVE_CURVATURE)
    return flagged.with_stats(result=codes, degenerate=degenerate)
