"""Convex quadratic programs, differentiable towards all their data through the KKT conditions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .closure import Closure, Recorder, VmappedClosure, in_transform
from .hypergrad.differentiate import differentiable_solve
from .hypergrad.implicit import Implicit
from .hypergrad.statement import ResidualStatement
from .linalg.direct import LU
from .problem import RootProblem
from .solution import Result, Solution, SolveWarning, Throw, check_throw, make_codes, settle

ADVICE = (
    "Check that the constraints can be met (a feasible point exists) and that the objective is bounded below on them; "
    "otherwise raise max_steps or loosen tol"
)


class QPSolution(NamedTuple):
    """The solution z ``[*batch, n]`` and the multipliers of both kinds of constraints, ``[*batch, m]`` each."""

    primal: Tensor
    equality: Tensor
    inequality: Tensor


def quadratic_program(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    hypergrad: Implicit | None = Implicit(LU()),  # noqa: B008 (frozen)
    tol: float | None = None,
    max_steps: int = 50,
    throw: Throw = "warn",
) -> Solution:
    """Minimise ``z'Qz / 2 + c'z`` subject to ``A z = b`` and ``G z <= h``.

    For layers and inner problems with linear constraints, up to a few hundred variables: dense, batched. Solved by a
    primal-dual interior point (Mehrotra 1992), in float64 whatever the data's dtype, then polished on its active set.
    The derivative is that of the KKT conditions (Amos and Kolter 2017),

        Q z + c + A'nu + G'lambda = 0,   A z = b,   lambda (G z - h) = 0,

    by one LU solve of ``n + m`` unknowns; any order, both modes, under `torch.func`. Only the symmetric part of Q
    matters. Without constraints `argmin` is the simpler way.

    Args:
        Q, c, A, b, G, h: of shapes ``[n, n], [n], [me, n], [me], [mi, n], [mi]``, or with T in front: T programs at
            once. What is the same for all needs no T.
        hypergrad: the linear solver of the adjoint; None: the value is detached.
        tol: of the KKT residual, relative to the data; None: 1e-9 (float64) or 1e-5 (float32).
        max_steps: of the interior point.
        throw: as in `argmin`.

    Returns:
        A `Solution` whose value is a `QPSolution`. Its stats: ``num_steps``, ``residual_norm`` (of the KKT conditions),
        ``result``, and ``degenerate``: whether a constraint is active with a multiplier of zero, so that the solution
        has one-sided derivatives only, and the one returned is not unique.

    Raises:
        ValueError: shapes, NaN, or a Q that is not positive semi-definite; the message names the argument.
        SolveError, SolveWarning: infeasible, unbounded or unsolved programs, as ``throw`` says; so do degenerate ones.
    """
    check_throw(throw)
    data = _checked(Q, c, A, b, G, h)
    batch = data[1].shape[:-1]
    init = QPSolution(*(torch.zeros_like(d) for d in (data[1], data[3], data[5])))
    base = 1e-9 if data[1].dtype == torch.float64 else 1e-5
    method = InteriorPoint(base if tol is None else tol, max_steps)

    def build(recorder: Recorder | None) -> RootProblem:
        problem = RootProblem(_kkt, init, data, batch_dims=len(batch), recorder=recorder)
        problem.data = data
        return problem

    def solve(problem: RootProblem, measure: Callable[[Solution], Solution]) -> Solution:
        found = measure(method.find(problem))
        settle(found, throw, "The quadratic program", ADVICE)
        if throw != "ignore" and bool(found.stats["degenerate"].any()):
            warnings.warn(
                "The quadratic program is degenerate: a constraint is active with a multiplier of zero, so its "
                "derivative is one-sided. Perturb the data, or pass throw='ignore'.",
                SolveWarning,
                stacklevel=2,
            )
        return found

    return differentiable_solve(
        lambda closure: QPStatement(closure, replace(closure, fn=lambda _, *data: data)),
        _kkt,
        init,
        data,
        build=build,
        batch_dims_of=lambda _, init: len(batch),
        solve=solve,
        hypergrad=hypergrad,
        throw=throw,
    )


@dataclass(frozen=True)
class QPStatement(ResidualStatement):
    """The KKT conditions. ``data``: a closure that gives the program's data at other hyperparameters."""

    data: Closure | VmappedClosure

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> RootProblem:
        problem = super().problem(start, hparams, batch_dims)
        problem.data = self.data(start, hparams)
        return problem

    def vmapped(self, in_dims: tuple[int | None, ...]) -> QPStatement:
        return replace(self, closure=VmappedClosure(self.closure, in_dims), data=VmappedClosure(self.data, in_dims))


@dataclass(frozen=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector on dense, batched programs; a `RootSolver` of the KKT conditions."""

    tol: float
    max_steps: int = 50

    def __post_init__(self) -> None:
        if not self.tol > 0:
            raise ValueError(f"tol is {self.tol}: it must be positive.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: at least one step is needed.")

    @torch.no_grad()
    def find(self, problem: RootProblem) -> Solution:
        """The solution of the KKT conditions, flat."""
        program = _Program(*(d.detach().double() for d in problem.data))
        z, nu, s, lam = program.start()
        shape = z.shape[:-1]
        steps = torch.zeros(shape, dtype=torch.int64, device=z.device)
        active = torch.ones(shape, dtype=torch.bool, device=z.device)
        codes = make_codes(Result.MAX_STEPS, steps)
        best: tuple[Tensor, ...] = (z, nu, s, lam)
        best_error = torch.full(shape, torch.inf, dtype=torch.float64, device=z.device)
        for _ in range(self.max_steps + 1):
            error = program.error(z, nu, s, lam)
            codes = torch.where(active & (error <= self.tol), make_codes(Result.CONVERGED, codes), codes)
            better = active & (error < best_error)
            best = _chosen(better, (z, nu, s, lam), best)
            # Past the tolerance, as far as it goes: the active set shows ever more clearly.
            active = (
                active & torch.isfinite(error) & ((error > self.tol) | (error < 0.5 * best_error)) & (error > 1e-14)
            )
            best_error = torch.where(better, error, best_error)
            if not bool(active.any()):
                break
            z, nu, s, lam = _chosen(active, program.step(z, nu, s, lam), (z, nu, s, lam))
            steps = steps + active
        z, nu, s, lam = best
        z, nu, lam, solved = program.polished(z, nu, s, lam, self.tol)
        codes = torch.where(solved, make_codes(Result.CONVERGED, codes), codes)
        grown = z.abs().amax(-1) > 1e12 * (1 + program.scale)
        codes = torch.where(grown & (codes != 0), make_codes(Result.DIVERGED, codes), codes)
        codes = torch.where(torch.isfinite(z).all(-1), codes, make_codes(Result.NONFINITE, codes))
        flat = problem.raveler.ravel(
            [part.to(like.dtype) for part, like in zip((z, nu, lam), _like(problem), strict=True)]
        )
        degenerate = program.degenerate(z, lam) & (codes == int(Result.CONVERGED))
        return Solution(flat, {"num_steps": steps, "result": codes, "degenerate": degenerate})


def _chosen(where: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(where.unsqueeze(-1), n, o) for n, o in zip(new, old, strict=True))


@dataclass
class _Program:
    """The data in float64, and the pieces of the algorithm; all with the same leading dimensions."""

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    def __post_init__(self) -> None:
        self.Q = (self.Q + self.Q.mT) / 2
        parts = torch.cat([self.c, self.b, self.h], -1)
        self.scale = 1 + parts.abs().amax(-1)

    def start(self) -> tuple[Tensor, ...]:
        """The least-squares start of Vandenberghe (2010), pushed into the interior."""
        z, nu, lam = self._solve(torch.ones_like(self.h), -self.c, self.b, self.h)
        slack, lam = -lam, lam
        for_slack, for_lam = ((-x).amax(-1, keepdim=True) if x.shape[-1] else None for x in (slack, lam))
        if for_slack is not None and for_lam is not None:
            slack = torch.where(for_slack < 0, slack, slack + 1 + for_slack)
            lam = torch.where(for_lam < 0, lam, lam + 1 + for_lam)
        return z, nu, slack, lam

    def residuals(self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dual = _mul(self.Q, z) + self.c + _mul(self.A.mT, nu) + _mul(self.G.mT, lam)
        return dual, _mul(self.A, z) - self.b, _mul(self.G, z) + s - self.h

    def error(self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor) -> Tensor:
        """The largest violation of the KKT conditions, relative to the data, ``[*batch]``."""
        parts = torch.cat([*self.residuals(z, nu, s, lam), s * lam], -1)
        return parts.abs().amax(-1) / self.scale

    def step(self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        dual, equal, unequal = self.residuals(z, nu, s, lam)
        weight = lam / s

        def towards(complement: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            dz, dnu, dlam = self._solve(1 / weight, -dual, -equal, -unequal + complement / lam)
            return dz, dnu, -(complement + s * dlam) / lam, dlam

        affine = towards(s * lam)
        count = max(self.h.shape[-1], 1)
        mu = (s * lam).sum(-1, keepdim=True) / count
        length = torch.minimum(_longest(s, affine[2]), _longest(lam, affine[3]))
        after = ((s + length * affine[2]) * (lam + length * affine[3])).sum(-1, keepdim=True) / count
        sigma = (after / mu.clamp_min(1e-300)).clamp(0, 1) ** 3
        dz, dnu, ds, dlam = towards(s * lam + affine[2] * affine[3] - sigma * mu)
        length = 0.99 * torch.minimum(_longest(s, ds), _longest(lam, dlam))
        length = torch.where(length >= 0.99, torch.ones_like(length), length) if not self.h.shape[-1] else length
        return z + length * dz, nu + length * dnu, s + length * ds, lam + length * dlam

    def polished(self, z: Tensor, nu: Tensor, s: Tensor, lam: Tensor, tol: float) -> tuple[Tensor, ...]:
        """The exact solution on the active set, where it is one; and whether it is."""
        active = lam > s
        row = torch.where(active, self.h, torch.zeros_like(self.h))
        n, me, mi = self.c.shape[-1], self.b.shape[-1], self.h.shape[-1]
        top = torch.cat([self.Q, self.A.mT, self.G.mT], -1)
        middle = torch.cat([self.A, self.A.new_zeros(*self.A.shape[:-1], me + mi)], -1)
        chosen = torch.where(active.unsqueeze(-1), self.G, torch.zeros_like(self.G))
        idle = torch.diag_embed((~active).to(self.h.dtype))
        bottom = torch.cat([chosen, self.G.new_zeros(*self.G.shape[:-1], me), idle], -1)
        right = torch.cat([-self.c, self.b, row], -1)
        found, info = torch.linalg.solve_ex(torch.cat([top, middle, bottom], -2), right.unsqueeze(-1))
        new_z, new_nu, new_lam = found.squeeze(-1).split([n, me, mi], -1)
        slack = self.h - _mul(self.G, new_z)
        error = self.error(new_z, new_nu, slack, new_lam)
        slackness = torch.cat([slack, new_lam, torch.ones_like(new_z[..., :1])], -1).amin(-1)
        feasible = slackness >= -tol * self.scale
        better = (info == 0) & torch.isfinite(error) & feasible & (error <= tol)
        keep = better.unsqueeze(-1)
        return (
            torch.where(keep, new_z, z),
            torch.where(keep, new_nu, nu),
            torch.where(keep, new_lam, lam),
            better,
        )

    def degenerate(self, z: Tensor, lam: Tensor) -> Tensor:
        """Whether a constraint is active with a multiplier of zero."""
        small = 1e-7 * self.scale.unsqueeze(-1)
        slack = (self.h - _mul(self.G, z)).abs()
        return ((slack <= small) & (lam.abs() <= small)).any(-1)

    def _solve(self, damping: Tensor, p: Tensor, q: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[Q A' G'; A 0 0; G 0 -damping] [z, nu, lam] = [p, q, r]`` by eliminating lam."""
        n, me = self.c.shape[-1], self.b.shape[-1]
        weighted = self.G / damping.unsqueeze(-1)
        top = torch.cat([self.Q + self.G.mT @ weighted, self.A.mT], -1)
        bottom = torch.cat([self.A, self.A.new_zeros(*self.A.shape[:-1], me)], -1)
        matrix = torch.cat([top, bottom], -2)
        # A touch of regularization, far below the tolerance: A may have dependent rows, Q a null space.
        size = matrix.abs().amax((-2, -1), keepdim=True)
        signs = torch.cat([torch.ones(n), -torch.ones(me)]).to(matrix)
        right = torch.cat([p + _mul(weighted.mT, r), q], -1)
        found, _ = torch.linalg.solve_ex(matrix + 1e-13 * size * torch.diag(signs), right.unsqueeze(-1))
        z, nu = found.squeeze(-1).split([n, me], -1)
        return z, nu, (_mul(self.G, z) - r) / damping


def _kkt(point: QPSolution, *data: Tensor) -> QPSolution:
    """The conditions that vanish at the solution."""
    Q, c, A, b, G, h = data
    z, nu, lam = point
    dual = _mul((Q + Q.mT) / 2, z) + c + _mul(A.mT, nu) + _mul(G.mT, lam)
    return QPSolution(dual, _mul(A, z) - b, lam * (_mul(G, z) - h))


def _mul(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """The largest step up to one that keeps ``x`` positive, ``[*batch, 1]``."""
    ratio = torch.where(dx < 0, -x / dx, torch.full_like(x, torch.inf))
    ones = torch.ones_like(x[..., :1]) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    return torch.cat([ratio, ones], -1).amin(-1, keepdim=True)


def _like(problem: RootProblem) -> list[Tensor]:
    return problem.raveler.unravel(problem.y)


def _checked(
    Q: Tensor, c: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[Tensor, ...]:
    """All data with the same leading dimensions; absent constraints as empty ones."""
    for name, tensor in (("Q", Q), ("c", c)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} is {type(tensor).__name__}: a tensor of floating point is needed.")
    n = c.shape[-1] if c.dim() else 0
    if n == 0:
        raise ValueError(f"c has shape {tuple(c.shape)}: a vector [n] or [T, n] is needed.")
    for first, second, one, two in (("A", "b", A, b), ("G", "h", G, h)):
        if (one is None) != (two is None):
            raise ValueError(f"{first} and {second} belong together: give both, or neither.")
    empty = [c.new_zeros(0, n), c.new_zeros(0)]
    given = [Q, c, *([A, b] if A is not None else empty), *([G, h] if G is not None else empty)]
    tensors = [tensor for tensor in given if tensor is not None]
    rows = (n, None, tensors[3].shape[-1], None, tensors[5].shape[-1], None)
    for name, tensor, height in zip(("Q", "c", "A", "b", "G", "h"), tensors, rows, strict=True):
        wanted = (height, n) if height is not None else tensor.shape[-1:]
        dims = len(wanted)
        if tensor.dim() not in (dims, dims + 1) or tuple(tensor.shape[-dims:]) != tuple(wanted):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {list(wanted)} is needed, or T of them.")
    sizes = {t.shape[0] for t, dims in zip(tensors, (2, 1, 2, 1, 2, 1), strict=True) if t.dim() > dims}
    if len(sizes) > 1:
        raise ValueError(f"the data are for {sorted(sizes)} programs: give T of each, or one.")
    full = [
        t if not sizes or t.dim() > dims else t.expand(*sizes, *t.shape)
        for t, dims in zip(tensors, (2, 1, 2, 1, 2, 1), strict=True)
    ]
    if not in_transform():
        _check_values(full)
    return tuple(full)


def _check_values(data: list[Tensor]) -> None:
    for name, tensor in zip(("Q", "c", "A", "b", "G", "h"), data, strict=True):
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(
                f"{name} contains NaN or infinite values: leave a constraint out rather than bound it by inf."
            )
    Q = data[0].detach().double()
    lowest = torch.linalg.eigvalsh((Q + Q.mT) / 2)[..., 0]
    if bool((lowest < -1e-6 * (1 + Q.abs().amax((-2, -1)))).any()):
        raise ValueError(
            f"Q is not positive semi-definite: its smallest eigenvalue is {float(lowest.min()):.3g}, and the program "
            "is not convex. Add a multiple of the identity, or take argmin or root for a stationary point."
        )
