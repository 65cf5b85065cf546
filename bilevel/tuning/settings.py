"""Solver settings as JSON, as a file and as a line of Python: the way from a study back into a program."""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from ..hypergrad.evolution import EvolutionStrategies
from ..hypergrad.finite_difference import FiniteDifference
from ..hypergrad.first_order import FirstOrder
from ..hypergrad.forward import ForwardMode
from ..hypergrad.forward_gradient import ForwardGradient
from ..hypergrad.implicit import Implicit
from ..hypergrad.one_step import OneStep
from ..hypergrad.penalty import Penalty
from ..hypergrad.sama import SAMA
from ..hypergrad.truncated import Truncated
from ..hypergrad.unroll import Unroll
from ..inner.fixed_point import Anderson, Picard
from ..inner.gradient_descent import GradientDescent
from ..inner.lbfgs import LBFGS
from ..inner.newton_cg import NewtonCG
from ..inner.roots import Newton, ScipyRoot
from ..inner.scipy import ScipyMinimize
from ..inner.steps import SGD, Adam, AdamW, RMSprop, Steps
from ..inner.torch_optim import TorchOptim
from ..linalg.bicgstab import BiCGSTAB
from ..linalg.cg import CG
from ..linalg.direct import LU, Cholesky
from ..linalg.gmres import GMRES
from ..linalg.identity import Identity
from ..linalg.minres import MINRES
from ..linalg.neumann import Neumann
from ..linalg.normal import NormalCG
from ..linalg.nystrom import Nystrom, NystromPreconditioner
from ..linalg.preconditioners import Jacobi
from ..linalg.scipy import LSMR
from ..linalg.solve import LinearSolver

RULES = (SGD, Adam, AdamW, RMSprop)
INNER = (GradientDescent, LBFGS, NewtonCG, ScipyMinimize, Steps, TorchOptim, Newton, ScipyRoot, Anderson, Picard)
METHODS = (Implicit, Unroll, Truncated, ForwardMode, OneStep, FirstOrder, FiniteDifference, SAMA, Penalty)
RANDOM = (EvolutionStrategies, ForwardGradient)
LINEAR = (CG, MINRES, Neumann, GMRES, BiCGSTAB, LSMR, NormalCG, Cholesky, LU, Nystrom, Identity)
PRECONDITIONERS = (Jacobi, NystromPreconditioner)

TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (*RULES, *INNER, *METHODS, *RANDOM, *LINEAR, *PRECONDITIONERS)
}
"""What a file may name. Nothing else is ever made from one, so that a file cannot run code."""

ROLES: dict[str, tuple[type, ...]] = {"solver": INNER, "hypergrad": (*METHODS, *RANDOM)}
"""What these names of a file stand for; other names are the program's own."""

OPERATORS = ("graph", "func")

KEY = "type"


def plain(value: Any) -> Any:
    """The same, or Python's own number in place of one of NumPy."""
    return value.item() if isinstance(value, np.generic) else value


def to_json(setting: Any) -> Any:
    """A solver, hypergradient method or step rule as plain dicts, lists and numbers: ``{"type": "CG", ...}``.

    Raises:
        TypeError: it holds a function, or a tensor that is learned: a file cannot hold those.
    """
    setting = plain(setting)
    if setting is None or isinstance(setting, bool | int | float | str):
        return {KEY: "float", "value": repr(setting)} if isinstance(setting, float) and _odd(setting) else setting
    if isinstance(setting, Tensor):
        if setting.requires_grad or setting.dim():
            raise TypeError(
                "A setting is a tensor, one that is learned or has several numbers: a file holds numbers only. Save "
                "it with torch.save, and put it into the solver when the program has loaded both."
            )
        return setting.item()
    if isinstance(setting, list | tuple):
        return [to_json(value) for value in setting]
    if isinstance(setting, TorchOptim):
        optimizer = getattr(setting.optimizer, "__name__", "")
        if getattr(torch.optim, optimizer, None) is not setting.optimizer:
            raise TypeError(f"{setting!r} has an optimizer that is not of torch.optim: a file can name only those.")
        known = {"optimizer": optimizer, "max_steps": plain(setting.max_steps), "gtol": plain(setting.gtol)}
        return {KEY: "TorchOptim", **known, "settings": {name: to_json(value) for name, value in setting.settings}}
    kind = type(setting)
    if kind is not TYPES.get(kind.__name__):
        raise TypeError(
            f"{setting!r} cannot be written: a file holds {', '.join(sorted(TYPES))}, and numbers. Functions, and "
            "operators made of them such as GaussNewton, stay in the program."
        )
    if getattr(setting, "callback", None) is not None:
        raise TypeError(f"{setting!r} has a callback: a file holds numbers only. Functions stay in the program.")
    if getattr(setting, "generator", None) is not None:
        raise TypeError(f"{setting!r} has a generator: a file holds numbers only. Put it in when it has been loaded.")
    fields = [field for field in dataclasses.fields(kind) if field.repr]
    return {KEY: kind.__name__, **{field.name: to_json(getattr(setting, field.name)) for field in fields}}


def from_json(values: Any) -> Any:
    """The inverse of `to_json`: an equal object.

    Raises:
        ValueError: an unknown type or setting, or a value of another type than is declared, or that is refused.
    """
    if isinstance(values, list):
        return tuple(from_json(value) for value in values)
    if not isinstance(values, dict):
        return values
    name = values.get(KEY)
    if name == "float":
        if not isinstance(values.get("value"), str):
            raise ValueError(f"{values} is no number: 'inf', '-inf' or 'nan' is expected as its value.")
        return float(values["value"])
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(f"{name!r} is no type of setting. There are {', '.join(sorted(TYPES))}.")
    given = {key: value for key, value in values.items() if key != KEY}
    try:
        if name == "TorchOptim":
            return _torch_optim(**given)
        kind, found = TYPES[name], {key: from_json(value) for key, value in given.items()}
        _check_types(kind, found)
        return kind(**found)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} cannot be made of {given}: {error}") from error


def _torch_optim(optimizer: Any, max_steps: Any, gtol: Any = None, settings: Any = None) -> TorchOptim:
    """One of PyTorch's own optimizers, made once to see that it takes its settings."""
    kind = getattr(torch.optim, optimizer, None) if isinstance(optimizer, str) else None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise ValueError(f"{optimizer!r} is no optimizer of torch.optim")
    for name, value, hint in (("max_steps", max_steps, int), ("gtol", gtol, float | None)):
        if not _fits(value, hint):
            raise TypeError(f"{name} is {value!r}, which is no {hint}")
    found = {key: from_json(value) for key, value in settings.items()}
    kind([torch.zeros(1, requires_grad=True, device="cpu")], **found)
    return TorchOptim(kind, max_steps=max_steps, gtol=gtol, **found)


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise a TypeError for a value that is not of the type that the class declares."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name == "operator" and value not in OPERATORS:
            raise TypeError(f"operator is {value!r}, and a file knows {' and '.join(map(repr, OPERATORS))}")
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r}, which is no {hints[name]}")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from a file is of a declared type; a truth value is no number, and a whole number is one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        every = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(every) and all(map(_fits, value, every))
    if origin is collections.abc.Callable:
        return isinstance(value, PRECONDITIONERS) or value in OPERATORS
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is LinearSolver:
        return isinstance(value, LINEAR)
    return isinstance(value, hint)


def expression(setting: Any) -> str:
    """A line of Python that makes an equal object: ``bl.Implicit(bl.CG(max_steps=5))``; defaults are left out.

    Raises:
        TypeError: as `to_json`.
    """
    to_json(setting)
    setting = plain(setting)
    if isinstance(setting, Tensor):
        return repr(setting.item())
    if isinstance(setting, float):
        return f"float({str(setting)!r})" if _odd(setting) else repr(float(setting))
    if isinstance(setting, list):
        return f"[{', '.join(map(expression, setting))}]"
    if isinstance(setting, tuple):
        return f"({', '.join(map(expression, setting))}{',' if len(setting) == 1 else ''})"
    if isinstance(setting, TorchOptim):
        settings = [f"{name}={expression(value)}" for name, value in setting.settings]
        steps = [f"max_steps={setting.max_steps}"]
        steps += [] if setting.gtol is None else [f"gtol={expression(setting.gtol)}"]
        return f"bl.TorchOptim(torch.optim.{setting.optimizer.__name__}, {', '.join([*steps, *settings])})"
    if type(setting).__name__ not in TYPES:
        return repr(setting)
    arguments = []
    for index, field in enumerate(dataclasses.fields(setting)):
        value = getattr(setting, field.name)
        if value != field.default or type(value) is not type(field.default):
            solver = index == 0 and type(value).__name__ in TYPES
            arguments.append(expression(value) if solver else f"{field.name}={expression(value)}")
    return f"bl.{type(setting).__name__}({', '.join(arguments)})"


def save(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write named settings, such as ``{"solver": ..., "hypergrad": ...}``, as a whole or not at all.

    Raises:
        TypeError: the arguments are of another kind, or as `to_json`. OSError: the path cannot be written.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"settings is {type(settings).__name__}: give names and what they stand for after the path, such as "
            "save('best.json', {'solver': solver, 'hypergrad': hypergrad})."
        )
    content = json.dumps({name: to_json(setting) for name, setting in settings.items()}, indent=2) + "\n"
    write_atomically(Path(path), lambda file: file.write(content.encode()))


def load(path: str | Path) -> dict[str, Any]:
    """The inverse of `save`; nothing in the file is executed.

    Raises:
        ValueError: the file is damaged, or names what is no setting. OSError: it cannot be read.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of solver settings: {error}.") from error
    if not isinstance(values, dict) or KEY in values:
        raise ValueError(f"{path} is no file of solver settings: names such as 'solver' and 'hypergrad' are expected.")
    try:
        found = {name: from_json(setting) for name, setting in values.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    for name, setting in found.items():
        if name in ROLES and not isinstance(setting, ROLES[name]):
            known = ", ".join(kind.__name__ for kind in ROLES[name])
            raise ValueError(f"{path}: {name!r} is {setting!r}, and one of {known} is expected.")
    return found


def _odd(value: float) -> bool:
    """JSON has no such number."""
    return not math.isfinite(value)
