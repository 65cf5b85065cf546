"""Proximal operators and projections, for inner problems with a penalty or a constraint that is not smooth.

Each works on flat vectors ``[*batch, n]`` and is differentiable towards the vector and its own settings, which may be
tensors that require grad: hyperparameters like others. ``prox(y, step) = argmin_z ||z - y||^2 / 2 + step * value(z)``.
Settings broadcast against ``[*batch, n]`` (those that are one number for a problem: ``[T, 1]`` for T problems).

Penalties: `L1`, `ElasticNet`, `GroupLasso`. Sets: `Box`, `NonNegative`, `Simplex`, `L2Ball`, `L1Ball`, `Affine`,
`HalfSpace`. Of parts: `Rows`, and a tree of them, one for each leaf of the params, wherever a prox is taken.
"""

from .base import (
    L1,
    Box,
    ElasticNet,
    GroupLasso,
    L2Ball,
    NonNegative,
    Simplex,
)
from .base import Prox as Prox
from .parts import Rows
from .sets import Affine, HalfSpace, L1Ball

__all__ = [
    "L1",
    "Affine",
    "Box",
    "ElasticNet",
    "GroupLasso",
    "HalfSpace",
    "L1Ball",
    "L2Ball",
    "NonNegative",
    "Rows",
    "Simplex",
]
