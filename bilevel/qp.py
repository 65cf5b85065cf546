"""Convex quadratic programs, differentiable towards all their data through the KKT conditions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch import innermost
from .checks import check_hypergrad, refuse_mps
from .closure import Closure, Tracer, VmappedClosure
from .context import solves
from .hypergrad.base import PathMethod
from .hypergrad.differentiate import differentiable_solve
from .hypergrad.implicit import Implicit
from .hypergrad.search import Search
from .hypergrad.statement import ResidualStatement
from .inner.interior_point import SINGULAR, InteriorPoint, mul, scaled
from .inner.nearness import Goal
from .linalg.direct import LeastNorm, is_singular
from .notices import tell
from .problem import RootProblem
from .solution import Result, Solution, SolveWarning, Throw, check_throw

INFEASIBLE = "It is infeasible: no point meets all its constraints (a feasible point is needed). Relax A, b, G or h"
UNBOUNDED = (
    "It is unbounded: its objective falls for ever along a direction that the constraints allow. Bound z, or add a "
    "multiple of the identity to Q"
)
INACCURATE = (
    "Its solution is less accurate than its data: some params are in much larger units than others, or nearly free, so "
    "that the objective hardly bounds them. Scale them, take float64 data, add a multiple of the identity to Q, or "
    "give a tol if this accuracy is enough"
)
ADVICE = "Raise max_steps, loosen tol, or look for constraints that can hardly be met"
DEGENERATE = (
    "The quadratic program is degenerate: a constraint is active with a multiplier of zero, so that its derivative is "
    "one-sided; or the solution is not unique, so that it has none. Drop such constraints, perturb the data, add a "
    "multiple of the identity to Q, or pass throw='ignore'."
)


class QPSolution(NamedTuple):
    """The solution z ``[*batch, n]`` and the multipliers of both kinds of constraints, ``[*batch, m]`` each."""

    primal: Tensor
    equality: Tensor
    inequality: Tensor


@solves
def quadratic_program(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    hypergrad: Implicit | None = Implicit(LeastNorm()),  # noqa: B008 (frozen)
    tol: float | None = None,
    max_steps: int = 50,
    throw: Throw = "warn",
) -> Solution[QPSolution]:
    """Minimise ``z'Qz / 2 + c'z`` subject to ``A z = b`` and ``G z <= h``.

    For layers and inner problems with linear constraints, up to a few hundred variables: dense, batched. Solved by a
    primal-dual interior point (Mehrotra 1992), in float64 whatever the data's dtype, then polished on its active set.
    The derivative is that of the KKT conditions (Amos and Kolter 2017),

        Q z + c + A'nu + G'lambda = 0,   A z = b,   lambda (G z - h) = 0,

    by one direct solve of ``n + m`` unknowns; any order, both modes, under `torch.func`. The data are scaled first, so
    that their units do not matter. Only the symmetric part of Q does. Constraints may depend on each other, as in
    transport: the multipliers are then those of least norm, the derivatives of z towards Q and c those without the
    redundant ones, towards the constraints those for changes that keep them consistent. Without constraints `argmin` is
    the simpler way.

    Args:
        Q, c, A, b, G, h: of shapes ``[n, n], [n], [me, n], [me], [mi, n], [mi]``, or with T in front: T programs at
            once. What is the same for all needs no T. An infinite bound in h is none: its constraint is left out.
        hypergrad: the linear solver of the adjoint; None: the value is detached.
        tol: of the KKT residual, relative to the data; None: 1e-9 (float64) or 1e-5 (float32).
        max_steps: of the interior point.
        throw: as in `argmin`.

    Returns:
        A `Solution` whose value is a `QPSolution`. Its stats: ``num_steps``, ``residual_norm`` (of the KKT conditions,
        in scaled data), ``result``, and ``degenerate``: whether the derivative is not unique, because a constraint is
        active with a multiplier of zero, active constraints depend on each other, or there are other solutions. Of
        constraints that depend on each other, derivatives are right along changes that they all share, and by Q and c;
        where one moves alone the slopes on both sides differ, and the gradient lies between them, without a warning;
        ``infeasible`` and ``unbounded``: whether that was proved.

    Raises:
        TypeError, ValueError: shapes, NaN, or a Q that is not positive semi-definite; the message names the argument.
        SolveError, SolveWarning: infeasible, unbounded or unsolved programs, as ``throw`` says; degenerate ones that
            are differentiated warn, but for constraints that depend on each other.
    """
    check_throw(throw)
    check_hypergrad(hypergrad)
    if isinstance(hypergrad, PathMethod):
        raise TypeError(f"hypergrad is {hypergrad!r}: a quadratic program takes Implicit(linear_solver), or None.")
    data, units = scaled(*_checked(Q, c, A, b, G, h))
    batch = data[1].shape[:-1]
    init = QPSolution(*(torch.zeros_like(d) for d in (data[1], data[3], data[5])))
    base = 1e-9 if data[1].dtype == torch.float64 else 1e-5
    near = Goal.of(data[1].dtype).promised if tol is None else None
    method = InteriorPoint(base if tol is None else tol, max_steps, near)

    def build(tracer: Tracer) -> RootProblem:
        problem = RootProblem(_kkt, init, tuple(data), batch_dims=len(batch), tracer=tracer)
        problem.data = data
        return problem

    tells = throw != "ignore" and hypergrad is not None
    found = differentiable_solve(
        lambda closure: QPStatement(closure, replace(closure, fn=lambda _, *data: data)),
        _kkt,
        init,
        tuple(data),
        build=build,
        batch_dims_of=lambda _, init: len(batch),
        search=Search(
            method.find, throw, "The quadratic program", _advice, complete=partial(_with_degenerate, warn=tells)
        ),
        hypergrad=hypergrad,
    )
    return found.with_value(QPSolution(*(part * unit for part, unit in zip(found.value, units, strict=True))))


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


def _with_degenerate(problem: RootProblem, found: Solution[Tensor], *, warn: bool) -> Solution[Tensor]:
    """The solution with its flag of degenerate programs; where a derivative is in doubt, it can be heard."""
    solved = found.stats["result"] == int(Result.CONVERGED)
    dependent, ambiguous = _dependent(found.value, problem.data)
    unsure = found.stats["degenerate"] | (solved & ambiguous)
    if warn and bool(unsure.any()):
        tell(DEGENERATE, SolveWarning)
    return found.with_stats(degenerate=unsure | (solved & dependent))


def _advice(_: RootProblem, found: Solution[Tensor]) -> str:
    for flag, advice in (("infeasible", INFEASIBLE), ("unbounded", UNBOUNDED)):
        if bool(found.stats[flag].any()):
            return advice
    return INACCURATE if found.result is Result.INACCURATE else ADVICE


def _kkt(point: QPSolution, *data: Tensor) -> QPSolution:
    """The conditions that vanish at the solution."""
    Q, c, A, b, G, h = data
    z, nu, lam = point
    dual = mul(Q, z) + c + mul(A.mT, nu) + mul(G.mT, lam)
    return QPSolution(dual, mul(A, z) - b, lam * (mul(G, z) - h))


@torch.no_grad()
def _dependent(point: Tensor, data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Whether ``[Q R'; R 0]``, with R the active constraints, is singular at ``point [*batch, n + m]``; and in z."""
    Q, c, A, b, G, h = (d.detach().double() for d in data)
    z, _, lam = point.double().split([c.shape[-1], b.shape[-1], h.shape[-1]], -1)
    active = lam > h - mul(G, z)
    rows = torch.cat([A, torch.where(active.unsqueeze(-1), G, torch.zeros_like(G))], -2)
    idle = torch.diag_embed(torch.cat([torch.zeros_like(b), (~active).to(h.dtype)], -1))
    matrix = torch.cat([torch.cat([Q, rows.mT], -1), torch.cat([rows, idle], -1)], -2)
    return is_singular(matrix, SINGULAR), is_singular(Q + rows.mT @ rows, SINGULAR)


def _checked(
    Q: Tensor, c: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[Tensor, ...]:
    """All data with the same leading dimensions; absent constraints as empty ones."""
    for name, tensor in (("Q", Q), ("c", c), ("A", A), ("b", b), ("G", G), ("h", h)):
        if tensor is None and name not in ("Q", "c"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {kind}: a tensor of floating point is needed.")
    n = c.shape[-1] if c.dim() else 0
    if n == 0:
        raise ValueError(f"c has shape {tuple(c.shape)}: a vector [n] or [T, n] is needed.")
    refuse_mps("c", c.device)
    for first, second, one, two in (("A", "b", A, b), ("G", "h", G, h)):
        if (one is None) != (two is None):
            raise ValueError(f"{first} and {second} belong together: give both, or neither.")
    empty = [c.new_zeros(0, n), c.new_zeros(0)]
    given = [Q, c, *([A, b] if A is not None else empty), *([G, h] if G is not None else empty)]
    tensors = [tensor for tensor in given if tensor is not None]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if dtype == torch.float16:
        raise TypeError("the data are of torch.float16, whose range is too small for their units: take float32.")
    tensors = [tensor.to(dtype) for tensor in tensors]
    for name, matrix, tensor in (("b", "A", tensors[3]), ("h", "G", tensors[5])):
        if tensor.dim() == 0:
            raise ValueError(
                f"{name} has shape (): a vector is needed, one number for each row of {matrix}. "
                f"For one constraint write {matrix} as [1, {n}] and {name} as [1]."
            )
    rows = (n, None, tensors[3].shape[-1], None, tensors[5].shape[-1], None)
    for name, tensor, height in zip(("Q", "c", "A", "b", "G", "h"), tensors, rows, strict=True):
        wanted = (height, n) if height is not None else tensor.shape[-1:]
        dims = len(wanted)
        if tensor.dim() not in (dims, dims + 1) or tuple(tensor.shape[-dims:]) != tuple(wanted):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {list(wanted)} is needed, or T of them.")
    sizes = {t.shape[0] for t, dims in zip(tensors, (2, 1, 2, 1, 2, 1), strict=True) if t.dim() > dims}
    if len(sizes) > 1:
        raise ValueError(f"the data are for {sorted(sizes)} programs: give T of each, or one.")
    if 0 in sizes:
        raise ValueError("the data are for 0 programs (T = 0): there is nothing to solve, and no solution to return.")
    full = [
        t if not sizes or t.dim() > dims else t.expand(*sizes, *t.shape)
        for t, dims in zip(tensors, (2, 1, 2, 1, 2, 1), strict=True)
    ]
    _check_values([innermost(tensor) for tensor in full])
    return tuple(full)


def _check_values(data: list[Tensor]) -> None:
    for name, tensor in zip(("Q", "c", "A", "b", "G", "h"), data, strict=True):
        bad = ~torch.isfinite(tensor.detach())
        if bool((bad & ~torch.isposinf(tensor.detach()) if name == "h" else bad).any()):
            raise ValueError(
                f"{name} contains NaN or infinite values; only bounds h may be inf, which is no constraint."
            )
    Q = data[0].detach().double()
    lowest = torch.linalg.eigvalsh((Q + Q.mT) / 2)[..., 0]
    if bool((lowest < -1e-6 * Q.abs().amax((-2, -1))).any()):
        raise ValueError(
            f"Q is not positive semi-definite: its smallest eigenvalue is {float(lowest.min()):.3g}, and the program "
            "is not convex. Add a multiple of the identity, or take argmin or root for a stationary point."
        )
