"""Nonlinear least squares by trust regions, batched: Levenberg-Marquardt, and Gauss-Newton by conjugate gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.jacobian import pull_back, transposed
from ..linalg.operator import widened
from ..problem import Evaluation, Problem
from ..solution import Result, Solution
from ..tree import broadcasts_to, dot, norm, scale
from .descent import ENOUGH_STEPS, GROWTH
from .minimize import Progress, check_settings
from .nearness import Nearness

Residuals = Callable[[Sequence[Tensor]], Tensor]
"""From the leaves of the params to the residuals ``[*batch, m]``."""

Rho = Callable[[Tensor], Tensor]
"""The loss of squared residuals, entry by entry; slope 1 at 0."""


@dataclass(frozen=True)
class Loss:
    """``sum scale^2 rho(r^2 / scale^2) / 2`` of residuals r; without rho the plain sum of squares.

    ``scale`` is one number, or one for each residual.
    """

    rho: Rho | None = None
    scale: float | Tensor = 1.0

    def cost(self, r: Tensor) -> Tensor:
        """``[*batch, m] -> [*batch]``"""
        if self.rho is None:
            return r.square().sum(-1) / 2
        self._check_scale(r)
        return (self.scale**2 * self.rho((r / self.scale).square())).sum(-1) / 2

    def _check_scale(self, r: Tensor) -> None:
        shape = tuple(self.scale.shape) if isinstance(self.scale, Tensor) else ()
        if not broadcasts_to(shape, r.shape):
            raise ValueError(
                f"loss_scale has shape {shape}, and the residuals are vectors of shape {tuple(r.shape)}, flattened and "
                "one for each fit: a number is needed, one for each residual [m], or one for each fit [T, 1]."
            )

    def weights(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """``rho'`` and the curvature ``rho' + 2 rho'' r^2 / scale^2`` of the cost by each residual, at least rounding.

        With it the matrix of Gauss and Newton is that of Triggs et al. (2000), as in `scipy.optimize.least_squares`.
        """
        if self.rho is None:
            return torch.ones_like(r), torch.ones_like(r)
        with torch.enable_grad():
            z = (r.detach() / self.scale).square().detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.rho(z).sum(), z, create_graph=True)
            second = torch.zeros_like(z)
            if slope.requires_grad:
                second = torch.autograd.grad(slope.sum(), z, allow_unused=True, materialize_grads=True)[0]
        slope, z = slope.detach(), z.detach()
        return slope, (slope + 2 * second * z).clamp_min(torch.finfo(r.dtype).eps)


@dataclass(frozen=True)
class Terms:
    """What a problem of least squares is the sum of."""

    residuals: Residuals
    loss: Loss


class Model(ABC):
    """The quadratic ``c + g p + ||J p||^2 / 2`` of the cost at a point, its steps bounded by ``||D p|| <= radius``.

    Attributes:
        at: the point with its cost and gradient. size: D, the scale of each coordinate, ``[*batch, n]``.
    """

    def __init__(self, problem: Problem, terms: Terms, y: Tensor):
        self.raveler = problem.raveler
        self.free = [leaf.detach().requires_grad_() for leaf in self.raveler.unravel(y)]
        with torch.enable_grad():
            self.outputs = terms.residuals(self.free)
        r = self.outputs.detach()
        slope, self.curvature = terms.loss.weights(r)
        with torch.no_grad():
            cost = terms.loss.cost(r).double()
        gradient = self.raveler.ravel(pull_back([self.outputs], self.free, [slope * r]))
        self.at, self.residuals = Evaluation(y, cost, gradient), slope * r / self.curvature.sqrt()
        self.weights, self.pulled = transposed([self.outputs], self.free)
        self.size = torch.ones_like(y)

    @abstractmethod
    def step(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The step ``[*batch, n]``, and where it is the minimum of the quadratic inside of the region, ``[*batch]``."""

    def push(self, p: Tensor) -> Tensor:
        """``J p`` with the square root of the weights, ``[*batch, m]``."""
        return pull_back(self.pulled, self.weights, self.raveler.unravel(p))[0] * self.curvature.sqrt()

    def length(self, p: Tensor) -> Tensor:
        """``||D p||``."""
        return norm(self.size * p)

    def release(self) -> None:
        """Drop the graphs."""
        del self.outputs, self.weights, self.pulled, self.free


class DenseModel(Model):
    """By the singular values of ``J D^{-1}``, of which every step of the region follows; D is the length of columns."""

    def __init__(self, problem: Problem, terms: Terms, y: Tensor, last: Model | None):
        super().__init__(problem, terms, y)
        basis = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        matrix = torch.stack([self.push(e.expand_as(y)) for e in basis], -1)
        columns = torch.linalg.vector_norm(matrix, dim=-2)
        size = columns if last is None else torch.maximum(columns, last.size)
        self.size = torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))
        scaled = (matrix / self.size.unsqueeze(-2)).nan_to_num(0, 0, 0)
        u, s, vt = torch.linalg.svd(widened(scaled), full_matrices=False)
        self.s, self.v = s.double(), vt.mT
        residuals = self.residuals.nan_to_num(0, 0, 0).to(u.dtype)
        self.coefficients = (u.mT @ residuals.unsqueeze(-1)).squeeze(-1).double()

    def step(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        s, c = self.s, self.s * self.coefficients
        roundoff = torch.finfo(self.at.y.dtype).eps * self.outputs.shape[-1]
        regular = s > roundoff * s.amax(-1, keepdim=True)
        full = torch.where(regular, self.coefficients / s, torch.zeros_like(s))
        inside = norm(full) <= radius
        inverse = torch.where(radius > 0, 1 / radius, torch.zeros_like(radius))
        damping = torch.where(inside, torch.zeros_like(radius), norm(c) * inverse)
        for _ in range(SECULAR_STEPS):  # Newton on 1 / ||p|| = 1 / radius, convex and increasing (More 1978)
            bottom = s.square() + damping.unsqueeze(-1)
            p = torch.where(bottom > 0, c / bottom, torch.zeros_like(c))
            size = norm(p)
            slope = (p.square() / bottom.clamp_min(torch.finfo(s.dtype).tiny)).sum(-1)
            change = (size.square() / slope * (size * inverse - 1)).nan_to_num(0, 0, 0)
            damping = torch.where(inside, damping, (damping + change).clamp_min(0))
        bottom = s.square() + damping.unsqueeze(-1)
        bounded = torch.where(bottom > 0, c / bottom, torch.zeros_like(c))
        bounded = bounded * (radius / norm(bounded)).nan_to_num(1.0).clamp_max(1.0).unsqueeze(-1)
        weights = torch.where(inside.unsqueeze(-1), full, bounded).to(self.v.dtype)
        return (-(self.v @ weights.unsqueeze(-1)).squeeze(-1) / self.size).to(self.at.y.dtype), inside


SECULAR_STEPS = 8


class ProductModel(Model):
    """By conjugate gradients on products with ``J^T J``, up to the border of the region (Steihaug 1983); D is I."""

    def __init__(self, problem: Problem, terms: Terms, y: Tensor, rtol: Tensor, max_steps: int):
        super().__init__(problem, terms, y)
        self.rtol, self.max_steps = rtol, max_steps

    def step(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        p, r = torch.zeros_like(self.at.g), -self.at.g
        direction, size = r, norm(r)
        inside = active = size > 0
        target = self.rtol * size
        for _ in range(self.max_steps):
            if not bool(active.any()):
                break
            product = self._product(direction)
            curvature, rr = dot(direction, product), dot(r, r)
            alpha = torch.where(curvature > 0, rr / curvature, torch.inf)
            reach = _to_border(p, direction, radius)
            outside = active & ~(alpha < reach)
            alpha = torch.where(active, torch.minimum(alpha, reach), torch.zeros_like(alpha))
            p, r = p + scale(alpha, direction), r - scale(alpha, product)
            inside, active = inside & ~outside, active & ~outside & (norm(r) > target)
            direction = r + scale((dot(r, r) / rr).nan_to_num(0, 0, 0), direction)
        return p, inside

    def _product(self, p: Tensor) -> Tensor:
        pushed = self.push(p) * self.curvature.sqrt()
        return self.raveler.ravel(pull_back([self.outputs], self.free, [pushed]))


def _to_border(p: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """The step along ``direction`` that ends at the border."""
    unit = norm(direction)
    d = scale(1 / unit.clamp_min(torch.finfo(torch.float64).tiny), direction)
    along, gap = dot(p, d), (radius.square() - norm(p).square()).clamp_min(0)
    root = (along.square() + gap).sqrt()
    reach = torch.where(along > 0, gap / (along + root), root - along) / unit
    return torch.where(torch.isinf(radius), radius, reach)


@dataclass(frozen=True)
class TrustRegion(ABC):
    """Base of the solvers of `least_squares`, which a trust region makes converge from where Gauss-Newton would not.

    Args:
        max_steps: steps at most, one Jacobian each.
        gtol: stop a problem at this norm of the cost's gradient; None: where the distance to the solution, as the
            contraction of the last steps predicts it, is at most 1e-9 (float64) or 3e-5 (float32) of the params, both
            in the solver's own scale of each coordinate; see `Nearness`.
        radius: of the first region, in units of the norm of the scaled start (of 1 where that is zero).
    """

    max_steps: int = 1000
    gtol: float | None = None
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        if not self.radius > 0:
            raise ValueError(f"radius is {self.radius}: it must be positive.")

    @abstractmethod
    def model(self, problem: Problem, terms: Terms, y: Tensor, last: Model | None, first: Tensor) -> Model:
        """The model at ``y``; ``first`` is the norm of the gradient at the start."""

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`.

        Raises:
            TypeError: the problem is none of least squares.
        """
        terms = problem.terms
        if terms is None:
            raise TypeError(
                f"{type(self).__name__} minimises sums of squares, whose residuals it needs: call bl.least_squares"
                "(residuals, init, ...), or take LBFGS() for this objective."
            )
        return _descend(self, problem, terms)


@dataclass(frozen=True)
class LevenbergMarquardt(TrustRegion):
    """Levenberg-Marquardt as a trust region (More 1978), the default of `least_squares`; up to a few hundred params.

    Each step takes n products for the Jacobian and one singular value decomposition of it, whose columns are scaled, so
    that neither the units of the params nor a badly conditioned fit hurt.
    """

    def model(self, problem: Problem, terms: Terms, y: Tensor, last: Model | None, first: Tensor) -> Model:
        return DenseModel(problem, terms, y, last)


@dataclass(frozen=True)
class GaussNewtonCG(TrustRegion):
    """Gauss-Newton in a trust region, the steps by conjugate gradients (Steihaug 1983): for many params.

    Args:
        max_steps, gtol, radius: as in `TrustRegion`.
        cg_steps: products with ``J^T J`` for each step at most.
    """

    cg_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cg_steps < 1:
            raise ValueError(f"cg_steps is {self.cg_steps}: at least one product is needed for a step.")

    def model(self, problem: Problem, terms: Terms, y: Tensor, last: Model | None, first: Tensor) -> Model:
        model = ProductModel(problem, terms, y, torch.ones_like(first), self.cg_steps)
        model.rtol = (norm(model.at.g) / first).nan_to_num(1.0).clamp(1e-6, 0.1)
        return model


SUFFICIENT, POOR, GOOD = 1e-4, 0.25, 0.75
"""Parts of the predicted reduction: from where a step is accepted, its region shrunk, its region grown."""


def _descend(solver: TrustRegion, problem: Problem, terms: Terms) -> Solution[Tensor]:
    first = norm(problem.start.g)
    model = solver.model(problem, terms, problem.start.y, None, first)
    at = halfway = before = model.at
    progress = Progress.begin(at, solver.gtol)
    nearness = Nearness(at.y, problem.raveler.coarsest) if solver.gtol is None else None
    if nearness is not None:
        progress.mark(progress.active, Result.MAX_STEPS)
    length = model.length(at.y)
    radius = solver.radius * torch.where(length > 0, length, torch.ones_like(length))
    stretch = torch.ones_like(radius)
    for step in range(solver.max_steps + 1):
        if not bool(progress.active.any()):
            break
        p, inside = model.step(radius)
        decrement = -dot(at.g, p) - norm(model.push(p)).square() / 2
        if nearness is not None:
            progress.end(_look(nearness, model, p, inside, stretch, 2 * decrement), Result.CONVERGED)
        if step == solver.max_steps:
            break
        if step & (step - 1) == 0:
            before, halfway = halfway, at
        with torch.no_grad():
            y = at.y + torch.where(progress.active.unsqueeze(-1), p, torch.zeros_like(p))
            cost = terms.loss.cost(terms.residuals(problem.raveler.unravel(y))).double()
        rounding = 10 * math.sqrt(model.residuals.shape[-1]) * torch.finfo(at.y.dtype).eps * at.f.abs()
        # Where rounding hides what the step is worth, the quadratic is trusted.
        hidden = inside & (decrement.abs() <= rounding) & (cost <= at.f + rounding)
        ratio = torch.where(hidden, 1.0, ((at.f - cost) / decrement).nan_to_num(0.0, 0.0, 0.0))
        accepted = progress.active & (decrement >= 0) & (ratio > SUFFICIENT) & torch.isfinite(cost)
        moved, size = (p != 0).any(-1), model.length(p)
        radius = torch.where(ratio < POOR, 0.25 * torch.minimum(radius, size), radius)
        radius = torch.where((ratio > GOOD) & ~inside, 2 * radius, radius)
        progress.count()
        progress.end(~accepted & ((radius <= _shortest(model)) | ~moved), Result.STAGNATED)
        if bool(accepted.any()):
            model.release()
            model = solver.model(problem, terms, torch.where(accepted.unsqueeze(-1), y, at.y), model, first)
            at = model.at
            progress.look(at)
            # The distance is longer than the step by as much as the last steps changed it less.
            new_step = model.step(torch.full_like(radius, torch.inf))[0]
            longer = (model.length(p) / model.length(new_step - p)).nan_to_num(1.0, 1.0).clamp_min(1.0)
            stretch = torch.where(accepted, torch.maximum(longer, stretch**0.9), stretch)
        if nearness is not None:
            stuck = progress.codes == int(Result.STAGNATED)
            progress.mark(stuck & nearness.acceptable, Result.CONVERGED)
    final = stretch * norm(model.step(torch.full_like(radius, torch.inf))[0])
    model.release()
    grows = (norm(at.y - problem.start.y) > GROWTH * norm(before.y - problem.start.y)) & (final > 1e-3 * norm(at.y))
    far = grows & (progress.steps >= ENOUGH_STEPS) & (at.f < halfway.f)
    progress.mark(far & (progress.codes < int(Result.UNBOUNDED)), Result.UNBOUNDED)
    stats = {} if nearness is None else {"step_norm": final}
    return progress.solution(at.y, loss=at.f, **stats)


def _look(nearness: Nearness, model: Model, p: Tensor, inside: Tensor, stretch: Tensor, decrement: Tensor) -> Tensor:
    """Which problems have arrived, in the scale of each coordinate."""
    predicted = torch.where(inside, stretch * model.length(p), torch.inf)
    return nearness.look(predicted, model.size * model.at.y, decrement.abs(), model.at.f)


def _shortest(model: Model) -> Tensor:
    """A radius that no step can be seen in."""
    return torch.finfo(model.at.y.dtype).eps * model.length(model.at.y)
