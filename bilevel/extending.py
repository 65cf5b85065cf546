"""What operators, solvers and methods of your own are made of; the page docs/extending.md shows how.

The protocols and base classes themselves are public names of `bilevel`: `Operator`, `LinearSolver`, `InnerSolver`,
`RootSolver`, `Hypergrad`, `PathMethod`, `Rule`, `Prox`. Here are the things that they are given and give back.
"""

from __future__ import annotations

from .hypergrad.base import Point, Pulled
from .inner.descent import LineSearch, descend
from .inner.minimize import Progress, choose
from .inner.roots import RootProgress
from .linalg.jacobian import GraphJacobian
from .linalg.operator import Damped, Dense, Transposed
from .linalg.solve import (
    IterativeSolver,
    LinearState,
    Outcome,
    Precondition,
    Preconditioner,
    Stopping,
    normalise,
    report,
)
from .problem import Evaluation, Linearization, Objective, Problem, RootProblem
from .solution import Throw
from .tree import Raveler, Tree, axpy, dot, leaves, norm, scale

__all__ = [
    "Damped",
    "Dense",
    "Evaluation",
    "GraphJacobian",
    "IterativeSolver",
    "LineSearch",
    "LinearState",
    "Linearization",
    "Objective",
    "Outcome",
    "Point",
    "Precondition",
    "Preconditioner",
    "Problem",
    "Progress",
    "Pulled",
    "Raveler",
    "RootProblem",
    "RootProgress",
    "Stopping",
    "Throw",
    "Transposed",
    "Tree",
    "axpy",
    "choose",
    "descend",
    "dot",
    "leaves",
    "norm",
    "normalise",
    "report",
    "scale",
]
