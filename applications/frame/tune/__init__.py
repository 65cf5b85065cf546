"""`python -m applications.NAME tune`: an Optuna study over the solver settings of an application."""

from applications.frame.tune.command import main
from applications.frame.tune.tunable import (
    UNENDING,
    Settings,
    Tunable,
    chosen,
    follow,
    read_settings,
    rehearse,
    rehearse_minimum,
    settings_usable,
)

__all__ = [
    "UNENDING",
    "Settings",
    "Tunable",
    "chosen",
    "follow",
    "main",
    "read_settings",
    "rehearse",
    "rehearse_minimum",
    "settings_usable",
]
