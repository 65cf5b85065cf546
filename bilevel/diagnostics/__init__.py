"""How good a hypergradient is: its error estimated, checked, compared between methods, and which method to take."""

from .advise import Advice, Spectrum, advise
from .check import HypergradientCheck, HypergradientError, check_hypergradient
from .checked import Constants, hypergradient
from .compare import Comparison, compare_methods
from .methods import Method, all_methods, methods_for
from .problem import BilevelProblem, solve

__all__ = [
    "Advice",
    "BilevelProblem",
    "Comparison",
    "Constants",
    "HypergradientCheck",
    "HypergradientError",
    "Method",
    "Spectrum",
    "advise",
    "all_methods",
    "check_hypergradient",
    "compare_methods",
    "hypergradient",
    "methods_for",
    "solve",
]
