"""Forward-mode hypergradients: carry the derivative along with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import FunctionContext, without_saved_tensors_hooks
from ..checks import check_fields
from ..inner.minimize import InnerSolver
from ..inner.steps import State
from ..problem import Objective
from ..solution import Solution, Throw
from ..tree import Tree, tree_map
from .path import Path, finish, fixed_steps, no_forward_mode


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
        check_fields(self)
        if self.max_hparams < 1:
            raise ValueError(f"max_hparams is {self.max_hparams}: at least one is needed.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        path = Path(objective, init, args, fixed_steps(solver, "ForwardMode"), "ForwardMode", to_init=False)
        count = sum(num_entries(tensor) for tensor in path.walk.hparams)
        if not torch.is_grad_enabled() or count == 0:
            return finish(path.problem, path.walk.steps.minimize(path.problem), throw)
        if count > self.max_hparams:
            raise ValueError(
                f"ForwardMode would carry {count} derivatives along; its max_hparams is {self.max_hparams}. Use "
                "Implicit() or Unroll() for many hyperparameters, or raise max_hparams."
            )
        directions = torch.eye(count, dtype=torch.float64, device=path.problem.start.y.device)
        return finish(path.problem, carried(path, directions, "ForwardMode()"), throw)


def carried(path: Path, directions: Tensor, method: str, start: Sequence[Tensor] = ()) -> Solution:
    """The last point, with the derivatives that were carried along; what is pulled back is their sum over directions.

    Args:
        directions: ``[b, p]`` float64, of all entries of the hyperparameters together and then of those leaves of
            ``start`` that require grad; a complex number has two.
        method: for messages. start: the leaves of ``init``, where a gradient flows to them as well.
    """
    operands = [*path.walk.hparams, *(leaf for leaf in start if leaf.requires_grad)]
    y, state, tangents = _follow(path, parted(directions, operands), start)
    moved = _Linear.apply(y, tangents, directions, method, *operands)
    return path.solution(moved, state)


@without_saved_tensors_hooks()  # torch.func bears none
def _follow(path: Path, directions: list[Tensor], start: Sequence[Tensor]) -> tuple[Tensor, State, Tensor]:
    """The last point ``[*batch, n]``, its state, and its derivative along each direction ``[b, *batch, n]``."""
    hparams = [tensor.detach() for tensor in path.walk.hparams]
    y, state = path.problem.start.y, path.walk.steps.rule.init(path.problem.start.y)
    count, directions, rest = len(directions[0]), directions[: len(hparams)], iter(directions[len(hparams) :])
    by_y = y.new_zeros(count, *y.shape)
    if start:
        moved = [next(rest) if leaf.requires_grad else leaf.new_zeros(count, *leaf.shape) for leaf in start]
        by_y = torch.vmap(lambda *leaves: path.walk.raveler.ravel(leaves))(*moved)
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
    def forward(
        ctx: FunctionContext, y: Tensor, tangents: Tensor, directions: Tensor, method: str, *operands: Tensor
    ) -> Tensor:
        ctx.tangents, ctx.directions, ctx.method = tangents, directions, method
        ctx.like = [tensor.new_empty(()).expand(tensor.shape) for tensor in operands]
        return y.clone()

    @staticmethod
    def backward(ctx: FunctionContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"A second derivative was asked for through hypergrad={ctx.method}, which gives first ones only. Use "
                "Implicit() or Unroll()."
            )
        (cotangent,) = grads
        slopes = (ctx.tangents * cotangent).sum(tuple(range(1, ctx.tangents.dim())), dtype=torch.float64)
        return (None, None, None, None, *parted(slopes @ ctx.directions, ctx.like))

    @staticmethod
    def jvp(ctx: FunctionContext, *tangents: Tensor | None) -> Tensor:
        raise no_forward_mode(ctx.method)


def parted(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Vectors ``[*batch, p]`` of all entries together as tensors ``[*batch, *shape]`` like each of these."""
    parts = vectors.split([num_entries(tensor) for tensor in like], -1)
    return [_viewed(part, tensor) for part, tensor in zip(parts, like, strict=True)]


def num_entries(tensor: Tensor) -> int:
    """Real numbers in a tensor."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _viewed(flat: Tensor, like: Tensor) -> Tensor:
    """Real numbers ``[*batch, p]`` as tensors ``[*batch, *shape]`` of the shape, dtype and device of one."""
    if like.is_complex():
        flat = torch.view_as_complex(flat.unflatten(-1, (-1, 2)).double().clone(memory_format=torch.contiguous_format))
    return flat.reshape((*flat.shape[:-1], *like.shape)).to(like)
