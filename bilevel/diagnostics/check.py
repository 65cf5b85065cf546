"""Is this hypergradient right? Against finite differences, and against the exact answer where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from ..context import differentiates
from ..hypergrad.base import PathMethod
from ..notices import tell
from ..problem import gradient_or_zero
from ..solution import Result, Solution, SolveWarning, Throw
from ..tree import Tree, leaves, tree_map
from .checked import distance
from .differences import Differences, OuterLoss, inner_product, length_of
from .problem import AnyHypergrad, Bilevel, Solver, as_solved, leaf_copies, solve

Verdict = Literal["right", "wrong", "inconclusive"]

LEAF_ERROR, SMALL_LEAF = 1e-2, 0.1
"""The error along leaves with small gradients that is wrong; and the part of the whole gradient that is small."""

NOISES, MOST_NOISE = 3.0, 0.1
"""How many times its uncertainty a value may be off, and the noise beside which nothing is called right."""


DIFFERENCES_ADVICE = "Give a reference_solver that is more accurate (NewtonCG()), a step, or a larger tolerance."
PATH_ADVICE = (
    "An implicit hypergradient is that of a solution, and the inner solver ended near none, so that nothing can tell. "
    "Let it solve further; or, to check the problem itself (nothing detached, no hyperparameter missing), check a "
    "short path: solver=Steps(SGD(lr=0.1), max_steps=3), hypergrad=Unroll()."
)


SADDLE = 1e-6
"""The curvature below zero that is no rounding, as a part of the largest."""

NO_MINIMUM = (
    "the inner solve ended where the Hessian is not positive definite, at a saddle or a maximum: what agrees is the "
    "derivative of that point, not of a minimum; start the inner problem elsewhere"
)


class HypergradientError(RuntimeError):
    """A hypergradient does not agree with finite differences, or with the exact one."""


@dataclass(frozen=True)
class HypergradientCheck:
    """What `check_hypergradient` found; ``str()`` says it in words.

    Attributes:
        finite_difference: for each direction, the slope of the outer loss by central differences.
        slope: for each direction, that of the hypergradient.
        relative_error: ``||slope - finite_difference|| / ||finite_difference||`` over the directions. Near an optimum,
            where slopes vanish, all errors are relative to a hundredth of what the slopes become at a distance of
            ``1 + ||hparams||``, or where the loss has changed by its own size, if that is nearer.
        uncertainty: of the finite differences themselves, relative: the largest of what another step size, errors of
            the inner solutions that Newton steps leave, a second solve, and rounding change about them.
        inner: what the errors of the inner solutions, before those Newton steps, change about them, relative.
        leaf_error: where some leaves of hparams have gradients that are small beside the others', the error along them
            alone that is not that of the linear solver, relative to their own slopes; 0 where that is not certain.
        noise: what the precision of the problem, below float64, changes about the hypergradient, relative: rounding,
            and the looser tolerances of solvers there. Measured where the error is above the tolerance.
        exact_error: relative error against the problem's own closed form; None where it has none.
        tolerance: what was asked for.
        doubts: why the differences are uncertain by more than the tolerance, in words; empty where they are not.
        missing: the leaves of hparams, by number, whose gradient is zero or None while the outer loss depends on them.
        random: in words, which function is; None: none is.
        optimum: the slopes nearly vanish.
        unsure: in words, why a hypergradient that agrees with the differences is not called right; None: it is.
    """

    finite_difference: Tensor
    slope: Tensor
    relative_error: float
    uncertainty: float
    exact_error: float | None
    tolerance: float
    doubts: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    random: str | None = None
    optimum: bool = False
    inner: float = 0.0
    noise: float = 0.0
    leaf_error: float = 0.0
    unsure: str | None = None

    @property
    def allowed(self) -> float:
        """The error that passes: the tolerance, or three times the noise where that is larger and at most a tenth."""
        return max(self.tolerance, NOISES * self.noise) if NOISES * self.noise <= MOST_NOISE else self.tolerance

    @property
    def verdict(self) -> Verdict:
        """The answer.

        ``"right"``: differences that are certain to the tolerance agree to it, or to the noise of the precision.
        ``"wrong"``: they differ by more than the tolerance and three times what is uncertain (the differences, the
        inner solutions, the precision), or the exact answer does, or a gradient is missing. ``"inconclusive"``: they
        are not certain enough to tell, or the problem is random, or its solution is no minimum, or the gradient of the
        inner function is not that of its values.
        """
        if self.random is not None:
            return "inconclusive"
        if not bool(torch.isfinite(self.slope).all()) and bool(torch.isfinite(self.finite_difference).all()):
            return "wrong"
        if self.exact_error is not None and not self.exact_error <= self.tolerance + NOISES * self.noise:
            return "wrong"
        uncertain = max(self.uncertainty, self.inner, self.noise)
        if self.missing or self.leaf_error > max(LEAF_ERROR, self.tolerance):
            return "wrong"
        if self.relative_error > self.tolerance + NOISES * uncertain:
            return "wrong"
        agrees = self.relative_error <= self.allowed and self.uncertainty <= self.allowed
        return "right" if agrees and self.unsure is None else "inconclusive"

    @property
    def ok(self) -> bool:
        """Whether the verdict is that the hypergradient is right; neither a wrong nor an inconclusive one is."""
        return self.verdict == "right"

    def __str__(self) -> str:
        verdict = "WRONG" if self.verdict == "wrong" else self.verdict
        exact = "" if self.exact_error is None else f"; from the exact one {self.exact_error:.2e}"
        small = f"; along leaves with small gradients {self.leaf_error:.2e}" if self.leaf_error > LEAF_ERROR else ""
        lost = small + "".join(f"; the gradient of leaf {index} of hparams is missing" for index in self.missing)
        why = (self.random,) if self.random else (*self.doubts, *([] if self.unsure is None else [self.unsure]))
        doubts = f". Not certain: {'; '.join(why)}" if self.verdict == "inconclusive" and why else ""
        optimum = " (near an optimum, so relative to slopes around it)" if self.optimum else ""
        noise = f", raised to {self.allowed:.0e} by the noise of the precision" if self.allowed > self.tolerance else ""
        noise = "" if self.verdict == "inconclusive" else noise
        advice = f". {self.advice}" if self.advice else ""
        return (
            f"{verdict}: relative error from finite differences {self.relative_error:.2e}{optimum} (they are certain "
            f"to {self.uncertainty:.1e}){exact}{lost}; tolerance {self.tolerance:.0e}{noise}{doubts}{advice}"
        )

    @property
    def advice(self) -> str:
        """What makes an inconclusive check conclusive; empty where there is nothing to be done."""
        if self.verdict != "inconclusive" or self.random is not None or self.unsure is not None:
            return ""
        return PATH_ADVICE if math.isinf(self.inner) else DIFFERENCES_ADVICE


@differentiates
def check_hypergradient(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Solver | None = None,
    hypergrad: AnyHypergrad | None = None,
    reference_solver: Solver | None = None,
    num_directions: int = 3,
    step: float | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
    throw: Throw = "warn",
    raise_exception: bool = True,
) -> HypergradientCheck:
    """Compare a hypergradient with central differences of the outer loss, along random directions.

    The differences are made in float64, whatever the precision of the problem is, where its functions allow that. They
    are judged themselves: by a second step size, by Newton steps from the inner solutions, by a second solve at one
    point, by rounding; and both functions are evaluated twice at one point, to see whether they are random.

    Args:
        problem: with both levels; see `Bilevel`.
        hparams: where; the problem's own by default.
        solver, hypergrad, throw: what is checked, as in `argmin`.
        reference_solver: solves the inner problem for the differences; ``solver`` by default. It has to solve much
            better than ``step``.
        num_directions: two inner solves each, and two more for the uncertainty.
        step: of the differences, relative to ``1 + ||hparams||``, for hyperparameters of one size; each moves by a part
            of its own size, or of one. None: 1e-4 (1e-2 where the differences are made in
            float32), and where they are not certain smaller ones and a larger one as well.
        tolerance: relative error that passes.
        raise_exception: raise where the hypergradient is wrong, as `torch.autograd.gradcheck` does; else return the
            report. An inconclusive check is a `SolveWarning` (but for ``throw="ignore"``), and its report is not
            ``ok``.

    Raises:
        HypergradientError: the hypergradient is wrong, with both slopes in the message.
        TypeError, ValueError: an outer function that returns no scalar, or settings that mean nothing.
    """
    _check_arguments(num_directions, step, tolerance)
    x = leaf_copies(problem.hparams if hparams is None else hparams)
    _check_outer(problem, x)
    path = isinstance(hypergrad, PathMethod)
    reference = reference_solver if reference_solver is not None else solver
    if not path:
        reference = as_solved(problem, reference)[1]
        problem, solver = as_solved(problem, solver)
    outer = OuterLoss(problem, x, reference, throw, path=path)
    random = outer.randomness(problem.init)
    if random is not None:
        unknown = torch.full((num_directions,), torch.nan, dtype=torch.float64, device="cpu")
        return _heard(HypergradientCheck(unknown, unknown, math.nan, math.inf, None, tolerance, random=random), throw)
    fit, found = _found(problem, x, solver, hypergrad, throw)
    if outer.lifted and fit.result.ok and not outer.solvable:
        outer = OuterLoss(problem, x, reference, throw, path=path, double=False)
    directions = _directions(leaves(outer.x), num_directions, seed)
    slope = _along(found, directions)
    seen = _differences(outer, directions, step, tolerance)
    error, noise = _relative(float((slope - seen.near).norm()), seen), 0.0
    if outer.lifted and not seen.rootless and not error <= tolerance:
        exact = _slope_in_double(outer, directions, solver, hypergrad)
        noise = 0.0 if exact is None else _relative(float((slope - exact).norm()), seen)
    missing = _missing(outer, found, seen.step)
    report = HypergradientCheck(
        seen.near,
        slope,
        error,
        _relative(seen.uncertainty, seen),
        _exact_error(problem, x, found, seen.scale if seen.vanishing else 0.0),
        tolerance,
        _doubts(seen, error, noise, tolerance),
        missing,
        outer.randomness(fit.value),
        seen.vanishing,
        _relative(seen.inner, seen),
        noise,
        0.0 if missing else _leaf_error(outer, solver, hypergrad, found, seen, seed, tolerance),
        None if seen.rootless or path else _unsure(outer, problem, fit, seed),
    )
    if raise_exception and report.verdict == "wrong":
        raise HypergradientError(
            f"{report}. Slopes along {num_directions} random directions: hypergradient {slope.tolist()}, finite "
            f"differences {seen.near.tolist()}. Residual norm of the inner solve: "
            f"{float(fit.stats['residual_norm'].max()):.1e}. "
            "Solve both systems more accurately (gtol, rtol); if it stays wrong, look for parts of the objective that "
            "are detached or not differentiable."
        )
    return _heard(report, throw)


def _heard(report: HypergradientCheck, throw: Throw) -> HypergradientCheck:
    """Let an inconclusive check be heard."""
    if report.verdict == "inconclusive" and throw != "ignore":
        tell(f"check_hypergradient: {report}", SolveWarning, kind="check_hypergradient")
    return report


def _found(
    problem: Bilevel, x: Tree, solver: Solver | None, hypergrad: AnyHypergrad | None, throw: Throw
) -> tuple[Solution, list[Tensor]]:
    """The inner solve, and the hypergradient."""
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw=throw)
    return fit, gradient_or_zero(problem.outer(fit.value, x), leaves(x))


def _unsure(outer: OuterLoss, problem: Bilevel, fit: Solution, seed: int) -> str | None:
    return NO_MINIMUM if _bends_down(problem, fit) else outer.false_gradient(fit.value, seed)


def _bends_down(problem: Bilevel, fit: Solution) -> bool:
    """Whether the Hessian at the solution was seen to have a negative eigenvalue, by either solve."""
    if fit.result is Result.NEGATIVE_CURVATURE:
        return True
    if problem.kind != "argmin" or fit.adjoint is None or fit.adjoint.curvature is None:
        return False
    low, high = fit.adjoint.curvature
    return bool((low < -SADDLE * high.abs()).any())


def _slope_in_double(
    outer: OuterLoss, directions: list[list[Tensor]], solver: Solver | None, hypergrad: AnyHypergrad | None
) -> Tensor | None:
    """What the same settings give in float64; None where they cannot be used there."""
    try:
        return _along(_found(outer.problem, leaf_copies(outer.x), solver, hypergrad, "ignore")[1], directions)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


def _along(found: list[Tensor], directions: list[list[Tensor]]) -> Tensor:
    """The slopes of a hypergradient along some directions, float64 ``[D]``."""
    return torch.tensor(
        [inner_product(found, direction) for direction in directions], dtype=torch.float64, device="cpu"
    )


def _directions(x: list[Tensor], count: int, seed: int) -> list[list[Tensor]]:
    """Random directions; of length one where all numbers have one size, else each number moves in its own."""
    generator = torch.Generator().manual_seed(seed)
    size, root = 1 + length_of(x), sum(leaf.numel() for leaf in x) ** 0.5
    found = []
    for _ in range(count):
        parts = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf) for leaf in x]
        length = length_of(parts) * size
        found.append([part * (1 + root * leaf.abs()) / length for part, leaf in zip(parts, x, strict=True)])
    return found


def _leaf_error(
    outer: OuterLoss,
    solver: Solver | None,
    hypergrad: AnyHypergrad | None,
    found: list[Tensor],
    seen: Differences,
    seed: int,
    tolerance: float,
) -> float:
    """The error along the leaves whose gradients are small beside the others, which hide it.

    A linear solve that is exact enough for the whole gradient need not be for a small part of it, so that it is the
    default one, whatever the method is; a path has no linear solve. Zero where the differences are not certain, too.
    """
    x = leaves(outer.x)
    shares = [length_of([grad]) for grad in found]
    few = [index for index, share in enumerate(shares) if 0 < share < SMALL_LEAF * max(shares)]
    if not few or seen.rootless or not math.isfinite(seen.uncertainty):
        return 0.0
    least, directions = min(shares[index] for index in few), []
    for parts in _directions([x[index] for index in few], 2, seed):
        direction = [torch.zeros_like(leaf) for leaf in x]
        for index, part in zip(few, parts, strict=True):
            direction[index] = part * (least / shares[index])
        length = length_of(direction)
        directions.append([part / length for part in direction])
    exact = _slope_in_double(outer, directions, solver, hypergrad if outer.path else None)
    if exact is None:
        return 0.0
    alone = outer.along(directions, seen.step)
    uncertain = NOISES * max(alone.uncertainty, alone.inner)
    error = float((exact - alone.near).norm())
    certain = math.isfinite(uncertain) and uncertain <= LEAF_ERROR * alone.scale
    return _relative(error, alone) if certain and error > uncertain + tolerance * alone.scale else 0.0


def _check_arguments(num_directions: int, step: float | None, tolerance: float) -> None:
    if not isinstance(num_directions, Integral) or num_directions < 1:
        raise ValueError(f"num_directions is {num_directions!r}: a whole number, at least 1, is needed.")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step is {step!r}: a positive number is needed, or None.")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance!r}: a positive number is needed.")


def _check_outer(problem: Bilevel, x: Tree) -> None:
    with torch.no_grad():
        loss = problem.outer(problem.init, x)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        kind = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"outer returned {kind}: a real scalar is needed, such as the mean of the losses.")


def _differences(outer: OuterLoss, directions: list[list[Tensor]], step: float | None, tolerance: float) -> Differences:
    """Differences that are certain to the tolerance, else the most certain ones of those that were tried."""
    usual = (1e-4, 1e-6, 1e-2, 1e-8) if outer.dtype is torch.float64 else (1e-2, 1e-3, 1e-1)
    relative = usual if step is None else (step,)
    best: Differences | None = None
    for size in relative:
        rootless = outer.rootless
        try:
            tried = outer.along(directions, size * (1 + length_of(leaves(outer.x))))
        except (ArithmeticError, ValueError, RuntimeError):  # a step that leaves the domain: a smaller one may not
            outer.rootless = rootless
            if size == relative[-1] and best is None:
                raise
            continue
        if best is None or _relative(tried.uncertainty, tried) < _relative(best.uncertainty, best):
            best = tried
        if tried.rootless or _relative(best.uncertainty, best) <= tolerance:
            break
    assert best is not None
    return best


def _relative(size: float, seen: Differences) -> float:
    """Relative to the slopes or, near an optimum, to those around it; infinite where all vanish and it does not."""
    scale = seen.scale
    return size / scale if scale else (0.0 if size == 0 else math.inf)


def _doubts(seen: Differences, error: float, noise: float, tolerance: float) -> tuple[str, ...]:
    """What is uncertain by more than the tolerance; of an error, what explains it."""
    sizes = {why: _relative(size, seen) for why, size in seen.doubts.items()}
    reached = next(iter(sizes))
    if error > tolerance:
        sizes[reached] = _relative(seen.inner, seen)
        sizes["the precision of the problem is too low: take float64"] = noise
    return tuple(f"{why}, by {size:.1e}" for why, size in sizes.items() if not size <= tolerance)


def _missing(outer: OuterLoss, found: list[Tensor], step: float) -> tuple[int, ...]:
    """The leaves whose gradient is zero, or None, and along which the outer loss changes for certain."""
    missing = []
    for index, grad in enumerate(found):
        if bool((grad != 0).any()) or not grad.numel():
            continue
        direction = [torch.zeros_like(leaf) for leaf in leaves(outer.x)]
        direction[index] = torch.ones_like(direction[index]) / grad.numel() ** 0.5
        seen = outer.along([direction], step)
        if float(seen.near.norm()) > 10 * seen.uncertainty:
            missing.append(index)
    return tuple(missing)


def _exact_error(problem: Bilevel, x: Tree, found: list[Tensor], least: float) -> float | None:
    """The error from the problem's own hypergradient, relative to it or to ``least``, where that is larger."""
    if not hasattr(problem, "hypergradient"):
        return None
    exact = leaves(problem.hypergradient(tree_map(torch.detach, x)))
    size, error = max(length_of(exact), least), float(distance(found, exact))
    return error / size if size else error
