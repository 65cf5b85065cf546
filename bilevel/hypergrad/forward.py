"""Forward-mode hypergradients: carry the derivative along with the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..inner.minimize import InnerSolver
from ..inner.steps import State
from ..problem import Objective
from ..solution import Solution, Throw
from ..tree import Tree, tree_map
from .path import Path, finish, fixed_steps


@dataclass(frozen=True)
class ForwardMode:
    """``Z <- d_y step Z + d_x step`` beside ``y <- step(y, x)`` (Franceschi et al. 2017); `Steps` or `GradientDescent`.

    For few hyperparameters and many steps: exact like `Unroll`, with memory that does not depend on the steps, at the
    cost of one Hessian product per step and hyperparameter entry. Learned step sizes, schedules and momentum are
    hyperparameters like others. First derivatives only; none towards ``init``.

    Args:
        max_hparams: entries at most; each is a vector as large as the params (and the optimizer's state).
    """

    max_hparams: int = 64

    def __post_init__(self) -> None:
        if self.max_hparams < 1:
            raise ValueError(f"max_hparams is {self.max_hparams}: at least one is needed.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Any, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        path = Path(objective, init, args, fixed_steps(solver, "ForwardMode"), "ForwardMode", to_init=False)
        count = sum(_count(tensor) for tensor in path.walk.hparams)
        if not torch.is_grad_enabled() or count == 0:
            return finish(path.problem, path.walk.steps.minimize(path.problem), throw)
        if count > self.max_hparams:
            raise ValueError(
                f"ForwardMode would carry {count} derivatives along; its max_hparams is {self.max_hparams}. Use "
                "Implicit() or Unroll() for many hyperparameters, or raise max_hparams."
            )
        y, state, tangents = _follow(path)
        return finish(path.problem, path.solution(_Linear.apply(y, tangents, *path.walk.hparams), state), throw)


def _follow(path: Path) -> tuple[Tensor, State, Tensor]:
    """The last point ``[*batch, n]``, its state, and its derivative by each hyperparameter entry ``[p, *batch, n]``."""
    hparams = [tensor.detach() for tensor in path.walk.hparams]
    y, state = path.problem.start.y, path.walk.steps.rule.init(path.problem.start.y)
    directions = _unit_directions(hparams)
    by_y = y.new_zeros(directions[0].shape[0], *y.shape)
    by_state = {name: torch.zeros_like(by_y) for name in state}
    with torch.no_grad():
        for index in range(path.walk.steps.max_steps):
            (y, state), push = _pushed(partial(path.walk.step, index=index), (y, state, hparams))
            by_y, by_state = torch.vmap(push)(by_y, by_state, directions)
    return y, state, by_y


def _pushed(step: Callable[..., Any], at: tuple[Any, ...]) -> tuple[tuple[Tensor, State], Callable[..., Any]]:
    """``step(*at)``, and its derivative along tangents of ``at``.

    As the derivative of a vector-Jacobian product by its cotangent: PyTorch's dual levels are global to a process, so
    that its forward mode in two threads raises, or is silently wrong.
    """
    out, pull = torch.func.vjp(step, *at)  # type: ignore[misc]
    _, push = torch.func.vjp(pull, tree_map(torch.zeros_like, out))  # type: ignore[misc]
    return out, lambda *tangents: push(tangents)[0]


class _Linear(torch.autograd.Function):
    """The last point, with the derivative that was carried along."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tangents: Tensor, *hparams: Tensor) -> Tensor:
        ctx.tangents, ctx.like = tangents, [tensor.new_empty(()).expand(tensor.shape) for tensor in hparams]
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "A second derivative was asked for through hypergrad=ForwardMode(), which gives first ones only. Use "
                "Implicit() or Unroll()."
            )
        (cotangent,) = grads
        slopes = (ctx.tangents * cotangent).sum(tuple(range(1, ctx.tangents.dim())))
        parts = slopes.split([_count(like) for like in ctx.like])
        return (None, None, *(_viewed(part, like) for part, like in zip(parts, ctx.like, strict=True)))


def _unit_directions(hparams: list[Tensor]) -> list[Tensor]:
    """For each tensor ``[p, *shape]``: the p unit directions of all entries together, two of each complex one."""
    sizes = [_count(tensor) for tensor in hparams]
    eye = torch.eye(sum(sizes), dtype=torch.float64, device=hparams[0].device if hparams else None)
    return [_viewed(part, tensor) for part, tensor in zip(eye.split(sizes, 1), hparams, strict=True)]


def _count(tensor: Tensor) -> int:
    """Real numbers in a tensor."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _viewed(flat: Tensor, like: Tensor) -> Tensor:
    """Real numbers ``[*batch, p]`` as tensors ``[*batch, *shape]`` of the shape, dtype and device of one."""
    if like.is_complex():
        flat = torch.view_as_complex(flat.unflatten(-1, (-1, 2)).double().contiguous())
    return flat.reshape((*flat.shape[:-1], *like.shape)).to(like)
