"""Arguments of a wrong kind: what was given, and what to write."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .notices import tell
from .recording import Recorded
from .solution import Solution
from .tree import leaves


def check_argmin(objective: object, init: object, solver: object, hypergrad: object, warm_start: object) -> None:
    """Refuse arguments of `argmin` that are of another kind, naming each.

    Raises:
        TypeError: as all functions of this module.
    """
    check_function("objective", objective, init, "argmin")
    check_start(init)
    check_solver(solver, "minimize", "argmin")
    check_hypergrad(hypergrad)
    check_warm_start(warm_start)


def check_root(
    what: str, function: object, init: object, solver: object, hypergrad: object, warm_start: object
) -> None:
    """The same for `root` and `fixed_point`; ``what`` is the name of their function."""
    caller = "fixed_point" if what == "map" else "root"
    check_function(what, function, init, caller)
    check_start(init)
    check_solver(solver, "find", caller)
    check_hypergrad(hypergrad)
    check_warm_start(warm_start)


def check_function(name: str, value: object, init: object, caller: str) -> None:
    """Refuse a first argument that cannot be called."""
    if isinstance(value, Recorded):
        raise TypeError(
            f"{name} is a captured function, whose results are detached: no gradient would be found. Pass the function "
            f"itself, and capture the one that calls {caller}."
        )
    if callable(value):
        return
    swapped = f" Are the two swapped? Write {caller}({name}, init, ...)." if callable(init) else ""
    raise TypeError(f"{name} is {_kind(value)}: a function of the params is needed, such as lambda y: ....{swapped}")


def check_leaves(name: str, found: Iterable[object], fits: Callable[[Tensor], bool], advice: str) -> None:
    """Refuse leaves of a tree that are no tensors, or tensors of a dtype that does not fit."""
    for leaf in found:
        if not isinstance(leaf, Tensor) or not fits(leaf):
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{name} holds {kind}: tensors of floating point are needed, {advice}.")


def check_start(init: object) -> None:
    """Refuse a module, an iterator or a function as ``init``."""
    if isinstance(init, nn.Module):
        raise TypeError(
            f"init is a module ({_name(init)}): pass its parameters, dict(module.named_parameters()), and let the "
            "objective call torch.func.functional_call(module, params, (x,))."
        )
    if inspect.isgenerator(init) or (callable(init) and not isinstance(init, Tensor)):
        raise TypeError(
            f"init is {_kind(init)}: a tensor or a tree of tensors is needed. Of a module, write "
            "dict(module.named_parameters())."
        )
    if isinstance(init, dict | list | tuple):
        required = {leaf.requires_grad for leaf in leaves(init) if isinstance(leaf, nn.Parameter)}
        if len(required) == 2:
            tell(FROZEN, UserWarning)


FROZEN = (
    "init holds parameters that require grad beside frozen ones, and all of them are trained: requires_grad_(False) "
    "changes nothing here. Leave the frozen ones out, {n: p for n, p in module.named_parameters() if p.requires_grad}: "
    "torch.func.functional_call takes them from the module. If all are meant, detach them: p.detach()."
)


def check_solver(solver: object, method: str, caller: str) -> None:
    """Refuse what does not solve the kind of problem that ``caller`` has: it lacks ``method``."""
    if solver is None:
        return
    if _is_optimizer(solver):
        name = _name(solver)
        raise TypeError(
            f"solver is {_kind(solver)}, an optimizer: write solver=TorchOptim(torch.optim.{name}, lr=..., "
            "max_steps=...), which makes one for the inner params."
        )
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {_name(solver)}: write solver={_name(solver)}(...), an object.")
    if _has(solver, method):
        return
    if caller == "constrained" and _has(solver, "minimize"):
        advice = f"it minimises without constraints. Write solver=AugmentedLagrangian(inner={_name(solver)}(...))"
    elif _has(solver, "minimize"):
        advice = "it minimises. Take Newton(), Anderson() or ScipyRoot(), or argmin for a loss"
    elif _has(solver, "find"):
        advice = "it solves systems. Take LBFGS() or NewtonCG(), or root for a system"
    elif _has(solver, "step") and _has(solver, "init"):
        advice = f"it is a step rule. Write solver=Steps({_name(solver)}(...), max_steps=...)"
    elif _has(solver, "solve"):
        advice = f"it solves linear systems. Write hypergrad=Implicit({_name(solver)}(...))"
    elif _has(solver, "pull", "run"):
        advice = f"it is a hypergradient. Write hypergrad={_name(solver)}(...)"
    else:
        advice = "an inner solver is needed, such as LBFGS()" if method == "minimize" else "Newton() is such a one"
    raise TypeError(f"solver is {_kind(solver)}, which {caller} cannot use: {advice}.")


def check_hypergrad(hypergrad: object) -> None:
    """Refuse what is no hypergradient."""
    if hypergrad is None:
        return
    if isinstance(hypergrad, type):
        raise TypeError(f"hypergrad is the class {_name(hypergrad)}: write hypergrad={_written(hypergrad)}, an object.")
    if _has(hypergrad, "pull", "run"):
        return
    if _has(hypergrad, "solve"):
        advice = f"it is a linear solver. Write hypergrad=Implicit({_name(hypergrad)}(...))"
    elif _has(hypergrad, "minimize", "find"):
        advice = f"it is an inner solver. Write solver={_name(hypergrad)}(...)"
    else:
        advice = "an object such as Implicit(), Unroll() or Implicit(CG(rtol=1e-6)) is needed, or None for no gradient"
    raise TypeError(f"hypergrad is {_kind(hypergrad)}: {advice}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a number would be taken for it."""
    one = isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == 1
    if not (one or isinstance(value, bool | np.bool_)):
        raise TypeError(f"{name} is {_kind(value)}: True or False is needed.")


def check_number_or_tensor(name: str, value: object) -> None:
    """Refuse what is neither, naming it."""
    if isinstance(value, bool) or not isinstance(value, Tensor | Real):
        raise TypeError(f"{name} is {value!r}: a number or a tensor is needed, such as torch.as_tensor(value).")


def check_linear_solver(value: object, name: str = "linear_solver") -> None:
    """Refuse what does not solve linear systems."""
    if value is None:
        return
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {_name(value)}: write {_name(value)}(...), an object.")
    if not _has(value, "solve"):
        raise TypeError(f"{name} is {_kind(value)}: a linear solver is needed, such as CG(), MINRES() or Cholesky().")


def check_preconditioner(value: object) -> None:
    """Refuse what makes no preconditioner."""
    if isinstance(value, type) or not (value is None or callable(value)):
        raise TypeError(
            f"preconditioner is {_kind(value)}: an object such as Jacobi() or NystromPreconditioner(20) is needed."
        )


def check_optimizer(value: object) -> None:
    """Refuse an optimizer that exists already, or none."""
    if isinstance(value, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is {_kind(value)}, made for params of its own: pass the class and its settings, "
            f"TorchOptim(torch.optim.{_name(value)}, lr=..., max_steps=...)."
        )
    if not callable(value):
        raise TypeError(f"optimizer is {_kind(value)}: a class of torch.optim is needed, such as torch.optim.Adam.")


def check_rule(value: object, kind: type) -> None:
    """Refuse what is no step rule."""
    if isinstance(value, kind):
        return
    if _is_optimizer(value):
        advice = f"take TorchOptim(torch.optim.{_name(value)}, ...), or a rule of bilevel, which can be differentiated"
    elif isinstance(value, type):
        advice = f"write {_name(value)}(...), an object"
    else:
        advice = "a step rule is needed, such as SGD(lr=0.1) or Adam(lr=1e-3) of bilevel"
    raise TypeError(f"rule is {_kind(value)}: {advice}.")


def check_warm_start(value: object) -> None:
    """Refuse params in the place of an earlier solution."""
    if value is not None and not isinstance(value, Solution):
        raise TypeError(
            f"warm_start is {_kind(value)}: the Solution of an earlier solve is needed, whose adjoint is the first "
            "guess. Params to start from are init."
        )


SCHEDULES = "For one step size a step, or learned ones, take Steps(SGD(lr=...), max_steps=...), lr a tensor [max_steps]"


def check_fields(settings: Any) -> None:
    """Refuse a setting of a dataclass that is not what its annotation says: ``int``, ``float`` or ``bool``.

    A tensor of one element may stand for it.

    Raises:
        TypeError: it is no number, no whole one, or neither True nor False. ValueError: it is infinite.
    """
    for name, kinds in _plain_fields(settings.__class__):
        value, optional = getattr(settings, name), "None" in kinds
        if value is None and optional:
            continue
        if "bool" in kinds:
            check_flag(name, value)
            continue
        whole = "float" not in kinds
        one = isinstance(value, Tensor) and value.numel() == 1 and not (whole and value.is_floating_point())
        if not one and (isinstance(value, bool) or not isinstance(value, Integral if whole else Real)):
            needed = "a whole number" if whole else "a number"
            raise TypeError(f"{name} is {_kind(value)}: {needed} is needed{', or None' * optional}.")
        if not whole and math.isinf(value.detach() if isinstance(value, Tensor) else value):
            raise ValueError(f"{name} is {value}: a finite number is needed{', or None' * optional}.")


@functools.cache
def _plain_fields(kind: type) -> list[tuple[str, set[str]]]:
    """The fields that are numbers or flags, and the kinds that each may be."""
    named = [(field.name, set(str(field.type).split(" | "))) for field in fields(kind)]
    return [(name, kinds) for name, kinds in named if kinds <= {"int", "float", "None"} or kinds <= {"bool", "None"}]


def check_step_size(value: object, name: str = "lr", advice: str = SCHEDULES) -> None:
    """Refuse what is no positive finite number, such as a schedule where there is none.

    Raises:
        TypeError: it is no number. ValueError: it is not positive, or not finite.
    """
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad else value
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} is {_kind(value)}: a number is needed. {advice}.")
    if not 0 < float(number) < math.inf:
        raise ValueError(f"{name} is {value}: it must be positive and finite.")


def check_momentum(value: object) -> None:
    """Refuse what is no number in [0, 1).

    Raises:
        TypeError: it is no number. ValueError: it lies elsewhere.
    """
    if not isinstance(value, Real):
        raise TypeError(
            f"momentum is {_kind(value)}: a number is needed, such as momentum.item(), because whether it is zero "
            "decides what is computed. For one that is learned, or one of each problem, take "
            "Steps(SGD(lr=..., momentum=...), max_steps=...), whose settings may be tensors."
        )
    if not 0 <= float(value) < 1:
        raise ValueError(f"momentum is {value}: it lies in [0, 1).")


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer) or (
        isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )


def _name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _written(kind: type) -> str:
    """A class as a value of ``hypergrad``."""
    if _has(kind, "solve") and not _has(kind, "pull"):
        return f"Implicit({kind.__name__}(...))"
    return f"{kind.__name__}(...)" if _has(kind, "run", "pull") else "Implicit()"


def _kind(value: object) -> str:
    """What was given, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + " that requires grad" * value.requires_grad
    return f"of type {type(value).__name__}"


def _has(value: object, *methods: str) -> bool:
    """Whether it has one of these methods of ours; a string has methods of the same names."""
    return not isinstance(value, str) and any(callable(getattr(value, method, None)) for method in methods)


def refuse_mps(name: str, device: torch.device) -> None:
    """Raise where there is no float64.

    Raises:
        NotImplementedError: the device is one of MPS.
    """
    if device.type == "mps":
        raise NotImplementedError(
            f"{name} is on an MPS device, which has no float64: dot products, norms and losses are accumulated in it "
            f"here, and without it tolerances mean nothing. Move {name} and the data to the CPU, or to a CUDA device."
        )
