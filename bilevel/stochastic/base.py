"""`Stochastic`: what the single-loop methods share: params in place, the step counter, exact resume."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..solution import Result, Solution, SolveError, make_codes
from ..tree import Raveler, Tree, named_leaves, norm
from .divergence import Growth, Seen, complaints
from .oracles import Batch, Loss, Oracles, batches_of, supply
from .params import check_params, copies, copy_into
from .schedule import StepSize, check_positive, size_at
from .state import Layout, blank, check_state

State = dict[str, Tensor]
"""The vectors of a method: ``inner`` [n], ``outer`` [m], and those of its own."""


@dataclass(frozen=True)
class Step:
    """What one step saw, before it moved; 0-d tensors, so that nothing waits for the device.

    Attributes:
        inner_loss, outer_loss: on the batches of this step.
        inner_norm, outer_norm: norms of the directions of the inner and outer variables, float64.
        linear_norm: of the direction of the linear system; None where the method keeps no adjoint.
        gradients, products: gradients and Hessian-vector (or cross) products computed, each on one batch.
    """

    inner_loss: Tensor
    outer_loss: Tensor
    inner_norm: Tensor
    outer_norm: Tensor
    linear_norm: Tensor | None = None
    gradients: int = 0
    products: int = 0


@dataclass(frozen=True)
class Advance:
    """A step as a method computes it: the losses, the directions that it took, and the state it leads to."""

    state: State
    inner_loss: Tensor
    outer_loss: Tensor
    inner: Tensor
    outer: Tensor
    linear: Tensor | None = None
    remember: Callable[[], None] | None = None
    """Run once the state has been found finite: writes to `Stochastic._memory`, which is too large to copy."""


FIXED = ("inner_params", "outer_params", "inner_loss", "outer_loss")
"""What a method is made of; the rest are settings, which may change."""

STEP_SIZES = ("inner_lr", "linear_lr", "outer_lr")


@dataclass(eq=False, repr=False)
class Stochastic(ABC):
    """Base of the stochastic bilevel methods.

        min over x   f(y*(x), x),    y*(x) = argmin over y   g(y, x)

    with g the mean of ``inner_loss`` and f the mean of ``outer_loss`` over their data. ``step`` updates the given
    tensors in place, as a torch optimizer does, but takes the losses and the batches: it computes the gradients itself.
    Directions follow the paper of each method; with u the solution of H u = grad_y f, the hypergradient is
    grad_x f - (d_x grad_y g)^T u.

    A method is no `torch.optim.Optimizer`: it has no ``param_groups`` to which a scheduler of torch could be attached.
    Step sizes are functions of the step number instead: `Decay`, your own, or `TorchSchedule`, which has the sizes of
    any scheduler of torch. They may be 0, or end at 0, and may be set between two steps (``method.inner_lr = 0.01``).

    Every batch counts alike: losses are means over their batch, so in an epoch whose last batch is short the examples
    of that batch count more. To weigh all examples alike, leave that batch out (``drop_last=True`` of a ``DataLoader``
    that shuffles), divide the sum over a batch by the average size, ``losses.sum() * num_batches / num_examples``, or
    take `SABA` with the sizes of the batches.

    Args:
        inner_params, outer_params: y and x: trees of leaf tensors that require grad.
        inner_loss, outer_loss: ``loss(params, hparams, batch)``, a scalar; twice differentiable where the method
            takes Hessian products.
        inner_lr, outer_lr: step sizes, 0 or more: numbers, or functions of the step number such as `Decay`. Where
            nothing is known of the problem, those of `step_sizes`.
        longest_move: how far one step may move a level, relative to one plus its norm; a step that would move one
            farther is shortened, for both levels and the adjoint alike. None: as far as it goes. With it a step that is
            too long, or an adjoint that grows by negative curvature, throws no iterate away.

    Attributes:
        num_steps: steps made.
        inner_draws, outer_draws: independent batches that a step can use; see `Draws`.
        wants_full_batch: the next step of a variance-reduced method needs all the data (or a large batch).

    Raises:
        TypeError, ValueError: bad input, here or at the first step; the message names the argument.
    """

    inner_params: Tree
    outer_params: Tree
    inner_loss: Loss
    outer_loss: Loss
    inner_lr: StepSize = field(kw_only=True)
    outer_lr: StepSize = field(kw_only=True)
    longest_move: float | None = field(kw_only=True, default=None)
    num_steps: int = field(init=False, default=0)

    _kept: ClassVar[tuple[str, ...]] = ()
    """The vectors of `State` that stay from one step to the next; of those of the outer variables the name says so."""
    _fixed_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that are taken when the method is made."""

    def __post_init__(self) -> None:
        self._inner = check_params("inner_params", self.inner_params)
        self._outer = check_params("outer_params", self.outer_params)
        own = {"inner_params": self._inner, "outer_params": self._outer}
        if {id(leaf) for leaf in self._inner} & {id(leaf) for leaf in self._outer}:
            raise ValueError("outer_params shares a tensor with inner_params: each belongs to one of the two levels.")
        if self._inner[0].device != self._outer[0].device:
            raise ValueError(
                f"outer_params is on {self._outer[0].device}, inner_params on {self._inner[0].device}: put both on "
                "one device."
            )
        for name, loss in (("inner_loss", self.inner_loss), ("outer_loss", self.outer_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name} is a {type(loss).__name__}: a function loss(params, hparams, batch) is needed."
                )
        self._state: State = {}
        self._memory: State = {}
        self._growth = Growth({})
        self._check()
        self._step_sizes()
        ravelers = Raveler(self.inner_params), Raveler(self.outer_params)
        self._oracles = Oracles(*ravelers, self.inner_loss, self.outer_loss, own)

    def _check(self) -> None:
        """Refuse settings that mean nothing; the step sizes are looked at where they are used."""
        if self.longest_move is not None:
            check_positive("longest_move", self.longest_move)

    def __setattr__(self, name: str, value: object) -> None:
        made = "_oracles" in self.__dict__
        if made and name in (*FIXED, *self._fixed_settings):
            raise AttributeError(
                f"{name} is taken when the method is made, and another one would not be used: make a new "
                f"{type(self).__name__}, which can go on with load_state_dict(method.state_dict())."
            )
        if not made or name not in self.__dataclass_fields__ or not self.__dataclass_fields__[name].init:
            super().__setattr__(name, value)
            return
        before = getattr(self, name)
        super().__setattr__(name, value)
        try:
            self._check()
            if name in STEP_SIZES:
                self._lr(name)
        except BaseException:
            super().__setattr__(name, before)
            raise

    @property
    def inner_draws(self) -> int:
        """Independent batches of the inner data that a step can use."""
        return self._draws()[0]

    @property
    def outer_draws(self) -> int:
        """Independent batches of the outer data that a step can use."""
        return self._draws()[1]

    def _draws(self) -> tuple[int, int]:
        """The two numbers of draws: one of each for most methods."""
        return 1, 1

    @property
    def wants_full_batch(self) -> bool:
        """Whether the next step should be given all the data; never for most methods."""
        return False

    def step(self, inner_batch: Batch = None, outer_batch: Batch = None) -> Step:
        """One step on these batches; None for losses that hold all their data.

        A step that raises, for whatever reason, has changed nothing: params, state, counters and the random numbers of
        torch are as before, so that it can be tried again, with another batch or with smaller step sizes.

        Raises:
            SolveError: an iterate became NaN or infinite, or the steps are too long and the iterates grow: the
                message tells this from a bad batch.
        """
        oracles, costs = self._oracles, (self._oracles.gradients, self._oracles.products)
        random = _random_states(self._inner[0].device)
        try:
            with torch.no_grad():
                # Cloned: raveling a single tensor gives a view of it, and the params are about to change in place.
                now = {
                    **self._state,
                    "inner": oracles.inner.ravel(self._inner).detach().clone(),
                    "outer": oracles.outer.ravel(self._outer).detach().clone(),
                }
                found = self._shortened(now, self._advance(now, supply(inner_batch), supply(outer_batch)))
                gradients, products = oracles.gradients - costs[0], oracles.products - costs[1]
                record = _record(found, gradients, products)
                growth = self._judge(now, found, record, batches_of(inner_batch), batches_of(outer_batch))
                self._commit(now, found)
        except BaseException:
            oracles.gradients, oracles.products = costs
            for restore, state in random:
                restore(state)
            raise
        self._growth = growth
        return record

    @abstractmethod
    def _advance(self, now: State, inner: Iterator[Batch], outer: Iterator[Batch]) -> Advance:
        """The step of the paper: from the state to the next, drawing batches; changes nothing."""

    def _shortened(self, now: State, found: Advance) -> Advance:
        """The same, or where it moves a level too far a part of it, with as much less of the adjoint."""
        if self.longest_move is None:
            return found
        moves = {name: found.state[name] - now[name] for name in ("inner", "outer")}
        part = torch.ones((), dtype=torch.float64, device=moves["inner"].device)
        for name, move in moves.items():
            part = torch.minimum(part, self.longest_move * (1 + norm(now[name])) / norm(move))
        part = part.nan_to_num(1.0)  # no move at all
        state = {**found.state, **{name: now[name] + part.to(move.dtype) * move for name, move in moves.items()}}
        if "adjoint" in state:
            state["adjoint"] = part.to(state["adjoint"].dtype) * state["adjoint"]
        return replace(found, state=state)

    def _lr(self, name: str) -> float:
        """The step size of this name now; ``linear_lr`` is that of the inner level where none was given."""
        step_size = getattr(self, name)
        return size_at(name, self.inner_lr if step_size is None else step_size, self.num_steps)

    def _sizes(self) -> tuple[float, float]:
        return self._lr("inner_lr"), self._lr("outer_lr")

    def _step_sizes(self) -> dict[str, float]:
        """All of this method, checked."""
        return {name: self._lr(name) for name in STEP_SIZES if hasattr(self, name)}

    def _judge(self, now: State, found: Advance, record: Step, inner: list[Batch], outer: list[Batch]) -> Growth:
        """The growth with this step; one device-to-host copy, which the last finite iterate is worth."""
        directions = {"inner": (record.inner_norm, "inner"), "outer": (record.outer_norm, "outer")}
        if record.linear_norm is not None:
            directions["linear"] = (record.linear_norm, "adjoint")
        length = torch.linalg.vector_norm
        sizes = [
            size
            for direction, name in directions.values()
            for size in (direction, length(found.state[name] - now.get(name, 0.0)), length(found.state[name]))
        ]
        finite = torch.stack([torch.isfinite(vector).all() for vector in found.state.values()]).all()
        numbers = torch.stack([n.double() for n in (finite, found.inner_loss, found.outer_loss, *sizes)]).tolist()
        bad = partial(complaints, self._oracles, now["inner"], now["outer"], inner, outer, record.products > 0)
        if not numbers[0]:
            raise self._failure(found, bad())
        seen, losses = {}, {"inner": numbers[1], "outer": numbers[2]}
        for place, name in enumerate(directions, start=1):
            steepness, move, size = numbers[3 * place : 3 * place + 3]
            seen[name] = Seen(steepness, move, size, losses.get(name), 0.0 if name == "linear" else 1 + size)
        growth = self._growth.after(seen)
        if growth.diverges:
            self._growth = Growth({})  # what is tried next, such as smaller steps, is judged by itself
            raise self._failure(found, [], growth)
        if not (math.isfinite(losses["inner"]) and math.isfinite(losses["outer"])):
            raise self._failure(found, bad())
        return growth

    def _commit(self, now: State, found: Advance) -> None:
        """Everything that a step changes, or nothing of it."""
        oracles = self._oracles
        params = [(self._inner, oracles.inner, "inner"), (self._outer, oracles.outer, "outer")]
        values = [raveler.unravel(found.state[name]) for _, raveler, name in params]
        try:
            for (own, _, _), new in zip(params, values, strict=True):
                copy_into(own, new)
            if found.remember:
                found.remember()
        except BaseException:  # such as Ctrl-C
            for own, raveler, name in params:
                copy_into(own, raveler.unravel(now[name]))
            raise
        self._state = {name: found.state[name] for name in self._kept}
        self.num_steps += 1

    def _failure(self, found: Advance, bad: list[str], growth: Growth | None = None) -> SolveError:
        sizes = ", ".join(f"{name} = {size:.4g}" for name, size in self._step_sizes().items())
        advice = f"the steps are too long ({sizes}): lower them, give a Decay, or take what step_sizes(...) measures"
        kind, number = type(self).__name__, self.num_steps
        if growth:
            message = f"{kind} diverges at step {number}: {growth}, and {advice}. The params hold the step before."
        else:
            grown = f"{self._growth} before it, and " if self._growth.runs else ""
            cause = "; ".join(bad) or f"the losses are finite at params of unit norm, {grown}{advice}"
            message = f"{kind} met a NaN or an infinity at step {number}; {cause}. The params hold their last values."
        size = norm(found.inner)
        stats = {
            "num_steps": torch.tensor(number, device="cpu"),
            "residual_norm": size,
            "result": make_codes(Result.NONFINITE if bad else Result.DIVERGED, size),
        }
        kept = self._oracles.inner.unflatten(self._inner), self._oracles.outer.unflatten(self._outer)
        return SolveError(message, Solution(kept, stats))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes, the params too: tensors, numbers and names, copied.

        Settings (step sizes, seeds) are not in it: make the method with the same ones, load, and the next step
        is the same to the last bit.
        """
        return {
            **self._fixed(),
            "num_steps": self.num_steps,
            "inner_params": [leaf.detach().clone() for leaf in self._inner],
            "outer_params": [leaf.detach().clone() for leaf in self._outer],
            "vectors": copies(self._state),
            "memory": copies(self._memory),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: params are overwritten in place.

        Raises:
            ValueError: it belongs to another method, to other params (names, order, shapes or dtypes), or to data in
                other batches; nothing is changed.
        """
        params: dict[str, Layout] = {
            level: {name: blank(leaf) for name, leaf in tensors.items()} for level, tensors in self._named().items()
        }
        check_state(state, self._fixed(), params, {"vectors": self._vectors(), "memory": self._tables()})
        device = self._inner[0].device
        vectors, memory = (
            {name: value.detach().to(device, copy=True) for name, value in state[part].items()}
            for part in ("vectors", "memory")
        )
        with torch.no_grad():
            copy_into(self._inner + self._outer, [*state["inner_params"], *state["outer_params"]])
        self._state, self._memory, self.num_steps, self._growth = vectors, memory, state["num_steps"], Growth({})

    def _named(self) -> dict[str, dict[str, Tensor]]:
        """The params of both levels, by where they stand in their trees."""
        return {"inner_params": named_leaves(self.inner_params), "outer_params": named_leaves(self.outer_params)}

    def _fixed(self) -> dict[str, Any]:
        """What must be the same in the method that a state is loaded into."""
        return {"method": type(self).__name__, "names": {level: list(own) for level, own in self._named().items()}}

    def _vectors(self) -> Layout:
        """What of `State` is kept."""
        inner, outer = (
            torch.empty(raveler.size, dtype=raveler.dtype, device="meta")
            for raveler in (self._oracles.inner, self._oracles.outer)
        )
        return {name: outer if name.startswith("outer") else inner for name in self._kept}

    def _tables(self) -> Layout:
        """What of `_memory` is kept; nothing, for most methods."""
        return {}


def _record(found: Advance, gradients: int, products: int) -> Step:
    linear = None if found.linear is None else norm(found.linear)
    return Step(found.inner_loss, found.outer_loss, norm(found.inner), norm(found.outer), linear, gradients, products)


def _random_states(device: torch.device) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """What a loss may draw from: the random numbers of the CPU and of the params' device, and how to set them back."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        states.append((partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)))
    return states
