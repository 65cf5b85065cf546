"""How good a hypergradient is: its error estimated, checked, compared between methods, and which method to take."""

from .advise import Advice, advise
from .check import HypergradientCheck, HypergradientError, check_hypergradient
from .checked import Constants, hypergradient
from .compare import Comparison, compare_methods
from .methods import Method, accurate_solver, all_methods, methods_for
from .problem import Bilevel, BilevelProblem, solve
from .spectrum import Spectrum

__all__ = [
    "Advice",
    "Bilevel",
    "BilevelProblem",
    "Comparison",
    "Constants",
    "HypergradientCheck",
    "HypergradientError",
    "Method",
    "Spectrum",
    "accurate_solver",
    "advise",
    "all_methods",
    "check_hypergradient",
    "compare_methods",
    "hypergradient",
    "methods_for",
    "solve",
]
