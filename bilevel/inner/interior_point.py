"""A primal-dual interior point for dense convex quadratic programs; batched, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.direct import least_norm
from ..problem import RootProblem
from ..solution import Result, Solution, make_codes, marked
from ..tree import norm

REGULARIZATION = 1e-13
"""Added to the systems, in scaled data: A may have dependent rows, Q a null space. Steps are refined."""
FAR = 1e-8
"""A certificate says that there is no solution within one over this, in units of the data."""
TINY = 1e-300
WIDEST = 2.0**20
"""Between the units of the params of one program, at most."""
SINGULAR = 1e13
"""A KKT matrix of this condition is singular: in float64 rounding alone makes it regular."""


@dataclass(frozen=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector (1992): a `RootSolver` of the KKT conditions, whose problem brings its ``data``.

    For up to a few hundred unknowns a program. A step costs one LU of ``n + m_equality`` unknowns and four solves with
    it; ten steps are usual, twenty many. The data are those of `scaled`, so that tolerances are absolute. The result is
    polished: solved once more exactly on its active set, and kept where it meets the conditions.

    The solution's stats have also ``degenerate`` (a constraint is active with a multiplier of zero), and ``infeasible``
    and ``unbounded``, which rest on a certificate: multipliers whose combination of the constraints is impossible
    (Farkas), or a direction along which the objective falls for ever.

    Args:
        tol: of the KKT residual.
        max_steps: steps at most.
        near: where the polished point does not meet the conditions, the Newton step that is left, relative to z, above
            which the result is `Result.INACCURATE`; None: the residual alone decides.
    """

    tol: float
    max_steps: int = 50
    near: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tol > 0:
            raise ValueError(f"tol is {self.tol}: it must be positive.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: at least one step is needed.")

    @torch.no_grad()
    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """The solution of the KKT conditions, flat."""
        program = Program(*(d.detach().double() for d in problem.data))
        best, least, steps, infeasible, unbounded = self._walk(program)
        if bool(unbounded.any()):  # an objective falls for ever where no point is, too
            nowhere = unbounded & self._walk(program.nearest())[3]
            infeasible, unbounded = infeasible | nowhere, unbounded & ~nowhere
        best, exact = program.polished(best, self.tol)
        solved = exact | (least <= self.tol)
        codes = marked(make_codes(Result.MAX_STEPS, steps), solved, Result.CONVERGED)
        if self.near is not None:
            size = norm(best.z).clamp_min(self.near**0.5)  # a solution of zero has none; in scaled data 1 is usual
            codes = marked(
                codes, solved & ~exact & (norm(program.newton_step(best).z) > self.near * size), Result.INACCURATE
            )
        codes = marked(codes, ~solved & (steps < self.max_steps), Result.STAGNATED)
        codes = marked(codes, ~solved & (infeasible | unbounded), Result.DIVERGED)
        degenerate = solved & program.degenerate(best)
        flat = torch.cat([best.z, best.nu, best.lam], -1).to(problem.y.dtype)
        lost = program.violation(flat.double()) > max(self.tol, 100 * torch.finfo(flat.dtype).eps)
        codes = marked(codes, solved & lost, Result.INACCURATE)
        codes = marked(codes, ~torch.isfinite(flat).all(-1), Result.NONFINITE)
        flags = {"degenerate": degenerate, "infeasible": infeasible & ~solved, "unbounded": unbounded & ~solved}
        return Solution(flat, {"num_steps": steps, "result": codes, **flags})

    def _walk(self, program: Program) -> tuple[Iterate, Tensor, Tensor, Tensor, Tensor]:
        """The best point, its error and the steps to it; which programs have no feasible point; which no minimum."""
        point = program.start()
        shape = point.z.shape[:-1]
        steps = torch.zeros(shape, dtype=torch.int64, device=point.z.device)
        active = torch.ones(shape, dtype=torch.bool, device=point.z.device)
        best, least = point, torch.full(shape, torch.inf, dtype=torch.float64, device=point.z.device)
        infeasible = unbounded = ~active
        for step in range(self.max_steps + 1):
            error = program.error(point)
            better = active & (error < least)
            # Past the tolerance, as far as it goes: the active set shows ever more clearly.
            active = active & torch.isfinite(error) & ((least > self.tol) | (error < 0.5 * least)) & (error > 1e-14)
            best, least = point.where(better, best), torch.where(better, error, least)
            active = active & ~infeasible & ~unbounded
            if step == self.max_steps or not bool(active.any()):
                break
            last, point = point, program.step(point).where(active, point)
            steps = steps + active
            unsolved = active & (least > self.tol)
            infeasible = infeasible | (unsolved & program.proves_infeasible(point))
            unbounded = unbounded | (unsolved & program.proves_unbounded(point.z - last.z))
        return best, least, steps, infeasible, unbounded


@dataclass(frozen=True)
class Iterate:
    """The point ``z``, its slack ``s = h - G z``, and the multipliers ``nu`` and ``lam`` of both constraints."""

    z: Tensor
    nu: Tensor
    s: Tensor
    lam: Tensor

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """This one in the programs of the mask, ``other`` in the rest."""
        keep = mask.unsqueeze(-1)
        return Iterate(*(torch.where(keep, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class Program:
    """The data in float64, and the pieces of the algorithm; all with the same leading dimensions."""

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    def start(self) -> Iterate:
        """The least-squares start of Vandenberghe (2010), pushed into the interior."""
        z, nu, lam = self.solver(torch.ones_like(self.h))(-self.c, self.b, self.h)
        return Iterate(z, nu, _pushed(-lam), _pushed(lam))

    def nearest(self) -> Program:
        """The program of the feasible point nearest to zero."""
        eye = torch.eye(self.c.shape[-1], dtype=self.c.dtype, device=self.c.device)
        return replace(self, Q=eye.expand_as(self.Q), c=torch.zeros_like(self.c))

    def error(self, at: Iterate) -> Tensor:
        """The largest violation of the KKT conditions, ``[*batch]``."""
        return torch.cat([*self._residuals(at), at.s * at.lam], -1).abs().amax(-1)

    def violation(self, flat: Tensor) -> Tensor:
        """The `error` of a point ``[z, nu, lam]`` whose slack is that of the constraints: what rounding it has lost."""
        z, nu, lam = flat.split([self.c.shape[-1], self.b.shape[-1], self.h.shape[-1]], -1)
        return self.error(Iterate(z, nu, (self.h - mul(self.G, z)).clamp_min(0), lam))

    def step(self, at: Iterate) -> Iterate:
        """Towards the solution as if it were near, then corrected towards the central path."""
        towards = self._directions(at)
        count = max(self.h.shape[-1], 1)
        mu = (at.s * at.lam).sum(-1, keepdim=True) / count
        affine = towards(at.s * at.lam)
        length = _longest(at, affine)
        after = ((at.s + length * affine.s) * (at.lam + length * affine.lam)).sum(-1, keepdim=True) / count
        sigma = (after / mu.clamp_min(TINY)).clamp(0, 1) ** 3
        move = towards(at.s * at.lam + affine.s * affine.lam - sigma * mu)
        length = 0.99 * _longest(at, move) if self.h.shape[-1] else torch.ones_like(mu)
        return Iterate(*(getattr(at, f.name) + length * getattr(move, f.name) for f in fields(Iterate)))

    def newton_step(self, at: Iterate) -> Iterate:
        """The whole way to the solution, as the linearised conditions say."""
        return self._directions(at)(at.s * at.lam)

    def _directions(self, at: Iterate) -> Callable[[Tensor], Iterate]:
        """Newton's step that takes the given part off ``s * lam``; factorised once."""
        dual, equal, unequal = self._residuals(at)
        solve = self.solver(at.s / at.lam)

        def towards(complement: Tensor) -> Iterate:
            dz, dnu, dlam = solve(-dual, -equal, -unequal + complement / at.lam)
            return Iterate(dz, dnu, -(complement + at.s * dlam) / at.lam, dlam)

        return towards

    def polished(self, at: Iterate, tol: float) -> tuple[Iterate, Tensor]:
        """The exact solution on the active set, where it is one; and whether it is."""
        active = at.lam > at.s
        n, me, mi = self.c.shape[-1], self.b.shape[-1], self.h.shape[-1]
        top = torch.cat([self.Q, self.A.mT, self.G.mT], -1)
        middle = torch.cat([self.A, self.A.new_zeros(*self.A.shape[:-1], me + mi)], -1)
        chosen = torch.where(active.unsqueeze(-1), self.G, torch.zeros_like(self.G))
        idle = torch.diag_embed((~active).to(self.h.dtype))
        bottom = torch.cat([chosen, self.G.new_zeros(*self.G.shape[:-1], me), idle], -1)
        right = torch.cat([-self.c, self.b, torch.where(active, self.h, torch.zeros_like(self.h))], -1)
        found = least_norm(torch.cat([top, middle, bottom], -2), right, SINGULAR)
        z, nu, lam = found.split([n, me, mi], -1)
        new = Iterate(z, nu, self.h - mul(self.G, z), lam)
        error = self.error(new)
        feasible = torch.cat([new.s, new.lam, torch.ones_like(z[..., :1])], -1).amin(-1) >= -tol
        better = torch.isfinite(error) & feasible & (error <= tol)
        return new.where(better, at), better

    def degenerate(self, at: Iterate) -> Tensor:
        """Whether a constraint is active with a multiplier of zero."""
        slack = (self.h - mul(self.G, at.z)).abs()
        return ((slack <= 1e-7) & (at.lam.abs() <= 1e-7)).any(-1)

    def proves_infeasible(self, at: Iterate) -> Tensor:
        """``A'nu + G'lam = 0`` with ``b'nu + h'lam < 0``: no z meets the constraints (Farkas), or only far away."""
        bound = (self.b * at.nu).sum(-1) + (self.h * at.lam).sum(-1)
        combined = (mul(self.A.mT, at.nu) + mul(self.G.mT, at.lam)).abs().amax(-1)
        return (bound < 0) & (combined <= FAR * bound.abs())

    def proves_unbounded(self, d: Tensor) -> Tensor:
        """``Q d = 0, A d = 0, G d <= 0`` with ``c'd < 0``: the objective falls for ever along d, or very far."""
        slope = (self.c * d).sum(-1)
        broken = torch.cat([mul(self.Q, d).abs(), mul(self.A, d).abs(), mul(self.G, d).clamp_min(0)], -1).amax(-1)
        return (slope < 0) & (broken <= FAR * slope.abs())

    def solver(self, damping: Tensor) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """``[Q A' G'; A 0 0; G 0 -damping] [z, nu, lam] = [p, q, r]`` by eliminating lam, factorised once."""
        n, me = self.c.shape[-1], self.b.shape[-1]
        weighted = self.G / damping.unsqueeze(-1)
        top = torch.cat([self.Q + self.G.mT @ weighted, self.A.mT], -1)
        bottom = torch.cat([self.A, self.A.new_zeros(*self.A.shape[:-1], me)], -1)
        matrix = torch.cat([top, bottom], -2)
        signs = torch.cat([matrix.new_ones(n), -matrix.new_ones(me)])
        factor, pivots, _ = torch.linalg.lu_factor_ex(matrix + REGULARIZATION * torch.diag(signs))

        def solve(p: Tensor, q: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            right = torch.cat([p + mul(weighted.mT, r), q], -1).unsqueeze(-1)
            found = torch.linalg.lu_solve(factor, pivots, right)
            found = (found + torch.linalg.lu_solve(factor, pivots, right - matrix @ found)).squeeze(-1)
            z, nu = found.split([n, me], -1)
            return z, nu, (mul(self.G, z) - r) / damping

        return solve

    def _residuals(self, at: Iterate) -> tuple[Tensor, Tensor, Tensor]:
        dual = mul(self.Q, at.z) + self.c + mul(self.A.mT, at.nu) + mul(self.G.mT, at.lam)
        return dual, mul(self.A, at.z) - self.b, mul(self.G, at.z) + at.s - self.h


def scaled(Q: Tensor, c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The data in units of their own, and those units: of z ``[*batch, n]``, of both multipliers ``[*batch, m]``.

    Of Q the symmetric part. Its diagonal is then of one size (zeros, and what is below ``1 / WIDEST^2`` of the largest,
    aside); rows of constraints, z and the gradient of the objective are of about 1. The units are constants, powers of
    two (exact): the solution times its units is that of the data, and so are its derivatives. A row of G whose bound is
    infinite is empty.
    """
    Q = (Q + Q.mT) / 2
    with torch.no_grad():
        own = Q.diagonal(dim1=-2, dim2=-1)
        widths = (own.amax(-1, keepdim=True) / own).sqrt().clamp_max(WIDEST)
        widths = _unit(torch.where(own > 0, widths, torch.ones_like(widths)))
    Q, c = Q * widths.unsqueeze(-1) * widths.unsqueeze(-2), c * widths
    A, G = A * widths.unsqueeze(-2), G * widths.unsqueeze(-2)
    loose = torch.isposinf(h)
    G, h = torch.where(loose.unsqueeze(-1), torch.zeros_like(G), G), torch.where(loose, torch.zeros_like(h), h)
    with torch.no_grad():
        rows_A, rows_G = (_unit(m.abs().sum(-1)) for m in (A, G))
        curvature, slope = (m.abs().flatten(c.dim() - 1).amax(-1, keepdim=True) for m in (Q, c))
        # z is as far out as equations and constraints that exclude 0 say at least, or the least of the objective.
        least = torch.where(curvature > 0, slope / _unit(curvature), torch.zeros_like(slope))
        far = torch.cat([(b / rows_A).abs(), (-h / rows_G).clamp_min(0), least], -1).amax(-1, keepdim=True)
        widest = torch.cat([h / rows_G, torch.zeros_like(far)], -1).amax(-1, keepdim=True)
        unit = _unit(torch.where(far > 0, far, widest))
        force = _unit(torch.maximum(curvature * unit, slope))
    data = [Q * (unit / force).unsqueeze(-1), c / force, A / rows_A.unsqueeze(-1), b / rows_A / unit]
    data += [G / rows_G.unsqueeze(-1), torch.where(loose, torch.ones_like(h), h / rows_G / unit)]
    return data, [unit * widths, force / rows_A, force / rows_G]


def mul(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix for each vector: ``[*batch, m, n] x [*batch, n] -> [*batch, m]``."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _unit(size: Tensor) -> Tensor:
    """The power of two nearest to it; 1 for 0."""
    return torch.where(size > 0, torch.exp2(torch.log2(torch.where(size > 0, size, 1.0)).round()), 1.0)


def _pushed(x: Tensor) -> Tensor:
    """Positive, by one shift for each program."""
    if not x.shape[-1]:
        return x
    short = (-x).amax(-1, keepdim=True)
    return torch.where(short < 0, x, x + 1 + short)


def _longest(at: Iterate, move: Iterate) -> Tensor:
    """The largest step up to one that keeps slack and multipliers positive, ``[*batch, 1]``."""
    x, dx = torch.cat([at.s, at.lam], -1), torch.cat([move.s, move.lam], -1)
    ratio = torch.where(dx < 0, -x / dx, torch.full_like(x, torch.inf))
    return torch.cat([ratio, torch.ones_like(at.z[..., :1])], -1).amin(-1, keepdim=True)
