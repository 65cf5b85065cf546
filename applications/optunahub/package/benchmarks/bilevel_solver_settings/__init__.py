from ._solver_settings import Problem

__all__ = ["Problem"]
