"""A second look at what an inner solver found: saddles that it did not leave, objectives that are random; advice."""

from __future__ import annotations

import contextlib
import itertools

import torch
from torch import Tensor

from .._torch import NoSecondDerivativeError, pull
from ..linalg.jacobian import GraphJacobian
from ..linalg.minres import MINRES
from ..linalg.noise import normal
from ..linalg.operator import Operator, Restricted
from ..problem import Problem, RootProblem
from ..solution import Result, Solution, marked
from ..tree import axpy, dot, filled, norm, scale
from .minimize import InnerSolver

PROBES = 5
"""Products that the look at the curvature of a stationary start costs."""

ENOUGH_STEPS = 50
"""Steps beside which as many products that look at the curvature where they ended are a fair price."""

RANDOM_ADVICE = (
    "The objective gives another value each time that it is evaluated at the same params: it is random (dropout, "
    "noise, a batch drawn inside), and line searches and hypergradients need one function. Put modules into eval(), "
    "draw the noise before, or take a stochastic method (bilevel.stochastic)"
)

RANDOM_SYSTEM_ADVICE = (
    "The map or residual gives other values each time that it is evaluated at the same point: it is random (dropout, "
    "noise), and has no solution. Put modules into eval(), or draw the noise before: one mask for all evaluations"
)


COUPLED_ADVICE = (
    "The problems of the batch depend on each other: a vector of T losses is T problems, of which the t-th depends on "
    "the t-th slice of the params only. Return the sum or the mean of the losses for one problem, or look for what "
    "mixes the slices (a matrix product or a norm over the first dimension)"
)


ASYMMETRIC_ADVICE = (
    "The Jacobian of the residual is not symmetric, although symmetric=True says that it is: J v and J^T v differ by "
    "{part:.1g} of their length, and derivatives of the solution are wrong or not found. Leave symmetric=True out"
)


KINK_ADVICE = (
    "The slope of the loss jumps where the solve ended: it has a kink (abs, max, relu) or a step there, and no "
    "smooth minimum, so the hypergradient is not that of the minimum. Take ProximalGradient(prox) for such a "
    "penalty, constrained() or bounds for a constraint, or a smooth loss in its place"
)

SADDLE_ADVICE = (
    "The gradient vanishes where the solve ended, but the loss bends down from there along directions that no step has "
    "seen, as the solver began on a symmetry (equal or zero params): this is no minimum. Start elsewhere, for instance "
    "at random params"
)


UNASKED_ADVICE = (
    "{steps} steps were made, the default of this solver, and the gradient there is {part:.2g} of that at the start: "
    "the hypergradient is off in proportion. Say how many steps are wanted (max_steps) or where to end (gtol), take "
    "another step size, or LBFGS(), which goes on to the minimum"
)


RAISED_ADVICE = (
    "The steps that were ordered raised the loss, from {begin:.3g} to {end:.3g}: they are too long, and reach "
    "no minimum. Take a smaller step size, GradientDescent(..., safeguard=True), or LBFGS(), which looks for its own"
)

ENDLESS_ADVICE = (
    "The loss is nowhere higher beyond the params that were reached, on the way from the start and as far again: it "
    "falls or is flat without end there, so that there may be no minimum, and the hypergradient is that of none. Add a "
    "penalty, such as decay / 2 * |params|^2, or bounds"
)


def suspicious(found: Solution) -> Tensor:
    """Where a solver found a gradient of zero or made no step, and calls it good."""
    stats = found.stats
    return ((stats["num_steps"] == 0) | (stats["residual_norm"] == 0)) & (stats["result"] <= int(Result.STEPS_DONE))


def look_closer(problem: Problem, found: Solution, kept: Tensor | None = None) -> Solution[Tensor]:
    """Give a start that is stationary, but no minimum, its result: nothing moves a solver from there.

    A few products with random vectors tell; only a solve that is `suspicious` is asked.

    Args:
        kept: which params are free to move, ``[*batch, n]``; None: all.
    """
    stats, idle = found.stats, suspicious(found)
    resolved = torch.finfo(found.value.dtype).eps ** 0.5
    saddle = idle & bends_down(problem, found.value, PROBES, resolved, kept)
    codes = marked(stats["result"], saddle, Result.NEGATIVE_CURVATURE)
    return found.with_stats(result=codes)


def bends_down(problem: Problem, y: Tensor, products: int, resolved: float, kept: Tensor | None = None) -> Tensor:
    """In which problems some products see negative curvature at ``y``, beyond a part ``resolved`` of the largest.

    Args:
        kept: as in `look_closer`.
    """
    bent = curved(problem, y)
    if bent is None:
        return torch.zeros_like(problem.start.f, dtype=torch.bool)
    hessian: Operator
    hessian, probe = bent
    if kept is not None:
        hessian, probe = Restricted(hessian, kept), torch.where(kept, probe, torch.zeros_like(probe))
    curvature = MINRES(max_steps=min(products, hessian.size)).solve(hessian, probe).curvature
    assert curvature is not None
    smallest, largest = curvature
    return smallest < -resolved * torch.maximum(largest.abs(), smallest.abs())


def curved(problem: Problem, y: Tensor) -> tuple[Operator, Tensor] | None:
    """The Hessian at ``y`` and a random direction to look along; None where the residual is constant: no curvature."""
    at = problem.linearize(y.detach())
    if not any(residual.requires_grad for residual in at.residual):
        return None
    return GraphJacobian(problem.raveler, at, symmetric=True), normal(y.shape, 0, y.device).to(y.dtype)


def is_random(problem: Problem, found: Solution) -> bool:
    """Whether the objective gives another value when it is evaluated again where a solve ended."""
    if not bool(torch.isfinite(found.value).all()):
        return False
    first, second = (problem.evaluate(found.value.detach()) for _ in range(2))
    apart = (first.f - second.f).abs() > torch.finfo(first.g.dtype).eps ** 0.75 * first.f.abs()
    return bool(apart.any())


def is_random_system(problem: RootProblem, found: Solution) -> bool:
    """Whether the residual is another one when it is evaluated again where a solve ended."""
    if not bool(torch.isfinite(found.value).all()):
        return False
    first, second = (problem.evaluate(found.value.detach()) for _ in range(2))
    apart = norm(first - second) > torch.finfo(first.dtype).eps ** 0.75 * norm(problem.first_residual)
    return bool(apart.any())


def has_no_end(problem: Problem, found: Solution) -> Tensor:
    """Where the loss, which has fallen, does not rise again on the same way, as far again; ``[*batch]``."""
    y, start = found.value.detach(), problem.start
    f = problem.losses(y)
    fallen = start.f - f > 1e3 * torch.finfo(y.dtype).eps * torch.maximum(f.abs(), start.f.abs())
    for part in (0.25, 0.5, 1.0):
        fallen = fallen & (problem.losses(axpy(torch.full_like(f, part), y - start.y, y)) <= f)
    return fallen


def has_kink(problem: Problem, found: Solution) -> bool:
    """Whether the gradient changes as much over a step that is a hundredth of another, across where a solve ended."""
    y, start = found.value.detach(), norm(problem.start.g)
    unit = _downhill(problem, y)
    longest = torch.finfo(y.dtype).eps ** 0.4 * torch.maximum(norm(y), norm(y - problem.start.y))
    jumps = [norm(_jump(problem, y, length, unit)) for length in (longest, longest / 100)]
    return bool(((jumps[1] > 0.5 * jumps[0]) & (jumps[1] > 1e-3 * start)).any())


def has_kink_nearby(problem: Problem, found: Solution) -> bool:
    """Whether a kink lies within a hundredth of the params from where a solve ended, as ordered steps leave it.

    Along the gradient the loss is then a V: it falls towards the kink from both sides, with slopes that are the same
    over a step and over a tenth of it, or nearly so, where those of a smooth valley are a tenth.
    """
    y = found.value.detach()
    size, unit = torch.maximum(norm(y), norm(y - problem.start.y)), _downhill(problem, y)
    valleys = []
    for span in (0.1, 0.01, 0.001):
        ahead, behind = (dot(problem.evaluate(axpy(way * span * size, unit, y)).g, unit) for way in (1, -1))
        valleys.append(torch.minimum(ahead, -behind))
    kinks = [(near > 0.3 * far) & (far > 1e-3 * norm(problem.start.g)) for far, near in itertools.pairwise(valleys)]
    return bool(torch.stack(kinks).any())


def _downhill(problem: Problem, y: Tensor) -> Tensor:
    """The gradient at ``y`` at unit length; zero where it vanishes."""
    g = problem.evaluate(y).g
    return scale(torch.where(norm(g) > 0, 1 / norm(g), torch.zeros_like(norm(g))), g)


def _jump(problem: Problem, y: Tensor, length: Tensor, unit: Tensor) -> Tensor:
    """What the gradient changes by from ``length`` behind ``y`` to as much ahead."""
    ahead, behind = (problem.evaluate(axpy(way * length, unit, y)).g for way in (1, -1))
    return ahead - behind


def is_coupled(operator: Operator) -> bool:
    """Whether a vector that is not zero in one problem of a batch only has a product that is not zero in others."""
    vector = torch.zeros((*operator.batch_shape, operator.size), dtype=operator.dtype, device=operator.device)
    vector.view(-1, operator.size)[0] = normal((operator.size,), 0, operator.device).to(operator.dtype)
    product = operator.matvec(vector).reshape(-1, operator.size)
    return bool((product[1:].abs() > torch.finfo(product.dtype).eps ** 0.5 * product.abs().max()).any())


def asymmetry(operator: Operator) -> float:
    """``||J v - J^T v|| / ||J v||`` for a random v; the largest of a batch."""
    v = normal((*operator.batch_shape, operator.size), 0, operator.device).to(operator.dtype)
    ahead, back = operator.matvec(v), operator.rmatvec(v)
    return float((norm(ahead - back) / norm(ahead)).nan_to_num(0.0).max())


def mixes_problems(problem: Problem, y: Tensor) -> bool:
    """Whether the problems of a batch depend on each other at ``y``: by slopes, or as `is_coupled` sees it."""
    if not problem.raveler.batch_shape:
        return False
    if _slopes_mix(problem, y):
        return True
    with contextlib.suppress(NoSecondDerivativeError):
        bent = curved(problem, y)
        return bent is not None and is_coupled(bent[0])
    return False


def _slopes_mix(problem: Problem, y: Tensor) -> bool:
    """Whether the first loss of a batch has a slope along the params of others.

    A term that all losses share may be linear in the params: products with the Hessian do not see it.
    """
    free = [leaf.detach().requires_grad_() for leaf in problem.raveler.unravel(y)]
    with torch.enable_grad():
        losses = problem.loss(problem.raveler.unflatten(free))
    if not losses.requires_grad:
        return False
    first = torch.zeros_like(losses)
    first.view(-1)[0] = 1
    others = problem.raveler.ravel(filled(pull([losses], free, [first]), free)).reshape(-1, y.shape[-1])[1:]
    return bool((norm(others) > torch.finfo(y.dtype).eps ** 0.5 * norm(problem.start.g).max()).any())


def inner_advice(problem: Problem, found: Solution, solver: InnerSolver | None) -> str:
    """What to try where ``solver`` failed, from its own settings and what is seen where it ended.

    An objective that is random explains most failures.

    Args:
        solver: None: a solver that is not known.
    """
    result, name = found.result, _name(solver)
    if is_random(problem, found):
        return RANDOM_ADVICE
    if mixes_problems(problem, found.value):
        return COUPLED_ADVICE
    if "given_up" in found.stats:
        return (
            "The params are no minimum, and one may be thousands of steps away, so the default solver ended, and the "
            "default hypergradient is an approximation by five Hessian products. "
            f"{NETWORK_ADVICE}; or name the solver: LBFGS(max_steps=500) goes on"
        )
    if result is Result.NEGATIVE_CURVATURE:
        return (
            "The gradient vanishes at a maximum or saddle, which is no minimum: start elsewhere, for instance at "
            "random params"
        )
    steps = f"raise max_steps{now(solver, 'max_steps')}"
    if result is Result.UNBOUNDED:
        text = (
            "Without a minimum there is no hypergradient: add a penalty on the params (separable classes need one). If "
            f"there is one, {_joined('scale the data', _other(name), steps)}"
        )
        return f"{text}. {NETWORK_ADVICE}" if _still_bends_down(problem, found) else text
    if result is Result.NONFINITE and not bool(torch.isfinite(problem.start.g).all()):
        return (
            "The loss is finite at init, but its gradient is not: look for functions whose slope is infinite or "
            "undefined there (sqrt or norm at zero, also behind torch.where), and for a NaN in the data that nansum or "
            "nanmean skips"
        )
    if result is Result.NONFINITE:
        smaller = "" if name in LINE_SEARCHES else "Lower the step size, start elsewhere, or look"
        return (
            f"{smaller or 'Start elsewhere, or look'} whether the loss falls without end (without a penalty it may "
            "have no minimum)"
        )
    what = "The hypergradient holds at a minimum only"
    loosen = f"loosen gtol{now(solver, 'gtol')}" if getattr(solver, "gtol", None) else ""
    if result is Result.STAGNATED and has_kink(problem, found):
        return KINK_ADVICE
    if result is Result.STAGNATED:
        enough = f"{loosen or 'give a gtol of your own'} if this accuracy is enough"
        return f"{what}: " + _joined("scale the params or the data", "take float64", _other(name), enough)
    if name in LINE_SEARCHES and _still_bends_down(problem, found):
        return f"{what}, and the Hessian still has negative curvature here. {NETWORK_ADVICE}"
    rate = "" if name in LINE_SEARCHES else "take another step size"
    return f"{what}: " + _joined(steps, rate, loosen, _other(name))


def _still_bends_down(problem: Problem, found: Solution) -> bool:
    """Whether a problem that failed after many steps has negative curvature, as networks have."""
    failed = ~(found.stats["result"] <= int(Result.STEPS_DONE)) & (found.stats["num_steps"] >= ENOUGH_STEPS)
    if not bool(failed.any()):
        return False
    down = bends_down(problem, found.value, ENOUGH_STEPS, 100 * torch.finfo(found.value.dtype).eps)
    return bool((down & failed).any())


GAUSS_NEWTON_ADVICE = "Implicit(CG(max_steps=10), operator=GaussNewton.of(module, loss), damping=1e-2)"
NETWORK_ADVICE = (
    "For a network take solver=Steps(Adam(lr=1e-2), max_steps=30), go on from fit.value in the next outer step, and "
    f"take a matrix that is never indefinite: hypergrad={GAUSS_NEWTON_ADVICE}"
)
LINE_SEARCHES = ("LBFGS", "NewtonCG", "ScipyMinimize")
"""Solvers that find their own step sizes."""


def _name(solver: object) -> str:
    """The name of the class, or of that which it is made of."""
    names = [kind.__name__ for kind in type(solver).__mro__]
    return next((name for name in LINE_SEARCHES if name in names), names[0])


def _other(name: str) -> str:
    """The solvers of `LINE_SEARCHES` of this library that are not in use."""
    others = [other for other in ("LBFGS", "NewtonCG") if other != name]
    fallback = " (throw='fallback' does that)" if "NewtonCG" in others else ""
    return f"take {' or '.join(f'{other}()' for other in others)}{fallback}"


def now(solver: object, setting: str) -> str:
    """The value of a setting, in brackets, where there is one."""
    value = getattr(solver, setting, None)
    return "" if value is None else f" (now {value:g})"


def _joined(*parts: str) -> str:
    """Alternatives as one enumeration; empty ones are left out."""
    *first, last = [part for part in parts if part]
    return f"{', '.join(first)}, or {last}" if first else last
