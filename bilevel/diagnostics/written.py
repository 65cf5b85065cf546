"""Solvers and hypergradients as expressions that can be pasted into a program."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..linalg.gauss_newton import OfModule
from ..prox.base import Prox


def written(setting: object) -> str:
    """``bl.Implicit(bl.CG(rtol=0.001))``: what makes an equal object; defaults are left out.

    The module of `GaussNewton.of` is called ``model``, and its loss by its own name.
    """
    if isinstance(setting, OfModule):
        loss = "" if setting.loss is None else f", {getattr(setting.loss, '__name__', 'loss')}"
        return f"bl.GaussNewton.of(model{loss})"
    if isinstance(setting, float):
        return f"{setting:.3g}"
    if not dataclasses.is_dataclass(setting):
        return repr(setting)
    arguments = []
    for index, field in enumerate(field for field in dataclasses.fields(setting) if field.repr):
        value = getattr(setting, field.name)
        if isinstance(value, Tensor) or value != field.default:
            first = index == 0 and dataclasses.is_dataclass(value)
            arguments.append(written(value) if first else f"{field.name}={written(value)}")
    place = "bl.prox" if isinstance(setting, Prox) else "bl"
    return f"{place}.{type(setting).__name__}({', '.join(arguments)})"
