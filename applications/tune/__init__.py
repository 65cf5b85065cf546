"""`python -m applications.NAME tune`: an Optuna study over the solver settings of an application."""

from applications.tune.command import main
from applications.tune.tunable import Tunable

__all__ = ["Tunable", "main"]
