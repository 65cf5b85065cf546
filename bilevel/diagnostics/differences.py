"""Central differences of the outer loss through inner solves, and how certain they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import pytree
from ..problem import gradient_or_zero
from ..solution import Result, Throw
from ..tree import Tree, leaves, tree_map
from .checked import LARGEST_FACTORISED, refined
from .precision import as_double, in_double
from .problem import SOLVED_KINDS, Bilevel, Solver, solve

SMALL = 0.01
"""Slopes below this part of their change over the size of the hyperparameters count as those of an optimum."""

LEFT_BY_FACTORS, LEFT_BY_PRODUCTS, MOST_PRODUCTS = 1e-4, 1e-2, 300
"""Part of the errors of the inner solutions that the Newton steps from them may leave, by few unknowns and by many; and
the steps of a linear solve for one with many unknowns: a solution that is near takes fewer."""

NOISE = 1e3
"""Two evaluations at one point that differ by more roundings than this are of a random function."""


@dataclass(frozen=True)
class Differences:
    """The slopes of the outer loss along some directions, float64 ``[D]``, and what is uncertain about them.

    Attributes:
        near, far: by steps of ``step`` and of twice that, between inner solutions that Newton steps have made better,
            or as they were found where there is no Newton step to make. found: ``near`` between those that were found.
        rounding: what rounding alone may do to a slope. noise: what a second solve at one point does to one.
        result: the worst of the inner solves. rootless: some had no solution near. left: the part of the errors of the
            inner solutions that those Newton steps may leave.
        change: by how much the slopes change, as their curvature says, over a distance of ``1 + ||hparams||``, or over
            the one at which they would change the loss by all that it is, where that is shorter; 0 where noise hides
            it.
        kink: half of what the slopes to both sides differ by, however short the step is.
    """

    near: Tensor
    far: Tensor
    found: Tensor
    step: float
    rounding: float
    noise: float
    result: Result
    rootless: bool
    left: float
    change: float = 0.0
    kink: float = 0.0

    @property
    def scale(self) -> float:
        """What an error is measured against: the slopes, or a hundredth of their change, where they nearly vanish.

        At an optimum the slopes are zero but for rounding and for how far it is missed, and nothing is small beside
        them.
        """
        return max(float(self.near.norm()), SMALL * self.change)

    @property
    def vanishing(self) -> bool:
        """Whether the slopes are so small."""
        return self.scale > float(self.near.norm())

    @property
    def inner(self) -> float:
        """What the errors of the inner solutions do to the slopes; infinite where no solution is near."""
        return torch.inf if self.rootless else float((self.near - self.found).norm())

    @property
    def doubts(self) -> dict[str, float]:
        """What makes the slopes uncertain, in words, and by how much (absolute, over all directions)."""
        reached = "no solution is near" if self.rootless else self.result.help
        return {
            f"the inner solves are not accurate enough ({reached})": self.left * self.inner,
            "differences by two step sizes disagree": float((self.near - self.far).norm()),
            "the outer loss hardly changes by more than rounding": self.rounding * len(self.near) ** 0.5,
            "a second inner solve at one point gives another answer": self.noise * len(self.near) ** 0.5,
            "the outer loss has a kink there (relu, max, abs), where it has no derivative": self.kink,
        }

    @property
    def uncertainty(self) -> float:
        """The largest doubt; infinite where a difference is not finite."""
        return max(size if math.isfinite(size) else math.inf for size in self.doubts.values())


@dataclass(frozen=True)
class _Loss:
    """The outer loss at the inner solution that was found, and at a better one; whether a solution is near."""

    found: float
    better: float
    result: Result
    solved: bool


class OuterLoss:
    """The outer loss as a function of the hyperparameters, through inner solves; in float64 where that can be.

    Args:
        solver, throw: of the inner problem.
        path: what is differentiated is the path of the solver, so that its solutions are right by definition.

    Attributes:
        rootless: no solution was near one of the inner solutions, so that no Newton step is tried again.
        untrained: the size of the outer loss at the start of the inner problem, where it need not be as small as at a
            solution that fits the data.
    """

    def __init__(
        self, problem: Bilevel, x: Tree, solver: Solver | None, throw: Throw, *, path: bool = False, double: bool = True
    ):
        self.problem = in_double(problem, problem.init, x) if double and problem.kind in SOLVED_KINDS else problem
        self.lifted = self.problem is not problem
        self.x = tree_map(lambda leaf: as_double(leaf.detach()) if self.lifted else leaf.detach(), x)
        self.solver, self.throw, self.path, self.rootless = solver, throw, path, False
        self.dtype = leaves(self.x)[0].dtype
        self.eps = torch.finfo(self.dtype).eps
        few = sum(leaf.numel() for leaf in leaves(problem.init)) <= LARGEST_FACTORISED
        self.left = LEFT_BY_FACTORS if few else LEFT_BY_PRODUCTS
        self.size = length_of(leaves(self.x))
        with torch.no_grad():
            untrained = float(self.problem.outer(self.problem.init, self.x))
        self.untrained = abs(untrained) if math.isfinite(untrained) else 0.0

    @property
    def solvable(self) -> bool:
        """Whether the solver does what was asked of it: what was singular may be indefinite in float64."""
        return solve(self.problem, self.x, solver=self.solver, throw="ignore").result.ok

    def along(self, directions: Sequence[list[Tensor]], step: float) -> Differences:
        """The slopes along these directions, each a list of leaves like the hyperparameters."""
        first, second = (self._at(directions[0], 0.0) for _ in range(2))
        rows = [[self._at(direction, size * step) for size in (1, -1, 2, -2)] for direction in directions]
        points = [first, *(point for row in rows for point in row)]
        rootless = not all(point.solved for point in points)
        found = torch.tensor([[point.found for point in row] for row in rows], dtype=torch.float64, device="cpu")
        better = torch.tensor([[point.better for point in row] for row in rows], dtype=torch.float64, device="cpu")
        table, centre = (found, first.found) if rootless else (better, first.better)
        rounding = self.eps * max(abs(point.found) for point in points) / step
        noise = abs(first.found - second.found) / step
        curvature = _curvature(table - centre, step)
        change = min((1 + self.size) * curvature, math.sqrt(max(abs(centre), self.untrained) * curvature))
        return Differences(
            (table[:, 0] - table[:, 1]) / (2 * step),
            (table[:, 2] - table[:, 3]) / (4 * step),
            (found[:, 0] - found[:, 1]) / (2 * step),
            step,
            rounding,
            noise,
            max(point.result for point in points),
            rootless,
            self.left,
            change,
            max(0.0, _kink(table - centre, step) - 10 * (rounding + noise) * len(directions) ** 0.5),
        )

    def randomness(self, params: Tree) -> str | None:
        """Which function gives another value when it is evaluated twice at one point, in words; None: neither does."""
        params = tree_map(lambda leaf: leaf.detach().to(self.dtype), params)
        functions: dict[str, Callable[[Tree, Tree], Tree]] = {"inner": self.problem.inner, "outer": self.problem.outer}
        for name, fn in functions.items():
            with torch.no_grad():
                first, second = (
                    torch.cat([leaf.reshape(-1).double() for leaf in leaves(fn(params, self.x))]) for _ in range(2)
                )
            apart = float((first - second).norm() / first.norm().clamp_min(torch.finfo(torch.float64).tiny))
            if apart > NOISE * self.eps:
                return (
                    f"the {name} function is random (dropout, noise, another mini-batch): evaluated twice at one point "
                    f"it differs by {apart:.1e}; draw the random numbers once, outside of it, or call module.eval()"
                )
        return None

    def false_gradient(self, params: Tree, seed: int) -> str | None:
        """In words, that the gradient of the inner function is not the slope of its values; None: it is, or has none.

        Both follow from the root of the gradient, differences of the outer loss too, and so agree whatever it is.
        """
        if self.problem.kind != "argmin":
            return None
        generator = torch.Generator().manual_seed(seed)
        start = [as_double(leaf.detach()) if self.lifted else leaf.detach() for leaf in leaves(params)]
        size = 1 + length_of(start)
        parts = [
            torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf) for leaf in start
        ]
        # Away from the solution, where the gradient vanishes.
        start = [leaf + 0.1 * part for leaf, part in zip(start, parts, strict=True)]
        spec = pytree.tree_structure(params)

        def losses(free: list[Tensor]) -> Tensor:
            found: Tensor = self.problem.inner(pytree.tree_unflatten(free, spec), self.x).sum()
            return found

        try:
            free = [leaf.requires_grad_() for leaf in start]
            with torch.enable_grad():
                grads = gradient_or_zero(losses(free), free)
            slope = inner_product(grads, parts)
            with torch.no_grad():
                value, found = abs(float(losses(start))), []
                for step in (self.eps ** (1 / 3) * size, 2 * self.eps ** (1 / 3) * size):
                    ahead, behind = (
                        float(losses([leaf + sign * step * part for leaf, part in zip(start, parts, strict=True)]))
                        for sign in (1, -1)
                    )
                    found.append((ahead - behind) / (2 * step))
        except (ArithmeticError, ValueError, RuntimeError):  # out of the domain
            return None
        error, scale = abs(slope - found[0]), max(abs(slope), abs(found[0]))
        certain = abs(found[0] - found[1]) + self.eps ** (2 / 3) * value
        if not error > 1e4 * self.eps ** (2 / 3) * scale + 10 * certain:
            return None
        return (
            f"the gradient of the inner function is not that of its values, by {error / scale:.1e} along a direction "
            "(a backward pass of your own, a straight-through estimator, a part that is detached): what agrees is the "
            "derivative of where that gradient vanishes"
        )

    def _at(self, direction: list[Tensor], size: float) -> _Loss:
        with torch.no_grad():
            rest = iter(direction)
            moved = tree_map(lambda leaf: leaf + size * next(rest), self.x)
            fit = solve(self.problem, moved, solver=self.solver, throw=self.throw)
            loss = float(self.problem.outer(fit.value, moved))
        if self.path or self.rootless:
            return _Loss(loss, loss, fit.result, self.path)
        try:
            point, solved = refined(
                self.problem, fit.value, moved, fit.stats["num_steps"].dim(), self.left, MOST_PRODUCTS
            )
        except NotImplementedError:  # nothing is known that vanishes at the solution
            return _Loss(loss, loss, fit.result, fit.result.ok)
        self.rootless = not solved
        with torch.no_grad():
            params = pytree.tree_unflatten(point.params, pytree.tree_structure(fit.value))
            return _Loss(loss, float(self.problem.outer(params, moved)), fit.result, solved)


def _kink(rises: Tensor, step: float) -> float:
    """Half of the jump of the slopes at the centre, over all directions; as `_curvature`.

    The slopes to both sides differ by the step times the curvature; what does not shrink with the step is the jump.
    """
    near, far = rises[:, :2].sum(1) / step, rises[:, 2:].sum(1) / (2 * step)
    return float((2 * near - far).norm()) / 2


def _curvature(rises: Tensor, step: float) -> float:
    """The norm of the second derivatives along some directions; 0 where those by two step sizes disagree.

    Args:
        rises: the loss less that at the centre, at ``step, -step, 2 step, -2 step``: ``[D, 4]``.
    """
    near, far = rises[:, :2].sum(1) / step**2, rises[:, 2:].sum(1) / (2 * step) ** 2
    agree = float((near - far).norm()) <= 0.5 * float(far.norm())
    return float(far.norm()) if agree else 0.0


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two lists of tensors, in float64."""
    return sum(float((one.double() * other.double()).sum()) for one, other in zip(a, b, strict=True))


def length_of(parts: Sequence[Tensor]) -> float:
    """The 2-norm of a list of tensors, in float64."""
    return float(torch.cat([part.detach().reshape(-1).double() for part in parts]).norm())
