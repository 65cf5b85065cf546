"""Optuna studies over solver settings: a trial chooses the solver objects, and hears how they did.

The study stays Optuna's own. `suggest_inner_solver`, `suggest_linear_solver`, `suggest_hypergrad` turn a trial into
settings; `report`, `limit`, `loss_within`, `hypergradient_error` measure it; `guard` keeps one trial from ending the
study, and `of_a_trial` says what its settings can bring about; `create_study` opens a storage that a killed process may
have left in disorder, and `sweep` takes up the trials of processes that died meanwhile; `solver_from_trial`, `save`,
`load` and `expression` take the winner back into a program.
"""

from .failures import of_a_trial
from .reports import best_trial, hypergradient_error, limit, loss_within, report, within_limits
from .settings import expression, from_json, load, save, to_json
from .spaces import (
    FIXED_POINT_SOLVERS,
    HYPERGRADS,
    INNER_SOLVERS,
    LINEAR_SOLVERS,
    NONSYMMETRIC_SOLVERS,
    solver_from_trial,
    suggest_hypergrad,
    suggest_inner_solver,
    suggest_linear_solver,
)
from .studies import create_study, guard, open_storage, sweep

__all__ = [
    "FIXED_POINT_SOLVERS",
    "HYPERGRADS",
    "INNER_SOLVERS",
    "LINEAR_SOLVERS",
    "NONSYMMETRIC_SOLVERS",
    "best_trial",
    "create_study",
    "expression",
    "from_json",
    "guard",
    "hypergradient_error",
    "limit",
    "load",
    "loss_within",
    "of_a_trial",
    "open_storage",
    "report",
    "save",
    "solver_from_trial",
    "suggest_hypergrad",
    "suggest_inner_solver",
    "suggest_linear_solver",
    "sweep",
    "to_json",
    "within_limits",
]
