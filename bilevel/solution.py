"""`Solution` and `Result`: what every solve returns, and what ``throw=`` means."""

from __future__ import annotations

import copy
import enum
import html
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from ._torch import pytree
from .notices import Place, tell
from .reach import Reach, Reached
from .recording import recording
from .tree import norm

if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultTypeVar

    Value = DefaultTypeVar("Value", covariant=True, default=Any)
else:
    Value = TypeVar("Value", covariant=True)
NewValue = TypeVar("NewValue")

Throw = Literal["raise", "warn", "fallback", "ignore"]


class Result(enum.IntEnum):
    """Why a solve stopped, from good to bad; of a batch, the worst counts. ``result.help`` says it in words."""

    help: str

    def __new__(cls, code: int, text: str) -> Result:
        member = int.__new__(cls, code)
        member._value_ = code
        member.help = text
        return member

    CONVERGED = 0, "the tolerance was met"
    STEPS_DONE = 1, "the requested number of steps was made; no tolerance was asked for"
    INACCURATE = 2, "the answer is less accurate than a solve without a tolerance promises"
    MAX_STEPS = 3, "the step limit was reached before the tolerance was met"
    STAGNATED = 4, "no further progress was possible in this precision before the tolerance was met"
    DAMPED = 5, "a damped system was solved in place of the one that was asked for, which could not be"
    NEGATIVE_CURVATURE = (
        6,
        "zero or negative curvature was met: the matrix (the Hessian, of a loss) is not positive definite",
    )
    UNBOUNDED = 7, "the loss still falls while the params grow: it may have no minimum, or one that is far away"
    DIVERGED = 8, "the iterates grew instead of converging, or the answer is worse than zero"
    NONFINITE = 9, "a NaN or an infinity appeared"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Result.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec.endswith("d") else format(self.name, spec)

    @property
    def ok(self) -> bool:
        """Whether the solve did what was asked of it."""
        return self <= Result.STEPS_DONE


_BY_CODE = {int(result): result for result in Result}


class SolveWarning(UserWarning):
    """A solve did not do what was asked of it, and its result is used all the same."""


class NonFiniteError(ValueError, FloatingPointError):
    """A problem is NaN or infinite at its start: bad data, or a program that has diverged."""


class SolveError(RuntimeError):
    """A solve did not do what was asked of it; ``error.solution`` has what it found."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


class ObjectiveChangedError(RuntimeError):
    """An objective is another function than the one that was solved."""


@dataclass
class AdjointCell:
    """Where a backward pass leaves its `Solution`; apart, so that no reference cycle keeps graphs alive."""

    solution: Solution | None = None


@dataclass(frozen=True, eq=False)
class Solution(Generic[Value]):
    """The outcome of one solve, or of a batch of T; a tree of its value, stats and adjoint for `torch.utils._pytree`.

    Attributes:
        value: the solution; of `argmin` a tree like ``init``, and a type checker knows it by that type; of a linear
            solver a tensor ``[*batch, n]``.
        stats: tensors of the batch shape. Always ``num_steps`` (int64), ``residual_norm`` (float64: of an
            inner solve the gradient norm, of a linear solve ``||b - A x||``) and ``result`` (int8 codes). Of `argmin`
            also ``loss``, and of a solve without a tolerance ``step_norm``, the distance to the solution as the solver
            predicts it.
        recovered: names of the fallbacks that were used, in order.
        state: what a later solve can start from; None where the solver keeps nothing.
        aux: what the function returned beside at the solution, with ``has_aux=True``; gradients flow through it too.
    """

    value: Value
    stats: dict[str, Tensor]
    recovered: tuple[str, ...] = ()
    state: Any = field(default=None, repr=False)
    adjoint_cell: AdjointCell = field(default_factory=AdjointCell, repr=False)
    reach: Reach | None = field(default=None, repr=False)
    aux: Any = field(default=None, repr=False)

    @property
    def result(self) -> Result:
        """The worst `Result` over the batch (one device-to-host copy)."""
        return _BY_CODE[int(self.stats["result"].max())]

    @property
    def curvature(self) -> tuple[Tensor, Tensor] | None:
        """The smallest and the largest curvature that a `CG` or `MINRES` solve saw, ``[*batch]`` float64; else None.

        Ritz values: they lie inside the spectrum of the matrix (with a preconditioner, of the preconditioned one), so
        a negative one proves that it is indefinite. Computed when asked for.
        """
        lanczos = getattr(self.state, "lanczos", None)
        return None if lanczos is None else lanczos.extremes()

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """Batches of problems as one batch, in order: values and aux (detached), stats, adjoints; states are dropped.

        Tensors of aux have the problems in front, as a vmapped function returns them; of what is no tensor the first
        one stays.
        """
        adjoints = [part.adjoint for part in parts]
        known = [adjoint for adjoint in adjoints if adjoint is not None]

        def join(*leaves: Any) -> Any:
            return torch.cat(leaves).detach() if isinstance(leaves[0], Tensor) else leaves[0]

        return cls(
            pytree.tree_map(join, *(part.value for part in parts)),
            {name: torch.cat([part.stats[name] for part in parts]) for name in parts[0].stats},
            tuple(dict.fromkeys(name for part in parts for name in part.recovered)),
            adjoint_cell=AdjointCell(cls.joined(known) if len(known) == len(parts) else None),
            aux=pytree.tree_map(join, *(part.aux for part in parts)),
        )

    def with_stats(self, **stats: Tensor) -> Solution[Value]:
        """The same with other stats under these names."""
        return replace(self, stats={**self.stats, **stats})

    def with_value(self, value: NewValue) -> Solution[NewValue]:
        """The same with another value."""
        return Solution(value, self.stats, self.recovered, self.state, self.adjoint_cell, self.reach, self.aux)

    def without_values(self) -> Solution[None]:
        """The stats, and those of the adjoint: what to keep of many solves, whose values are large; they are None."""
        adjoint = None if self.adjoint is None else self.adjoint.without_values()
        return Solution(None, self.stats, self.recovered, adjoint_cell=AdjointCell(adjoint))

    def summary(self) -> str:
        """How both solves went, in three lines: what was found, the inner solve, and the adjoint solve."""
        return "\n".join(" ".join(line) for line in summary_of(self))

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        cells = [[html.escape(cell) for cell in line] for line in summary_of(self)]
        rows = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in cells)
        return f"<table>{rows}</table>"

    @property
    def captured(self) -> tuple[Reached, ...]:
        """The tensors that the gradient of ``value`` reaches, with their shapes, dtypes and, where known, names.

        A hyperparameter that is missing here was detached, or the problem did not use it.
        """
        return () if self.reach is None else self.reach.listed()

    def __copy__(self) -> Solution[Value]:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Solution[Value]:
        """A copy has no graph."""
        return Solution(**{name: copy.deepcopy(_without_graph(part), memo) for name, part in vars(self).items()})

    def __getstate__(self) -> dict[str, Any]:
        """What is written into a file has no graph either, and functions in ``state`` are left out."""
        return {name: _without_graph(part, functions=False) for name, part in vars(self).items()}

    @property
    def adjoint(self) -> Solution | None:
        """The linear solve of the last backward pass; None before it. Its ``value`` is the tree u of H u = g."""
        return self.adjoint_cell.solution


NAMED = 4
"""Hyperparameters that a summary names at most."""


def summary_of(solution: Solution) -> list[tuple[str, str]]:
    """The lines of `Solution.summary`, each with its name."""
    found = [leaf for leaf in pytree.tree_leaves(solution.value) if isinstance(leaf, Tensor)]
    codes = solution.stats["result"]
    count = f"{codes.numel()} problems, " if codes.dim() else ""
    size = f"{sum(leaf.numel() for leaf in found)} numbers" if found else "the value is not kept"
    shown = [f"{one.name or 'a tensor'} {tuple(one.shape)}" for one in solution.captured[:NAMED]]
    more = [f"{len(solution.captured) - NAMED} more"] if len(solution.captured) > NAMED else []
    reached = f"; its gradient reaches {', '.join(shown + more)}" if shown else ""
    inner = told_of(solution)
    if "loss" in solution.stats:
        inner += f", loss: {_range(solution.stats['loss'])}"
    adjoint = solution.adjoint
    backward = (
        "none (there was no backward pass yet, or its method solves no linear system)"
        if adjoint is None
        else told_of(adjoint)
    )
    return [("solution:", f"{count}{size}{reached}"), ("inner solve:", inner), ("adjoint solve:", backward)]


def told_of(solution: Solution) -> str:
    """One solve in words: its result, its steps, its residual."""
    stats, codes = solution.stats, solution.stats["result"]
    failed = int((codes > int(Result.STEPS_DONE)).sum())
    tasks = f" in {failed} of {codes.numel()} problems" if codes.dim() and failed else ""
    tried = f", after {', '.join(solution.recovered)}" if solution.recovered else ""
    size, kind = relative_residual(solution, None)
    words = f"{solution.result.name}{tasks} ({solution.result.help}){tried}"
    return f"{words}; steps: {_range(stats['num_steps'])}, {kind}: {_range(size)}"


def _range(numbers: Tensor) -> str:
    """One number, or the least and the largest of a batch."""
    low, high = float(numbers.detach().min()), float(numbers.detach().max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _flatten(solution: Solution) -> tuple[list[Any], Any]:
    return [solution.value, solution.stats, solution.adjoint, solution.aux], solution.recovered


def _unflatten(parts: Iterable[Any], recovered: Any) -> Solution:
    value, stats, adjoint, aux = parts
    return Solution(value, stats, recovered, adjoint_cell=AdjointCell(adjoint), aux=aux)


pytree.register_pytree_node(Solution, _flatten, _unflatten, serialized_type_name="bilevel.Solution")


def _without_graph(part: Any, functions: bool = True) -> Any:
    """The same with detached tensors, and without functions where they are not wanted."""
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, types.FunctionType | types.MethodType):
        return part if functions else None
    if isinstance(part, dict):
        return {key: _without_graph(value, functions) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_without_graph(value, functions) for value in part))
    if isinstance(part, list | tuple):
        return type(part)(_without_graph(value, functions) for value in part)
    if isinstance(part, Solution) or not is_dataclass(part) or isinstance(part, type):
        return part  # a solution copies itself
    new = copy.copy(part)
    for name, value in vars(part).items():
        object.__setattr__(new, name, _without_graph(value, functions))
    return new


def check_throw(throw: str) -> None:
    if throw not in ("raise", "warn", "fallback", "ignore"):
        raise ValueError(f"throw is {throw!r}: it is 'raise', 'warn', 'fallback' or 'ignore'.")


def make_codes(result: Result, like: Tensor) -> Tensor:
    """A tensor of one result code for each problem."""
    return torch.full_like(like, int(result), dtype=torch.int8)


def marked(codes: Tensor, where: Tensor, result: Result) -> Tensor:
    """The codes, with that of ``result`` for the problems of a mask."""
    return codes.masked_fill(where, int(result))


NUMBER = re.compile(r"[-+]?\d[\d.e+-]*")

Advice = str | Mapping[Result | None, str] | Callable[[], str]
"""What to try: one text, or one for each `Result`, and under None that for all others; or what finds it out."""


def settle(
    solution: Solution,
    throw: Throw,
    what: str,
    advice: Advice,
    *,
    start: Tensor | None = None,
    place: Place | None = None,
) -> None:
    """Let a failed solve be heard as ``throw`` says; a good one passes silently.

    A non-finite solve always raises, but for ``throw="ignore"``: NaN gradients destroy a training run. A warning is
    shown at the user's line, once there for each result and cause, which is what the advice says but for its numbers.

    Args:
        start: the residual where the solve began, ``[*batch, n]``, to which the message relates that at its end.
        place: the user's line, where the thread has none.
    """
    if throw == "ignore" or recording() or solution.result.ok:
        return
    hint = hint_of(solution.result, advice)
    message = f"{what}: {_describe(solution, start)}. {hint}"
    if throw == "raise" or solution.result is Result.NONFINITE:
        raise SolveError(message, solution)
    tell(message, SolveWarning, kind=(what, solution.result, NUMBER.sub("", hint)), place=place)


def hint_of(result: Result, advice: Advice) -> str:
    if isinstance(advice, str):
        return advice
    return advice() if callable(advice) else advice.get(result, advice[None])


def _describe(solution: Solution, start: Tensor | None) -> str:
    codes = solution.stats["result"]
    failed = codes > int(Result.STEPS_DONE)
    tasks = f" in {int(failed.sum())} of {codes.numel()} problems" if codes.dim() else ""
    tried = f" (after {', '.join(solution.recovered)})" if solution.recovered else ""
    told = f"{solution.result.help}{tasks}{tried}"
    if solution.result is Result.INACCURATE:  # in spite of its residual, which may be tiny
        return told
    size, kind = relative_residual(solution, start)
    return f"{told}; {kind} {size[failed].max().item():.2g}"


def relative_residual(solution: Solution, start: Tensor | None) -> tuple[Tensor, str]:
    """The residual norms ``[*batch]`` relative to where the solve began, where that is known, and their name."""
    if "relative_residual" in solution.stats:
        return solution.stats["relative_residual"], "relative residual norm"
    size = solution.stats["residual_norm"]
    scale = None if start is None else norm(start)
    if scale is None or scale.shape != size.shape or not bool((scale > 0).all()):
        return size, "residual norm"
    return size / scale, "relative residual norm"
