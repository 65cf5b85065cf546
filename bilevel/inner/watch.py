"""Solves that are watched: what a callback is told after each step, and two that are ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..problem import Problem, RootProblem
from ..recording import recording
from ..tree import Raveler, Tree, norm


@dataclass(frozen=True)
class InnerStep:
    """What an inner solver has reached; its tensors are detached.

    Attributes:
        step: steps made, 0 at the start. max_steps: how many there will be at most.
        loss: of each problem, ``[*batch]`` float64; None of a system.
        residual_norm: of the gradient, or of the residual of a system, ``[*batch]`` float64.
        last: no step follows.
        flat: the params there as vectors, ``[*batch, n]``.
    """

    step: int
    max_steps: int
    loss: Tensor | None
    residual_norm: Tensor
    last: bool
    _raveler: Raveler = field(repr=False)
    flat: Tensor = field(repr=False)

    @property
    def gradient_norm(self) -> Tensor:
        """The same as ``residual_norm``, as minimisation calls it."""
        return self.residual_norm

    @property
    def params(self) -> Tree:
        """The params there, a tree like ``init``."""
        return self._raveler.unflatten(self._raveler.unravel(self.flat))


Callback = Callable[[InnerStep], object]
"""Called with each `InnerStep`; it ends the solve where it returns True, as a number or a tensor (of T problems: all
True), or raises `StopIteration`."""


Callbacks = Callback | Sequence[Callback] | None
"""The field of a solver for them. It is no setting: solvers that differ there only are equal."""


class Watch:
    """Tells callbacks of the steps of one solve.

    Args:
        callbacks: one, or several. problem: a `Problem` or a `RootProblem`.

    Raises:
        TypeError: a callback is no function. NotImplementedError: the solve is being recorded, when nothing can be
            shown.
    """

    def __init__(self, callbacks: Callback | Sequence[Callback], problem: Problem | RootProblem, max_steps: int):
        if recording():
            raise NotImplementedError(
                "A solver with a callback was called inside of bilevel.capture, where no value can be looked at: take "
                "the solver without its callback there, and look at fit.stats afterwards."
            )
        self.callbacks = every(callbacks)
        for callback in self.callbacks:
            if isinstance(callback, type) or not callable(callback):
                name = getattr(callback, "__name__", None)
                given, written = (f"the class {name}", f"{name}()") if name else (repr(callback), "bl.History()")
                raise TypeError(f"callback is {given}: a function of a step is needed, such as {written}.")
        self.raveler, self.max_steps = problem.raveler, max_steps

    def __call__(self, step: int, y: Tensor, residual: Tensor, loss: Tensor | None, active: Tensor) -> bool:
        """Whether the solve shall end here.

        Args:
            y, residual: ``[*batch, n]``. loss, active: ``[*batch]``; a problem that is not active has ended.
        """
        last = step >= self.max_steps or not bool(active.any())
        loss = None if loss is None else loss.detach().double()
        seen = InnerStep(step, self.max_steps, loss, norm(residual.detach()), last, self.raveler, y.detach())
        wishes = []
        for callback in self.callbacks:  # each is told, whatever the others wish
            try:
                wishes.append(_is_true(callback(seen)))
            except StopIteration:
                wishes.append(True)
        return any(wishes) and not last


class Watched(Protocol):
    """A solver that callbacks may watch."""

    @property
    def callback(self) -> Callbacks: ...

    @property
    def max_steps(self) -> int: ...


def watch(solver: Watched, problem: Problem | RootProblem) -> Watch | None:
    """What a solver has to tell after each step; None where nobody listens."""
    return None if solver.callback is None else Watch(solver.callback, problem, solver.max_steps)


def every(callbacks: object) -> list[Any]:
    """One callback, or several, as a list; what is neither, as one."""
    return list(callbacks) if isinstance(callbacks, Sequence) and not isinstance(callbacks, str) else [callbacks]


def _is_true(answer: object) -> bool:
    """Whether a callback said True: itself, or by a comparison of tensors or of NumPy's numbers."""
    if isinstance(answer, Tensor):
        return answer.dtype == torch.bool and bool(answer.all())
    return isinstance(answer, bool | np.bool_) and bool(answer)


def seen_as(solver: Any, show: Callable[[InnerStep], InnerStep]) -> Any:
    """The solver, whose callbacks are told ``show(step)``: of a problem that another one was made into."""
    callback = getattr(solver, "callback", None)
    if callback is None:
        return solver
    return replace(solver, callback=[lambda step, one=one: one(show(step)) for one in every(callback)])


@dataclass
class History:
    """A callback that keeps the losses and gradient norms of a solve; of several solves, those of the last one.

    Attributes:
        loss, residual_norm: by step, from the start on: ``[num_steps + 1, *batch]`` float64 on the host. The loss of a
            system is empty.
    """

    _losses: list[Tensor] = field(default_factory=list, repr=False)
    _norms: list[Tensor] = field(default_factory=list, repr=False)

    def __call__(self, step: InnerStep) -> None:
        """Keep one step; the first one of a solve forgets the solve before."""
        if step.step == 0:
            self._losses, self._norms = [], []
        if step.loss is not None:
            self._losses.append(step.loss.cpu())
        self._norms.append(step.residual_norm.cpu())

    @property
    def loss(self) -> Tensor:
        return _stacked(self._losses)

    @property
    def residual_norm(self) -> Tensor:
        return _stacked(self._norms)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)) if parts else torch.empty(0, dtype=torch.float64, device="cpu")


class ProgressBar:
    """A callback that shows the steps of each solve as a bar of tqdm, with the mean loss and the largest gradient norm.

    Args:
        label: what stands in front of it. leave: whether the bar stays when a solve has ended.
        settings: what ``tqdm.auto.tqdm`` takes.

    Raises:
        ModuleNotFoundError: tqdm is not installed; it comes with the extra ``progress``.
    """

    def __init__(self, label: str = "inner solve", *, leave: bool = False, **settings: Any):
        self._tqdm = require("tqdm.auto", "progress").tqdm
        self._settings = {"desc": label, "leave": leave, **settings}
        self._bar: Any = None

    def __call__(self, step: InnerStep) -> None:
        """Show one step."""
        if step.step == 0 or self._bar is None:
            self.close()
            self._bar = self._tqdm(total=step.max_steps, **self._settings)
        shown = {} if step.loss is None else {"loss": f"{float(step.loss.mean()):.4g}"}
        norms = {"gradient": f"{float(step.residual_norm.max()):.2e}"}
        self._bar.set_postfix(shown | norms, refresh=False)
        self._bar.update(step.step - self._bar.n)
        if step.last:
            self.close()

    def close(self) -> None:
        """End the bar of a solve that did not end by itself."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
