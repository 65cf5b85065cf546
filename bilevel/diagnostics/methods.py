"""Every hypergradient method with the accuracy that it states, and the problems that it is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..hypergrad.evolution import EvolutionStrategies
from ..hypergrad.finite_difference import FiniteDifference
from ..hypergrad.first_order import FirstOrder
from ..hypergrad.forward import ForwardMode
from ..hypergrad.forward_gradient import ForwardGradient
from ..hypergrad.implicit import Implicit
from ..hypergrad.one_step import OneStep
from ..hypergrad.penalty import Penalty
from ..hypergrad.sama import SAMA
from ..hypergrad.truncated import Truncated
from ..hypergrad.unroll import Unroll
from ..inner.gradient_descent import GradientDescent
from ..inner.newton_cg import NewtonCG
from ..inner.roots import Newton
from ..inner.steps import SGD, Steps
from ..linalg.bicgstab import BiCGSTAB
from ..linalg.cg import CG
from ..linalg.direct import LU, Cholesky
from ..linalg.gmres import GMRES
from ..linalg.identity import Identity
from ..linalg.minres import MINRES
from ..linalg.neumann import Neumann
from ..linalg.normal import NormalCG
from ..linalg.nystrom import Nystrom, NystromPreconditioner
from ..linalg.preconditioners import Jacobi
from ..linalg.scipy import LSMR, ScipyBiCGSTAB, ScipyGMRES
from ..linalg.solve import LinearSolver
from ..tree import leaves
from .problem import AnyHypergrad, Bilevel, Solver

DEFINITE, SYMMETRIC, SINGULAR, GENERAL, CONTRACTION = "definite", "symmetric", "singular", "general", "contraction"
COMPOSITE, PROGRAM = "composite", "qp"


@dataclass(frozen=True)
class Method:
    """A hypergradient method, ready to run.

    Attributes:
        tolerance: relative error that it states in float64 on problems of condition 100 or better; None: biased or
            noisy by design. single: the same in float32.
        solves: the matrices that it is for. solver: of the inner problem; None: an accurate one.
    """

    name: str
    hypergrad: AnyHypergrad
    tolerance: float | None
    solves: frozenset[str] = frozenset({DEFINITE})
    solver: Solver | None = None
    single: float = 1e-4

    def suits(self, problem: Bilevel) -> bool:
        """Whether the problem is one that it is for."""
        return matrix_of(problem) in self.solves


def methods_for(problem: Bilevel) -> list[Method]:
    """All methods that suit a problem, at tolerances that its precision allows."""
    double = leaves(problem.init)[0].dtype is torch.float64
    return [method for method in all_methods(1e-8 if double else 1e-6) if method.suits(problem)]


def all_methods(rtol: float = 1e-8, lr: float = 0.15, max_steps: int = 400) -> list[Method]:
    """All methods.

    Args:
        rtol: of the iterative linear solvers.
        lr, max_steps: of the unrolled gradient descent, which has to converge.
    """
    descent = GradientDescent(lr=lr, max_steps=max_steps)
    forward_gradient = ForwardGradient(16, generator=torch.Generator().manual_seed(0))
    iterative = 1e-6
    strength = 1e3 if rtol < 1e-7 else 100.0  # its difference of gradients loses digits to rounding
    every = {DEFINITE, SYMMETRIC, SINGULAR, GENERAL, CONTRACTION}
    regular = every - {SINGULAR}
    return [
        _implicit("CG", CG(rtol=rtol), iterative, {DEFINITE, SINGULAR, COMPOSITE}),
        _implicit("CG + Jacobi", CG(rtol=rtol, preconditioner=Jacobi()), iterative),
        _implicit("CG + Nystrom", CG(rtol=rtol, preconditioner=NystromPreconditioner(5)), iterative),
        _implicit("MINRES", MINRES(rtol=rtol), iterative, {DEFINITE, SYMMETRIC, SINGULAR, COMPOSITE}),
        _implicit("Neumann", Neumann(rtol=rtol, max_steps=20000), iterative),
        _implicit("fixed-point adjoint", Neumann(rtol=rtol, alpha=1.0), iterative, {CONTRACTION}),
        _implicit("GMRES", GMRES(rtol=rtol), iterative, regular | {COMPOSITE, PROGRAM}),
        _implicit("BiCGSTAB", BiCGSTAB(rtol=rtol), iterative, regular),
        _implicit("GMRES of SciPy", ScipyGMRES(rtol=rtol), iterative, regular),
        _implicit("BiCGSTAB of SciPy", ScipyBiCGSTAB(rtol=rtol), iterative, regular),
        _implicit("LSMR", LSMR(rtol=rtol), iterative, every),
        _implicit("normal-equation CG", NormalCG(rtol=rtol), iterative, regular),
        _implicit("Cholesky", Cholesky(), 1e-10, {DEFINITE, COMPOSITE}),
        _implicit("LU", LU(), 1e-10, regular | {COMPOSITE, PROGRAM}),
        Method("implicit, CG by torch.func", Implicit(CG(rtol=rtol), operator="func"), iterative),
        Method("unrolled", Unroll(), 1e-10, solver=descent),
        Method("unrolled, checkpoints", Unroll(checkpoint=True), 1e-10, solver=descent),
        Method("unrolled, tree of checkpoints", Unroll(checkpoint="tree"), 1e-10, solver=descent),
        Method("unrolled, mixed", Unroll(mode="mixed"), 1e-10, solver=descent),
        Method("truncated, last half", Truncated(max_steps // 2), iterative, solver=descent),
        Method("forward mode", ForwardMode(), 1e-10, solver=descent),
        Method("forward gradient, 16 directions", forward_gradient, None, solver=descent),
        Method("penalty, symmetric", Penalty(strength), 1e-4, single=1e-3),
        Method("evolution strategies", EvolutionStrategies(num_samples=16), None),
        Method("implicit, Nystrom of rank 5", Implicit(Nystrom(5, damping=1.0)), None),
        Method("implicit, 2 CG steps", Implicit(CG(max_steps=2)), None),
        Method("implicit, identity (T1-T2)", Implicit(Identity()), None),
        Method("one step", OneStep(lr), None),
        Method("finite difference (DARTS)", FiniteDifference(lr=lr), None),
        Method("SAMA", SAMA(SGD(lr)), None, solver=Steps(SGD(lr), max_steps=max_steps)),
        Method("first order", FirstOrder(), None),
    ]


def matrix_of(problem: Bilevel) -> str:
    """What the adjoint system of a problem looks like; problems say so, others are taken by their kind."""
    declared: str | None = getattr(problem, "matrix_kind", None)
    if declared is not None:
        return declared
    return {"argmin": DEFINITE, "root": GENERAL, "fixed_point": CONTRACTION}.get(problem.kind, problem.kind)


def accurate_solver(problem: Bilevel) -> Solver | None:
    """An inner solver that goes as far as the precision allows; None where the problem has one of its own."""
    tight = 1e-13 if leaves(problem.init)[0].dtype is torch.float64 else 1e-6
    if problem.kind == "argmin":
        return NewtonCG(gtol=tight)
    return Newton(tol=tight) if problem.kind in ("root", "fixed_point") else None


def _implicit(
    name: str, linear_solver: LinearSolver, tolerance: float | None, solves: Iterable[str] = (DEFINITE,)
) -> Method:
    return Method(f"implicit, {name}", Implicit(linear_solver), tolerance, frozenset(solves))
