"""Step rules with a right derivative: SGD, Adam, AdamW and RMSprop, with the iterates of `torch.optim`.

Every setting may be a tensor that requires grad: a hyperparameter, which unrolling differentiates. It is one number, or
a tensor ``[T, 1]`` with one for each of T problems; ``lr`` may be a tensor ``[max_steps]`` with one for each step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import check_fields, check_rule
from ..problem import Evaluation, Problem
from ..recording import free_looks
from ..solution import Solution
from ..tree import Tree, on_host
from .minimize import DEFAULT_STEPS, Progress, check_settings, choose
from .watch import Callbacks, watch

Setting = float | Tensor
State = dict[str, Tensor]
"""What a rule carries from step to step, under the names of `torch.optim`; each ``[*batch, n]``."""


class Rule(ABC):
    """A step as a pure function, so that its derivative is that of the formula."""

    @abstractmethod
    def init(self, y: Tensor) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        """The next point and state, from the gradient ``g`` at ``y``; ``index`` counts from 0."""

    @property
    def tensors(self) -> list[Tensor]:
        """Settings that are tensors."""
        values = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        return [v for v in flat if isinstance(v, Tensor)]


@dataclass(frozen=True)
class SGD(Rule):
    """``m <- momentum m + (1 - dampening) g``, ``y <- y - lr m``, with Nesterov's variant and weight decay.

    `torch.optim.SGD` itself, unrolled with ``differentiable=True``, detaches its first momentum buffer and is wrong.
    """

    lr: Setting = 1e-3
    momentum: Setting = 0.0
    dampening: Setting = 0.0
    weight_decay: Setting = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_rates(lr=self.lr, momentum=self.momentum, dampening=self.dampening, weight_decay=self.weight_decay)
        if self.nesterov and (_is_zero(self.momentum) or not _is_zero(self.dampening)):
            raise ValueError("nesterov needs a momentum and no dampening.")

    def init(self, y: Tensor) -> State:
        return {} if _is_zero(self.momentum) else {"momentum_buffer": torch.zeros_like(y)}

    def step(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        g = _decayed(y, g, self.weight_decay)
        if not state:
            return y - at_step(self.lr, index, y) * g, state
        buffer = g if index == 0 else self.momentum * state["momentum_buffer"] + (1 - self.dampening) * g
        direction = g + self.momentum * buffer if self.nesterov else buffer
        return y - at_step(self.lr, index, y) * direction, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma and Ba 2015), with AMSGrad (Reddi et al. 2018) by option; weight decay enters the gradient."""

    lr: Setting = 1e-3
    betas: tuple[Setting, Setting] = (0.9, 0.999)
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_rates(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas}: a pair is needed, such as (0.9, 0.999).")
        for beta in self.betas:
            check_rates(betas=beta)
            if may_be_looked_at(beta) and not bool((on_host(beta).detach() < 1).all()):
                raise ValueError(f"betas is {self.betas}: each lies in [0, 1).")

    def init(self, y: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(y), "exp_avg_sq": torch.zeros_like(y)}
        return {**state, "max_exp_avg_sq": torch.zeros_like(y)} if self.amsgrad else state

    def step(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        return self._moved(y, _decayed(y, g, self.weight_decay), state, index)

    def _moved(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        first, second = self.betas
        mean = first * state["exp_avg"] + (1 - first) * g
        square = second * state["exp_avg_sq"] + (1 - second) * g * g
        new = {"exp_avg": mean, "exp_avg_sq": square}
        if self.amsgrad:
            new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        root = safe_sqrt(new.get("max_exp_avg_sq", square)) / (1 - second ** (index + 1)) ** 0.5
        return y - at_step(self.lr, index, y) / (1 - first ** (index + 1)) * mean / (root + self.eps), new


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): ``y <- (1 - lr weight_decay) y`` first."""

    weight_decay: Setting = 1e-2

    def step(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        return self._moved(y * (1 - at_step(self.lr, index, y) * self.weight_decay), g, state, index)


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop (Hinton 2012), centred (Graves 2013) or not, with momentum by option."""

    lr: Setting = 1e-2
    alpha: Setting = 0.99
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0
    momentum: Setting = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_rates(lr=self.lr, alpha=self.alpha, eps=self.eps, weight_decay=self.weight_decay, momentum=self.momentum)
        if may_be_looked_at(self.alpha) and not bool((on_host(self.alpha).detach() <= 1).all()):
            raise ValueError(f"alpha is {self.alpha}: it lies in [0, 1].")

    def init(self, y: Tensor) -> State:
        names = ["square_avg"] + ["grad_avg"] * self.centered + ["momentum_buffer"] * (not _is_zero(self.momentum))
        return {name: torch.zeros_like(y) for name in names}

    def step(self, y: Tensor, g: Tensor, state: State, index: int) -> tuple[Tensor, State]:
        g = _decayed(y, g, self.weight_decay)
        new = {"square_avg": self.alpha * state["square_avg"] + (1 - self.alpha) * g * g}
        spread = new["square_avg"]
        if self.centered:
            new["grad_avg"] = self.alpha * state["grad_avg"] + (1 - self.alpha) * g
            spread = spread - new["grad_avg"].square()
        direction = g / (safe_sqrt(spread) + self.eps)
        if "momentum_buffer" in state:
            direction = new["momentum_buffer"] = self.momentum * state["momentum_buffer"] + direction
        return y - at_step(self.lr, index, y) * direction, new


@dataclass(frozen=True)
class LastStep:
    """The last step that a problem made, and what it left: the ``state`` of `Steps` solutions.

    Attributes:
        rule: the state after it, under the names of `torch.optim`; ``fit.state.rule["exp_avg_sq"]`` serves
            `AdamPreconditioner`.
        y, g, before, index: the point, gradient and state that it was made from, and its number. None before the first.
        by: the step rule that made it.
    """

    rule: State
    y: Tensor | None = field(default=None, repr=False)
    g: Tensor | None = field(default=None, repr=False)
    before: State | None = field(default=None, repr=False)
    index: int = -1
    by: Rule | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Steps:
    """Run a step rule: the inner solver for unrolling with momentum, Adam, schedules, learned step sizes.

    Args:
        rule: `SGD`, `Adam`, `AdamW`, `RMSprop`.
        max_steps: steps at most. Where ``gtol`` is None, exactly this many.
        gtol: stop a problem at this gradient norm; None: no check, no synchronisation with a GPU.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    rule: Rule
    max_steps: int = DEFAULT_STEPS
    gtol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_rule(self.rule, Rule)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        lr = getattr(self.rule, "lr", 0.0)
        if isinstance(lr, Tensor) and lr.dim() == 1 and len(lr) != self.max_steps:
            raise ValueError(
                f"lr has {len(lr)} step sizes for max_steps = {self.max_steps}: give one for each step, or max_steps = "
                f"{len(lr)}."
            )

    def without_decay(self, init: Tree) -> tuple[Steps, Setting | None]:
        """See `Decaying`: in SGD, Adam and RMSprop the decay enters the gradient, in AdamW it does not."""
        decay = getattr(self.rule, "weight_decay", 0.0)
        if _is_zero(decay):
            return self, 0.0
        if type(self.rule) not in (SGD, Adam, RMSprop):
            return self, None
        return replace(self, rule=replace(self.rule, weight_decay=0.0)), decay  # type: ignore[type-var]

    def first_steps(self, count: int) -> Steps:
        """The first of these steps, with their part of a schedule."""
        lr = getattr(self.rule, "lr", None)
        if isinstance(lr, Tensor) and lr.dim() == 1:
            return replace(self, max_steps=count, rule=replace(self.rule, lr=lr[:count]))  # type: ignore[type-var]
        return replace(self, max_steps=count)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        self._check_shapes(problem.start.y)
        return self.resume(problem, problem.start, self.rule.init(problem.start.y), 0)

    def _check_shapes(self, y: Tensor) -> None:
        """Refuse settings for another number of problems than ``y``, ``[*batch, n]``, has."""
        for setting in self.rule.tensors:
            fits = setting.dim() == y.dim() and all(
                size in (1, there) for size, there in zip(setting.shape, y.shape, strict=True)
            )
            if setting.dim() > 1 and not fits:
                raise ValueError(
                    f"A setting of {type(self.rule).__name__} has shape {tuple(setting.shape)}, and the params are "
                    f"{tuple(y.shape)} as vectors: one number is needed, or of T problems [T, 1]."
                )

    def resume(self, problem: Problem, at: Evaluation, state: State, first: int) -> Solution[Tensor]:
        """The steps from number ``first`` on, from a point of ``problem`` and a state."""
        last = LastStep(state, by=self.rule)
        progress = Progress.begin(at, self.gtol)
        told = watch(self, problem)
        for index in range(first, self.max_steps):
            if told is not None and told(index, at.y, at.g, at.f, progress.active):
                progress.stop()
                break
            if progress.done(index):
                break
            y, state = self.rule.step(at.y, at.g, last.rule, index)
            if self.gtol is not None:
                keep = progress.active.unsqueeze(-1)
                y = torch.where(keep, y, at.y)
                state = {name: torch.where(keep, new, last.rule[name]) for name, new in state.items()}
            last = LastStep(state, at.y, at.g, last.rule, index, self.rule)
            progress.count()
            if self.gtol is None and told is None and index == self.max_steps - 1:
                at = Evaluation(y, at.f, at.g)  # nothing asks for the last gradient: argmin measures it once
                break
            new = problem.evaluate(y)
            at = choose(progress.active, new, at) if self.gtol is not None else new
            if self.gtol is not None:
                progress.look(at)
        if told is not None and bool(progress.steps.max() == self.max_steps - first):
            told(self.max_steps, at.y, at.g, at.f, progress.active)
        return replace(progress.solution(at.y), state=last)


def at_step(lr: Setting, index: int, like: Tensor) -> Setting:
    """The step size of step ``index``; a one-dimensional tensor is a schedule, ``[T, 1]`` one for each problem."""
    if not isinstance(lr, Tensor) or lr.dim() == 0:
        return lr
    return lr[index] if lr.dim() == 1 else lr.to(like)


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 in place of infinity at 0: where no gradient ever was, none changes."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def may_be_looked_at(setting: object) -> bool:
    """Whether a setting can be checked: of a learned one each step makes a new tensor, and a look may not be free."""
    return not isinstance(setting, Tensor) or free_looks(setting)


def check_rates(**settings: Any) -> None:
    """Refuse negative and non-finite settings, those that are no numbers, and schedules of others than ``lr``.

    Raises:
        TypeError, ValueError: they name the setting.
    """
    for name, value in settings.items():
        if not isinstance(value, Real | Tensor):
            raise TypeError(
                f"{name} is of type {type(value).__name__}: a number is needed, or a tensor"
                + ("; of one step size a step, write torch.tensor([...]), [max_steps]." * (name == "lr") or ".")
            )
        if isinstance(value, Tensor) and value.dim() == 1 and name != "lr":
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: one number is needed, or of T problems [T, 1]. A schedule, "
                "one number for each step, is taken for lr only."
            )
        tensor = on_host(value).detach()
        if may_be_looked_at(value) and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise ValueError(f"{name} is {value}: it must be finite and not negative.")


def _decayed(y: Tensor, g: Tensor, weight_decay: Setting) -> Tensor:
    return g if _is_zero(weight_decay) else g + weight_decay * y


def _is_zero(setting: Setting) -> bool:
    """Switched off; a tensor never is, since it may be learned."""
    return not isinstance(setting, Tensor) and setting == 0
