"""Hyperparameter and bilevel optimization in PyTorch: hypergradients through the solution of an inner problem.

The differentiable solve: `argmin`, which returns a `Solution`.
Inner solvers: `LBFGS`, `GradientDescent`, `NewtonCG`, `TorchOptim`, `ScipyMinimize`.
Hypergradients: `Implicit` (with a linear solver), `Unroll`.
Linear solvers: `CG`, `Neumann`, `MINRES`, `GMRES`, `BiCGSTAB`, `LSMR`, `Cholesky`, `LU`, `Identity`.
Outcomes: `Result`, `SolveError`, `SolveWarning`. Trees: `stack`. Optuna: `tuning`. Truth: `problems`.
"""

from . import diagnostics, problems, tuning
from .adaptive import Adaptive
from .argmin import argmin, fixed_point, root
from .compat import custom_fixed_point, custom_root
from .hypergrad.implicit import Implicit
from .hypergrad.unroll import Unroll
from .inner.fixed_point import Anderson, Picard
from .inner.gradient_descent import GradientDescent
from .inner.lbfgs import LBFGS
from .inner.newton_cg import NewtonCG
from .inner.roots import Newton, ScipyRoot
from .inner.scipy import ScipyMinimize
from .inner.torch_optim import TorchOptim
from .linalg.cg import CG
from .linalg.direct import LU, Cholesky
from .linalg.identity import Identity
from .linalg.minres import MINRES
from .linalg.neumann import Neumann
from .linalg.normal import NormalCG
from .linalg.preconditioners import AdamPreconditioner, Jacobi
from .linalg.scipy import GMRES, LSMR, BiCGSTAB
from .solution import Result, Solution, SolveError, SolveWarning
from .tree import stack

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LSMR",
    "LU",
    "MINRES",
    "AdamPreconditioner",
    "Adaptive",
    "Anderson",
    "BiCGSTAB",
    "Cholesky",
    "GradientDescent",
    "Identity",
    "Implicit",
    "Jacobi",
    "Neumann",
    "Newton",
    "NewtonCG",
    "NormalCG",
    "Picard",
    "Result",
    "ScipyMinimize",
    "ScipyRoot",
    "Solution",
    "SolveError",
    "SolveWarning",
    "TorchOptim",
    "Unroll",
    "argmin",
    "custom_fixed_point",
    "custom_root",
    "diagnostics",
    "fixed_point",
    "problems",
    "root",
    "stack",
    "tuning",
]
