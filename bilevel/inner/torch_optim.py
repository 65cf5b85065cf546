"""Any `torch.optim` optimizer as inner solver: implicit differentiation does not care which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch import outside_transforms, pytree
from ..checks import check_fields, check_optimizer, check_step_size
from ..problem import Evaluation, Problem
from ..solution import Result, Solution
from ..tree import Tree, leaves
from .decay import Coefficient
from .minimize import DEFAULT_STEPS, Progress, check_settings
from .watch import Callbacks, watch

COUPLED = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.ASGD),
)
"""Optimizers that add ``weight_decay * params`` to the gradient, unless told otherwise."""


@dataclass(frozen=True, init=False)
class TorchOptim:
    """Run ``optimizer(params, **settings)`` from `torch.optim`: ``TorchOptim(torch.optim.Adam, lr=1e-2)``.

    T problems are stepped together; a problem that meets ``gtol`` is frozen there. Optimizers that work
    element by element (SGD, Adam, RMSprop, ...) then solve each as if alone; `torch.optim.LBFGS` couples them:
    take `bilevel.LBFGS` for a batch.

    Args:
        optimizer: the class.
        max_steps: calls of ``step`` at most.
        gtol: stop a problem at this gradient norm; None: make ``max_steps`` steps.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
        settings: what the class takes, such as ``lr``.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    max_steps: int
    gtol: float | None
    settings: tuple[tuple[str, Any], ...]
    callback: Callbacks = field(repr=False, compare=False)

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        max_steps: int = DEFAULT_STEPS,
        gtol: float | None = None,
        callback: Callbacks = None,
        **settings: Any,
    ):
        check_optimizer(optimizer)
        if "lr" in settings:
            check_step_size(settings["lr"])
        for name, value in settings.items():
            if any(isinstance(one, Tensor) and one.requires_grad for one in pytree.tree_leaves(value)):
                raise TypeError(
                    f"{name} requires grad: torch.optim passes no derivative to its settings. Take Steps(SGD(...), "
                    "max_steps=...) or Steps(Adam(...), ...), whose settings may be tensors; or detach it."
                )
        object.__setattr__(self, "optimizer", optimizer)
        object.__setattr__(self, "max_steps", max_steps)
        object.__setattr__(self, "gtol", gtol)
        object.__setattr__(self, "callback", callback)
        object.__setattr__(self, "settings", tuple(settings.items()))
        check_fields(self)
        check_settings(max_steps=max_steps, gtol=gtol)

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings)
        name = getattr(self.optimizer, "__name__", repr(self.optimizer))
        return f"TorchOptim({name}, max_steps={self.max_steps}, gtol={self.gtol}{settings})"

    def without_decay(self, init: Tree) -> tuple[TorchOptim, Coefficient | None]:
        """See `Decaying`: where the optimizer adds its decay to the gradient, as all but AdamW and its kin do."""
        with outside_transforms():  # where no tensor may begin to require grad
            params = [torch.zeros(y.shape, dtype=y.dtype, device=y.device, requires_grad=True) for y in leaves(init)]
            optimizer = self.optimizer(params, **dict(self.settings))
        groups = optimizer.param_groups
        if all(group.get("weight_decay", 0.0) == 0 for group in groups):
            return self, 0.0
        apart = any(group.get("decoupled_weight_decay") or group.get("maximize") for group in groups)
        if type(optimizer) not in COUPLED or apart:
            return self, None
        plain = TorchOptim(
            _Undecayed(self.optimizer),
            max_steps=self.max_steps,
            gtol=self.gtol,
            callback=self.callback,
            **dict(self.settings),
        )
        by_param = {id(p): group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
        return plain, tuple(float(by_param.get(id(p), 0.0)) for p in params)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        raveler = problem.raveler
        params = [leaf.detach().clone().requires_grad_() for leaf in raveler.unravel(problem.start.y)]
        optimizer = self.optimizer(params, **dict(self.settings))
        progress = Progress.begin(problem.start, self.gtol)
        latest, evaluating = problem.start, False

        def closure() -> float:
            nonlocal latest, evaluating
            evaluating = True
            latest = problem.evaluate(raveler.ravel([param.detach() for param in params]))
            evaluating = False
            for param, grad in zip(params, raveler.unravel(latest.g), strict=True):
                param.grad = grad.clone()
            return float(latest.f.sum())

        told = watch(self, problem)
        for step in range(self.max_steps):
            if told is not None:
                at = problem.evaluate(raveler.ravel([param.detach().clone() for param in params]))
                if told(step, at.y, at.g, at.f, progress.active):
                    progress.stop()
                    break
            if progress.done(step):
                break
            before = raveler.ravel([param.detach() for param in params]).clone()
            try:
                optimizer.step(closure)
            except IndexError:  # strong_wolfe of torch.optim.LBFGS, where it sees no finite loss
                if evaluating or not isinstance(optimizer, torch.optim.LBFGS):
                    raise
                self._freeze(params, raveler.unravel(before), torch.zeros_like(progress.active))
                progress.end(progress.active, Result.STAGNATED)
                break
            if self.gtol is not None:
                progress.look(self._first(problem, before, latest))
            progress.count()
            if self.gtol is not None:
                self._freeze(params, raveler.unravel(before), progress.active)
        y = raveler.ravel([param.detach() for param in params])
        if self.gtol is not None:
            progress.look(problem.evaluate(y))
        if told is not None and bool(progress.steps.max() == self.max_steps):
            at = problem.evaluate(y)
            told(self.max_steps, y, at.g, at.f, progress.active)
        return progress.solution(y)

    @staticmethod
    def _first(problem: Problem, before: Tensor, latest: Evaluation) -> Evaluation:
        """The evaluation at the point before the step; a closure called several times ended elsewhere."""
        return latest if torch.equal(latest.y, before) else problem.evaluate(before)

    @staticmethod
    def _freeze(params: list[Tensor], before: list[Tensor], active: Tensor) -> None:
        with torch.no_grad():
            for param, old in zip(params, before, strict=True):
                where = active.view((*active.shape, *[1] * (param.dim() - active.dim())))
                param.copy_(torch.where(where, param, old))


@dataclass(frozen=True)
class _Undecayed:
    """Makes the same optimizer, without its weight decay."""

    optimizer: Callable[..., torch.optim.Optimizer]

    @property
    def __name__(self) -> str:
        return getattr(self.optimizer, "__name__", repr(self.optimizer))

    def __call__(self, params: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
        optimizer = self.optimizer(params, **settings)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer
