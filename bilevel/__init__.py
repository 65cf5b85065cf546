"""Hyperparameter and bilevel optimization in PyTorch: hypergradients through the solution of an inner problem.

The differentiable solve: `argmin`, which returns a `Solution`.
Inner solvers: `LBFGS`, `GradientDescent`, `NewtonCG`, `TorchOptim`, `ScipyMinimize`.
Hypergradients: `Implicit` (with a linear solver), `Unroll`.
Linear solvers: `CG`, `Neumann`, `MINRES`, `GMRES`, `BiCGSTAB`, `LSMR`, `Cholesky`, `LU`, `Identity`.
Outcomes: `Result`, `SolveError`, `SolveWarning`. Trees: `stack`. Optuna: `tuning`. Truth: `problems`.
"""

from . import problems, tuning
from .argmin import argmin
from .hypergrad.implicit import Implicit
from .hypergrad.unroll import Unroll
from .inner.gradient_descent import GradientDescent
from .inner.lbfgs import LBFGS
from .inner.newton_cg import NewtonCG
from .inner.scipy import ScipyMinimize
from .inner.torch_optim import TorchOptim
from .linalg.cg import CG, Jacobi
from .linalg.direct import LU, Cholesky
from .linalg.identity import Identity
from .linalg.neumann import Neumann
from .linalg.scipy import GMRES, LSMR, MINRES, BiCGSTAB
from .solution import Result, Solution, SolveError, SolveWarning
from .tree import stack

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LSMR",
    "LU",
    "MINRES",
    "BiCGSTAB",
    "Cholesky",
    "GradientDescent",
    "Identity",
    "Implicit",
    "Jacobi",
    "Neumann",
    "NewtonCG",
    "Result",
    "ScipyMinimize",
    "Solution",
    "SolveError",
    "SolveWarning",
    "TorchOptim",
    "Unroll",
    "argmin",
    "problems",
    "stack",
    "tuning",
]
