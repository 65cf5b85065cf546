"""Every hypergradient method with the accuracy that it states: the list that the conformance suite and the docs use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bilevel as bl

EXACT = bl.NewtonCG(gtol=1e-13)
LONG = bl.GradientDescent(lr=0.15, max_steps=400)


@dataclass(frozen=True)
class Method:
    """``tolerance``: relative error on well-conditioned problems; None: biased by design."""

    name: str
    hypergrad: Any
    tolerance: float | None
    solver: Any = EXACT


METHODS = [
    Method("Implicit, CG", bl.Implicit(bl.CG(rtol=1e-8)), 1e-6),
    Method("Implicit, CG + Jacobi", bl.Implicit(bl.CG(rtol=1e-8, preconditioner=bl.Jacobi())), 1e-6),
    Method("Implicit, CG + Nystrom", bl.Implicit(bl.CG(rtol=1e-8, preconditioner=bl.NystromPreconditioner(5))), 1e-6),
    Method("Implicit, MINRES", bl.Implicit(bl.MINRES(rtol=1e-8)), 1e-6),
    Method("Implicit, Neumann", bl.Implicit(bl.Neumann(rtol=1e-8, max_steps=20000)), 1e-6),
    Method("Implicit, GMRES", bl.Implicit(bl.GMRES(rtol=1e-8)), 1e-6),
    Method("Implicit, BiCGSTAB", bl.Implicit(bl.BiCGSTAB(rtol=1e-8)), 1e-6),
    Method("Implicit, LSMR", bl.Implicit(bl.LSMR(rtol=1e-8)), 1e-6),
    Method("Implicit, normal-equation CG", bl.Implicit(bl.NormalCG(rtol=1e-8)), 1e-6),
    Method("Implicit, Cholesky", bl.Implicit(bl.Cholesky()), 1e-10),
    Method("Implicit, LU", bl.Implicit(bl.LU()), 1e-10),
    Method("Implicit, products by torch.func", bl.Implicit(bl.CG(rtol=1e-8), operator="func"), 1e-6),
    Method("Unroll", bl.Unroll(), 1e-6, LONG),
    Method("Unroll, checkpointed", bl.Unroll(checkpoint=True), 1e-6, LONG),
    Method("Truncated, last 200", bl.Truncated(last=200), 1e-6, LONG),
    Method("ForwardMode", bl.ForwardMode(), 1e-6, LONG),
    Method("Penalty, symmetric", bl.Penalty(strength=1e3), 1e-4),
    Method("EvolutionStrategies", bl.EvolutionStrategies(num_samples=16), None),
    Method("Nystrom, rank 5", bl.Implicit(bl.Nystrom(5, damping=1.0)), None),
    Method("CG, 2 steps", bl.Implicit(bl.CG(max_steps=2)), None),
    Method("Identity (T1-T2)", bl.Implicit(bl.Identity()), None),
    Method("OneStep", bl.OneStep(0.15), None),
    Method("FiniteDifference (DARTS)", bl.FiniteDifference(lr=0.15), None),
    Method("SAMA", bl.SAMA(bl.SGD(0.15)), None, bl.Steps(bl.SGD(0.15), max_steps=100)),
    Method("FirstOrder", bl.FirstOrder(), None),
]
