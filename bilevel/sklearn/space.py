"""The box that is searched: positive hyperparameters by their logarithm, shares as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..notices import tell


@dataclass(frozen=True)
class Coordinate:
    """One hyperparameter: a number, or a vector of ``size`` of them.

    Attributes:
        low, high: its bounds, as the user gives them.
        logarithmic: searched by its logarithm.
    """

    name: str
    size: int | None
    low: float
    high: float
    logarithmic: bool

    def inward(self, value: Any) -> np.ndarray:
        """Values as search coordinates, within the bounds; of several for one number (of each fold) their mean."""
        value = value if self.size else np.mean(np.asarray(value, float))
        values = np.broadcast_to(np.clip(np.asarray(value, float), self.low, self.high), (self.size or 1,))
        return np.log(values) if self.logarithmic else values.copy()

    def outward(self, x: Tensor) -> Tensor:
        """The inverse of `inward`, differentiable: ``[size]``, or 0-d for a number."""
        value = x.exp() if self.logarithmic else x
        return value if self.size else value.squeeze(0)


@dataclass(frozen=True)
class Space:
    """All coordinates, one after another in a vector x."""

    coordinates: tuple[Coordinate, ...]

    @property
    def size(self) -> int:
        return sum(c.size or 1 for c in self.coordinates)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest x."""
        low, high = (np.concatenate([c.inward(getattr(c, end)) for c in self.coordinates]) for end in ("low", "high"))
        return low, high

    def start(self, values: Mapping[str, Any]) -> np.ndarray:
        """x of the values, moved into the bounds; the middle where there is none."""
        low, high = self.bounds()
        parts, begin = [], 0
        for c in self.coordinates:
            end, value = begin + (c.size or 1), values.get(c.name)
            usable = value is not None and (not c.logarithmic or np.all(np.asarray(value, float) > 0))
            parts.append(c.inward(value) if usable else (low[begin:end] + high[begin:end]) / 2)
            begin = end
        return np.concatenate(parts)

    def sample(self, random: np.random.RandomState) -> np.ndarray:
        """A random x: one draw for each hyperparameter, the same in all entries of a vector."""
        shares = np.concatenate([np.full(c.size or 1, random.uniform()) for c in self.coordinates])
        low, high = self.bounds()
        x: np.ndarray = low + shares * (high - low)
        return x

    def tensors(self, x: Tensor) -> dict[str, Tensor]:
        """Hyperparameters by name, differentiable towards x."""
        parts = x.split([c.size or 1 for c in self.coordinates])
        return {c.name: c.outward(part) for c, part in zip(self.coordinates, parts, strict=True)}

    def params(self, x: np.ndarray) -> dict[str, Any]:
        """Hyperparameters by name, as scikit-learn's ``set_params`` takes them, exactly within the bounds."""
        found = {}
        for c, value in zip(
            self.coordinates, self.tensors(torch.from_numpy(np.asarray(x, float))).values(), strict=True
        ):
            clipped = np.clip(value.numpy(), c.low, c.high)
            found[c.name] = clipped if c.size else float(clipped)
        return found


def make_space(given: Mapping[str, Any], known: Mapping[str, tuple[int | None, bool]], prefix: str) -> Space:
    """Check the user's bounds.

    Args:
        given: ``(low, high)`` by parameter name.
        known: of each hyperparameter of the model its size (None: a number) and whether it is logarithmic.
        prefix: what the names in ``given`` begin with.

    Warns:
        UserWarning: bounds that are no tuple, as if they were a grid.

    Raises:
        ValueError: nothing to search, an unknown name, bounds out of order or out of range.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"param_space is {given!r}: a dict of parameter names and bounds (low, high) is needed.")
    coordinates = []
    for name, bounds in given.items():
        own = str(name).removeprefix(prefix)
        if not str(name).startswith(prefix) or own not in known:
            there = ", ".join(prefix + k for k in known)
            raise ValueError(f"param_space has {name!r}, which cannot be searched by gradients. There are: {there}.")
        size, logarithmic = known[own]
        try:
            low, high = bounds
        except (TypeError, ValueError):
            low = high = None
        if not (isinstance(low, Real) and isinstance(high, Real)):
            raise ValueError(
                f"param_space[{name!r}] is {bounds!r}: bounds (low, high) are needed, two numbers between which "
                "all is searched."
            )
        low, high = float(low), float(high)
        if not isinstance(bounds, tuple):
            tell(
                f"param_space[{name!r}] is {bounds!r}, which is searched from {low:g} to {high:g}, not a grid of two "
                f"values (that is GridSearchCV). Write bounds as a tuple: ({low:g}, {high:g}).",
                UserWarning,
            )
        inside = (low > 0 if logarithmic else low >= 0 and high <= 1) and low < high < np.inf
        if not inside:
            wanted = "0 < low < high" if logarithmic else "0 <= low < high <= 1"
            raise ValueError(f"param_space[{name!r}] is ({low:g}, {high:g}): {wanted} is needed.")
        coordinates.append(Coordinate(own, size, low, high, logarithmic))
    return Space(tuple(coordinates))
