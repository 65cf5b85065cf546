"""A path of which few points are kept: the backward pass makes the others again, a part of the path at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import FunctionContext
from ..inner.steps import State
from ..recording import recording
from ..tree import norm
from .path import Randomness, Walk, no_forward_mode
from .seen import changed
from .statement import free_leaves


@dataclass(frozen=True)
class Spot:
    """A point from which steps can be made again: with the state of their rule, and of the random numbers, if any."""

    y: Tensor
    state: State
    random: Randomness | None

    def again(self) -> contextlib.AbstractContextManager[None]:
        """The steps that are made within draw what they drew first."""
        return contextlib.nullcontext() if self.random is None else self.random.again()


class Cotangent:
    """A cotangent of a point and its state, on its way back along the path.

    Attributes:
        grads: of the point, and of the state under each of its names.
        hparams: what stands for the hyperparameters in graphs; by_hparams: what has been gathered for each, or None.
        reached: the last point of the path.
    """

    def __init__(self, grads: Sequence[Tensor], hparams: Sequence[Tensor], reached: Tensor):
        self.grads = list(grads)
        self.hparams = free_leaves(hparams)
        self.by_hparams: list[Tensor | None] = [None] * len(hparams)
        self.reached = reached

    def check(self, y: Tensor, start: Tensor) -> None:
        """Look whether the last steps, made again from ``start``, led to the last point as they had.

        Raises:
            ObjectiveChangedError: they led to ``y``.
        """
        if recording():
            return
        allowed = torch.finfo(y.dtype).eps ** 0.75 * torch.maximum(norm(self.reached), norm(start))
        if bool((norm(y.detach() - self.reached) > allowed).any()):
            raise changed("objective")

    def move(self, grads: Sequence[Tensor | None], by_hparams: Sequence[Tensor | None]) -> None:
        """To before the steps that these were pulled over."""
        self.grads = [torch.zeros_like(old) if new is None else new for old, new in zip(self.grads, grads, strict=True)]
        self.by_hparams = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.by_hparams, by_hparams, strict=True)
        ]


@dataclass(frozen=True)
class Replay:
    """All steps of a walk, cut into parts, and each part into parts.

    Attributes:
        lengths: steps between the points that are kept of the whole walk; then of a part of it, while that is
            differentiated; and so on. A graph is made of as many steps at once as the last one says.
    """

    walk: Walk
    names: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return self.walk.steps.max_steps

    def starts(self, first: int, last: int, depth: int) -> range:
        """Where the parts of a part begin."""
        return range(first, last, self.lengths[depth])

    def needed(self, first: int, last: int, depth: int) -> set[int]:
        """The same, and where those of its last part begin, which is differentiated first."""
        if depth == len(self.lengths):
            return {first}
        starts = self.starts(first, last, depth)
        return {*starts, *self.needed(starts[-1], last, depth + 1)}

    def spot(self, y: Tensor, state: State) -> Spot:
        return Spot(y, state, Randomness.now(y) if self.walk.draws else None)

    def run(self, spot: Spot, first: int, last: int, keep: set[int], g: Tensor | None = None) -> dict[int, Spot]:
        """The spots to keep, and the last one; without a graph. ``g`` is the gradient at the first, where known."""
        kept, y, state, hparams = {}, spot.y, spot.state, self.walk.hparams
        with torch.no_grad():
            for index in range(first, last):
                if index in keep:
                    kept[index] = self.spot(y, state)
                if g is not None and index == first:
                    y, state = self.walk.ruled(y, g, state, hparams, index)
                else:
                    y, state = self.walk.eager_step(y, state, hparams, index, create_graph=False)
        return {**kept, last: self.spot(y, state)}

    def pull(self, spots: dict[int, Spot], first: int, last: int, depth: int, at: Cotangent) -> None:
        """Take the cotangent from behind the steps from ``first`` to ``last`` to before them."""
        if depth == len(self.lengths):
            self.pull_steps(spots[first], first, last, at)
            return
        needed = self.needed(first, last, depth)
        if not needed <= spots.keys():
            with spots[first].again():
                spots = self.run(spots[first], first, max(needed), needed)
        for start in reversed(self.starts(first, last, depth)):
            self.pull(spots, start, min(start + self.lengths[depth], last), depth + 1, at)
            spots = {index: spot for index, spot in spots.items() if index < start}

    def pull_steps(self, spot: Spot, first: int, last: int, at: Cotangent) -> None:
        """The same over the graph of these steps."""
        operands = free_leaves([spot.y, *spot.state.values()])
        y, state = operands[0], dict(zip(self.names, operands[1:], strict=True))
        with torch.enable_grad(), spot.again():
            for index in range(first, last):
                y, state = self.walk.eager_step(y, state, at.hparams, index, create_graph=True)
        if last == self.num_steps:  # an objective that has changed is seen in any step
            at.check(y, spot.y)
        pairs = [(out, g) for out, g in zip((y, *state.values()), at.grads, strict=True) if out.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(outputs, [*operands, *at.hparams], grads, allow_unused=True)
        at.move(pulled[: len(operands)], pulled[len(operands) :])

    def pull_differentiably(
        self, spot: Spot, operands: Sequence[Tensor], reached: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The same of all steps at once towards the operands of `Replayed`, to be differentiated again."""

        def run(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            state, hparams = dict(zip(self.names, rest, strict=False)), list(rest[len(self.names) :])
            for index in range(self.num_steps):
                y, state = self.walk.step(y, state, hparams, index)
            return (y, *(state[name] for name in self.names))

        with spot.again():
            outputs, pull = torch.func.vjp(run, *operands)  # type: ignore[misc]
        Cotangent(grads, (), reached).check(outputs[0], operands[0])
        pulled: tuple[Tensor, ...] = pull(tuple(grads))
        return pulled


class Replayed(torch.autograd.Function):
    """The last point and state of a walk, from its first point and state and from the hyperparameters."""

    @staticmethod
    def forward(ctx: FunctionContext, replay: Replay, g: Tensor | None, y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        first = replay.spot(y, dict(zip(replay.names, rest, strict=False)))
        kept = replay.run(first, 0, replay.num_steps, replay.needed(0, replay.num_steps, 0), g)
        last = kept.pop(replay.num_steps)
        outputs = tuple(out.clone() for out in (last.y, *last.state.values()))
        ctx.replay, ctx.randoms = replay, {index: spot.random for index, spot in kept.items()}
        points = [tensor for spot in kept.values() for tensor in (spot.y, *spot.state.values())]
        ctx.save_for_backward(*points, outputs[0], y, *rest)
        return outputs

    @staticmethod
    def backward(ctx: FunctionContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        replay, saved, width = ctx.replay, iter(ctx.saved_tensors), 1 + len(ctx.replay.names)
        spots = {}
        for index, random in ctx.randoms.items():
            y, *state = (next(saved) for _ in range(width))
            spots[index] = Spot(y, dict(zip(replay.names, state, strict=True)), random)
        reached, *operands = saved
        if torch.is_grad_enabled():
            return None, None, *replay.pull_differentiably(spots[0], operands, reached, grads)
        at = Cotangent(grads, replay.walk.hparams, reached)
        replay.pull(spots, 0, replay.num_steps, 0, at)
        return None, None, *at.grads, *at.by_hparams

    @staticmethod
    def jvp(ctx: FunctionContext, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise no_forward_mode("Unroll(checkpoint=..., mode=...)")
