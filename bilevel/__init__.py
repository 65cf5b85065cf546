"""Hyperparameter and bilevel optimization in PyTorch: hypergradients through the solution of an inner problem.

The differentiable solves: `argmin`, `root`, `fixed_point`, `least_squares`, `constrained`, `quadratic_program`, which
return a `Solution`.
Inner solvers: `LBFGS`, `GradientDescent`, `NewtonCG`, `Steps` (`SGD`, `Adam`, `AdamW`, `RMSprop`), `ProximalGradient`
(with `prox`), `TorchOptim`, `ScipyMinimize`, `External`; of least squares `LevenbergMarquardt`, `GaussNewtonCG`; of
systems `Newton`, `ScipyRoot`, `Bisection`, `Anderson`, `Picard`; under constraints `AugmentedLagrangian`. Watched by
`History`, `ProgressBar` or a function of `InnerStep`.
Hypergradients: `Implicit` (with a linear solver), `Unroll`, `Truncated`, `ForwardMode`, `ForwardGradient`, `OneStep`,
`FirstOrder`, `FiniteDifference`, `SAMA`, `Penalty`, `EvolutionStrategies`; on mini-batches `stochastic`.
Linear solvers: `CG`, `MINRES`, `Neumann`, `GMRES`, `BiCGSTAB`, `NormalCG`, `ScipyGMRES`, `ScipyBiCGSTAB`, `LSMR`,
`Cholesky`, `LU`, `LeastNorm`, `Nystrom`, `Identity`, `Equilibrated`; preconditioners `Jacobi`, `NystromPreconditioner`,
`AdamPreconditioner`; operators `GaussNewton`, `EmpiricalFisher`. Tolerances: `Adaptive`.
What each training example did to a prediction: `influence`.
How good it is: `diagnostics`. Truth: `problems`. Outcomes: `Result`, `SolveError`, `SolveWarning`.
Many tasks: `stack`, `map_tasks`, `mean_over_tasks`, `losses_of_tasks`; layers made for Hessian products: `nn`.
Recorded as a CUDA graph: `capture`.
Many processes: `distributed`. From JAXopt: `custom_root`, `custom_fixed_point`, `compat`. Optuna: `tuning`;
scikit-learn: `sklearn`.
Files: `files`.
Your own: `Operator`, `LinearSolver`, `InnerSolver`, `RootSolver`, `Hypergrad`, `PathMethod`, `Rule`, `Prox`, made of
what is in `extending`, held to their protocols by `bilevel.testing`; of other libraries `ScipyOperator`,
`CurvlinopsOperator`, `InversePreconditioner`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import files, nn, prox
from .adaptive import Adaptive
from .argmin import argmin, fixed_point, root
from .constrained import AugmentedLagrangian, ConstrainedSolution, constrained
from .hypergrad.base import Hypergrad, PathMethod
from .hypergrad.evolution import EvolutionStrategies
from .hypergrad.finite_difference import FiniteDifference
from .hypergrad.first_order import FirstOrder
from .hypergrad.forward import ForwardMode
from .hypergrad.forward_gradient import ForwardGradient
from .hypergrad.implicit import Implicit
from .hypergrad.one_step import OneStep
from .hypergrad.penalty import Penalty
from .hypergrad.sama import SAMA
from .hypergrad.truncated import Truncated
from .hypergrad.unroll import Unroll
from .influence import Influence, InfluenceScores, ProjectedInfluence, influence
from .inner.external import External
from .inner.fixed_point import Anderson, Picard
from .inner.gradient_descent import GradientDescent
from .inner.lbfgs import LBFGS
from .inner.minimize import InnerSolver
from .inner.newton_cg import NewtonCG
from .inner.proximal import ProximalGradient
from .inner.roots import Bisection, Newton, RootSolver, ScipyRoot
from .inner.scipy import ScipyMinimize
from .inner.steps import SGD, Adam, AdamW, RMSprop, Rule, Steps
from .inner.torch_optim import TorchOptim
from .inner.trust_region import GaussNewtonCG, LevenbergMarquardt
from .inner.watch import History, InnerStep, ProgressBar
from .least_squares import least_squares
from .linalg.bicgstab import BiCGSTAB
from .linalg.cg import CG
from .linalg.direct import LU, Cholesky, LeastNorm
from .linalg.empirical_fisher import EmpiricalFisher
from .linalg.foreign import CurvlinopsOperator, ScipyOperator
from .linalg.gauss_newton import GaussNewton
from .linalg.gmres import GMRES
from .linalg.identity import Identity
from .linalg.minres import MINRES
from .linalg.neumann import Neumann
from .linalg.normal import NormalCG
from .linalg.nystrom import Nystrom, NystromPreconditioner
from .linalg.operator import Operator
from .linalg.preconditioners import AdamPreconditioner, InversePreconditioner, Jacobi
from .linalg.scaled import Equilibrated
from .linalg.scipy import LSMR, ScipyBiCGSTAB, ScipyGMRES
from .linalg.solve import LinearSolver
from .prox import Prox
from .qp import QPSolution, quadratic_program
from .recording import Recorded, capture
from .solution import NonFiniteError, ObjectiveChangedError, Result, Solution, SolveError, SolveWarning
from .tasks import losses_of_tasks, map_tasks, mean_over_tasks
from .tree import stack

if TYPE_CHECKING:
    from . import compat, diagnostics, distributed, extending, problems, sklearn, stochastic, tuning
    from .compat import custom_fixed_point, custom_root

    __version__: str

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LSMR",
    "LU",
    "MINRES",
    "SAMA",
    "SGD",
    "Adam",
    "AdamPreconditioner",
    "AdamW",
    "Adaptive",
    "Anderson",
    "AugmentedLagrangian",
    "BiCGSTAB",
    "Bisection",
    "Cholesky",
    "ConstrainedSolution",
    "CurvlinopsOperator",
    "EmpiricalFisher",
    "Equilibrated",
    "EvolutionStrategies",
    "External",
    "FiniteDifference",
    "FirstOrder",
    "ForwardGradient",
    "ForwardMode",
    "GaussNewton",
    "GaussNewtonCG",
    "GradientDescent",
    "History",
    "Hypergrad",
    "Identity",
    "Implicit",
    "Influence",
    "InfluenceScores",
    "InnerSolver",
    "InnerStep",
    "InversePreconditioner",
    "Jacobi",
    "LeastNorm",
    "LevenbergMarquardt",
    "LinearSolver",
    "Neumann",
    "Newton",
    "NewtonCG",
    "NonFiniteError",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "ObjectiveChangedError",
    "OneStep",
    "Operator",
    "PathMethod",
    "Penalty",
    "Picard",
    "ProgressBar",
    "ProjectedInfluence",
    "Prox",
    "ProximalGradient",
    "QPSolution",
    "RMSprop",
    "Recorded",
    "Result",
    "RootSolver",
    "Rule",
    "ScipyBiCGSTAB",
    "ScipyGMRES",
    "ScipyMinimize",
    "ScipyOperator",
    "ScipyRoot",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Steps",
    "TorchOptim",
    "Truncated",
    "Unroll",
    "argmin",
    "capture",
    "compat",
    "constrained",
    "custom_fixed_point",
    "custom_root",
    "diagnostics",
    "distributed",
    "extending",
    "files",
    "fixed_point",
    "influence",
    "least_squares",
    "losses_of_tasks",
    "map_tasks",
    "mean_over_tasks",
    "nn",
    "problems",
    "prox",
    "quadratic_program",
    "root",
    "sklearn",
    "stack",
    "stochastic",
    "tuning",
]

_MODULES = frozenset(
    {"compat", "diagnostics", "distributed", "extending", "problems", "sklearn", "stochastic", "testing", "tuning"}
)
"""Imported where they are used: together they take as long as a quarter of PyTorch."""
_PLACES = {"custom_fixed_point": "compat", "custom_root": "compat"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bilevel")
    except PackageNotFoundError:  # a checkout on the path that nobody installed
        return "0+unknown"
