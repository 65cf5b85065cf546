"""`Stochastic`: what the single-loop methods share: params in place, the step counter, exact resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solution import Result, Solution, SolveError, make_codes
from ..tree import Raveler, Tree, leaves, norm
from .oracles import Loss, Oracles, supply
from .schedule import StepSize, check_step_size, size_at

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


class Stochastic(ABC):
    """Base of the stochastic bilevel methods; used like a torch optimizer.

        min over x   f(y*(x), x),    y*(x) = argmin over y   g(y, x)

    with g the mean of ``inner_loss`` and f the mean of ``outer_loss`` over their data. ``step`` updates the given
    tensors in place. Directions follow the paper of each method; with u the solution of H u = grad_y f, the
    hypergradient is grad_x f - (d_x grad_y g)^T u.

    Args:
        inner_params, outer_params: y and x: trees of leaf tensors that require grad.
        inner_loss, outer_loss: ``loss(params, hparams, batch)``, a scalar; twice differentiable where the method
            takes Hessian products.
        inner_lr, outer_lr: step sizes: numbers, or functions of the step number such as `Decay`.

    Attributes:
        num_steps: steps made.
        inner_draws, outer_draws: independent batches that a step can use; see `Draws`.
        wants_full_batch: the next step of a variance-reduced method needs all the data (or a large batch).

    Raises:
        TypeError, ValueError: bad input, here or at the first step; the message names the argument.
    """

    inner_draws: int = 1
    outer_draws: int = 1

    def __init__(
        self,
        inner_params: Tree,
        outer_params: Tree,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        inner_lr: StepSize,
        outer_lr: StepSize,
    ):
        self._inner = check_params("inner_params", inner_params)
        self._outer = check_params("outer_params", outer_params)
        own = {"inner_params": self._inner, "outer_params": self._outer}
        if {id(leaf) for leaf in self._inner} & {id(leaf) for leaf in self._outer}:
            raise ValueError("outer_params shares a tensor with inner_params: each belongs to one of the two levels.")
        if self._inner[0].device != self._outer[0].device:
            raise ValueError(
                f"outer_params is on {self._outer[0].device}, inner_params on {self._inner[0].device}: put both on "
                "one device."
            )
        for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name} is a {type(loss).__name__}: a function loss(params, hparams, batch) is needed."
                )
        check_step_size("inner_lr", inner_lr)
        check_step_size("outer_lr", outer_lr)
        self.inner_lr, self.outer_lr = inner_lr, outer_lr
        self.num_steps = 0
        self._oracles = Oracles(Raveler(inner_params), Raveler(outer_params), inner_loss, outer_loss, own)
        self._state: State = {}
        self._memory: State = {}

    @property
    def wants_full_batch(self) -> bool:
        """Whether the next step should be given all the data; never for most methods."""
        return False

    def step(self, inner_batch: Any = None, outer_batch: Any = None) -> Step:
        """One step on these batches; None for losses that hold all their data.

        Raises:
            SolveError: an iterate became NaN or infinite. Params and state keep their last finite values.
        """
        return self._commit(supply(inner_batch), supply(outer_batch))

    @abstractmethod
    def _advance(self, now: State, inner: Iterator[Any], outer: Iterator[Any]) -> Advance:
        """The step of the paper: from the state to the next, drawing batches; changes nothing."""

    def _lr(self, name: str, step_size: StepSize) -> float:
        return size_at(name, step_size, self.num_steps)

    def _sizes(self) -> tuple[float, float]:
        return self._lr("inner_lr", self.inner_lr), self._lr("outer_lr", self.outer_lr)

    def _commit(self, inner: Iterator[Any], outer: Iterator[Any]) -> Step:
        oracles = self._oracles
        gradients, products = oracles.gradients, oracles.products
        # Cloned, because raveling a single tensor gives a view of it, and the params are about to change in place.
        now = {
            **self._state,
            "inner": oracles.inner.ravel(self._inner).detach().clone(),
            "outer": oracles.outer.ravel(self._outer).detach().clone(),
        }
        with torch.no_grad():
            found = self._advance(now, inner, outer)
            # One device-to-host copy a step: the last finite iterate is worth it.
            if not bool(torch.stack([torch.isfinite(vector).all() for vector in found.state.values()]).all()):
                raise self._failure(found)
            for params, raveler, name in ((self._inner, oracles.inner, "inner"), (self._outer, oracles.outer, "outer")):
                for leaf, value in zip(params, raveler.unravel(found.state[name]), strict=True):
                    leaf.copy_(value)
            if found.remember:
                found.remember()
        self._state = {name: vector for name, vector in found.state.items() if name not in ("inner", "outer")}
        self.num_steps += 1
        return Step(
            found.inner_loss,
            found.outer_loss,
            norm(found.inner),
            norm(found.outer),
            None if found.linear is None else norm(found.linear),
            oracles.gradients - gradients,
            oracles.products - products,
        )

    def _failure(self, found: Advance) -> SolveError:
        losses = {"inner_loss": found.inner_loss, "outer_loss": found.outer_loss}
        bad = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        cause = (
            f"{' and '.join(bad)} is NaN or infinite on this batch: look at the data, or at a loss that overflows"
            if bad
            else "the losses were finite, so the step was too long: lower inner_lr or outer_lr, or give a Decay"
        )
        size = torch.linalg.vector_norm(found.inner, dtype=torch.float64)
        stats = {
            "num_steps": torch.tensor(self.num_steps),
            "residual_norm": size,
            "result": make_codes(Result.NONFINITE, size),
        }
        kept = (
            self._oracles.inner.unflatten(self._inner),
            self._oracles.outer.unflatten(self._outer),
        )
        return SolveError(
            f"{type(self).__name__} met a NaN or an infinity at step {self.num_steps}; {cause}. The params hold their "
            "last finite values.",
            Solution(kept, stats),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes, the params too: tensors and ints, copied.

        Settings (step sizes, seeds) are not in it: make the method with the same ones, load, and the next step
        is the same to the last bit.
        """
        return {
            "num_steps": self.num_steps,
            "inner_params": [leaf.detach().clone() for leaf in self._inner],
            "outer_params": [leaf.detach().clone() for leaf in self._outer],
            "vectors": {name: vector.clone() for name, vector in self._state.items()},
            "memory": {name: table.clone() for name, table in self._memory.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: params are overwritten in place.

        Raises:
            ValueError: it belongs to other params; nothing is changed.
        """
        missing = {"num_steps", "inner_params", "outer_params", "vectors", "memory"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}: it is no state_dict of a stochastic method.")
        for name, own in (("inner_params", self._inner), ("outer_params", self._outer)):
            found, expected = [tuple(leaf.shape) for leaf in state[name]], [tuple(leaf.shape) for leaf in own]
            if found != expected:
                raise ValueError(f"state has {name} of shapes {found}, this method has {expected}.")
        with torch.no_grad():
            for leaf, value in zip(
                self._inner + self._outer, state["inner_params"] + state["outer_params"], strict=True
            ):
                leaf.copy_(value)
        device = self._inner[0].device
        self._state = {name: vector.clone().to(device) for name, vector in state["vectors"].items()}
        self._memory = {name: table.clone().to(device) for name, table in state["memory"].items()}
        self.num_steps = int(state["num_steps"])


def check_params(name: str, tree: Tree) -> list[Tensor]:
    """The leaves: floating-point leaf tensors that require grad, on one device."""
    flat = leaves(tree)
    if not flat:
        raise ValueError(f"{name} is empty: pass a tensor or a tree of tensors.")
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} contains a {type(leaf).__name__}: every leaf must be a tensor.")
        if not leaf.is_floating_point():
            raise TypeError(f"{name} contains a tensor of {leaf.dtype}: floating point is needed.")
        if not (leaf.is_leaf and leaf.requires_grad):
            raise ValueError(
                f"{name} contains a tensor of shape {tuple(leaf.shape)} that is no leaf that requires grad: it is "
                "updated in place. Pass module parameters, or tensor.detach().clone().requires_grad_()."
            )
        if leaf.device != flat[0].device:
            raise ValueError(f"{name} is spread over {flat[0].device} and {leaf.device}: put it on one device.")
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{name} contains NaN or infinite values.")
    if len({id(leaf) for leaf in flat}) < len(flat):
        raise ValueError(f"{name} contains the same tensor twice.")
    if sum(leaf.numel() for leaf in flat) == 0:
        raise ValueError(f"{name} holds no numbers.")
    return flat
