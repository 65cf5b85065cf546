"""The inner problem as its solvers see it: a flat vector in, losses and gradients of the batch shape out."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import string_at
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import get_device_states

from ._torch import pull, pytree, sequence_number
from .checks import refuse_mps
from .closure import STAND_IN, Autocast, Tracer, sparing, without_graph
from .context import UNCOMPILED
from .ranks import SAME_START, Ranks, Watch, check_settings, is_ignored
from .reach import Reach
from .recording import free_looks, recording
from .solution import NonFiniteError
from .spared import Spared
from .tree import Raveler, Tree, filled, is_continuous, leaves

Objective = Callable[..., Tensor]
"""``objective(params, *args)``: a scalar for one problem, a vector ``[T]`` for T independent problems."""

Shrink = Callable[[Tensor, Tensor], Tensor]
"""``(z [*batch, n], step [*batch]) -> prox(z, step)``."""


@dataclass(frozen=True)
class Evaluation:
    """Losses ``f`` of shape ``[*batch]`` and gradients ``g`` of shape ``[*batch, n]`` at the point ``y``."""

    y: Tensor
    f: Tensor
    g: Tensor

    def detach(self) -> Evaluation:
        return Evaluation(self.y.detach(), self.f.detach(), self.g.detach())


@dataclass(frozen=True)
class Linearization:
    """The residual with its graph towards ``leaves``: what implicit differentiation sees of a problem.

    The residual of `argmin` is the gradient of ``loss``; a `root` has no loss. ``hparams`` are the leaves that
    stand for the tensors that the problem captured, where it was linearized for the hypergradient.
    """

    leaves: list[Tensor]
    loss: Tensor | None
    residual: list[Tensor]
    hparams: list[Tensor] = field(default_factory=list)

    def pull(self, u: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor | None]:
        """``-(d_x r)^T u`` for each of ``hparams``; None where it does not require grad or has no influence."""
        wanted = [index for index, tensor in enumerate(self.hparams) if tensor.requires_grad]
        pairs = [(r, -v) for r, v in zip(self.residual, u, strict=True) if r.requires_grad]
        pulled: list[Tensor | None] = [None] * len(self.hparams)
        if wanted and pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            inputs = [self.hparams[index] for index in wanted]
            grads = pull(outputs, inputs, cotangents, retain_graph=retain_graph)
            for index, grad in zip(wanted, grads, strict=True):
                pulled[index] = grad
        return pulled


class Problem:
    """An objective, its start and its batch shape, checked once.

    Attributes:
        draws: the objective drew random numbers, or another thread did meanwhile.
        ranks: those over which the objective is summed, or None.

    Raises:
        TypeError: ``init`` holds something other than real floating-point tensors.
        ValueError: ``init`` is empty or not finite, the objective has a wrong shape, no gradient path to
            ``init``, or is not finite at ``init``.
    """

    def __init__(
        self,
        objective: Objective,
        init: Tree,
        args: tuple[Tree, ...] = (),
        *,
        differentiable: bool = False,
        max_batch_dims: int = 1,
        tracer: Tracer | None = None,
    ):
        check_init(init)
        self.objective, self.args, self.differentiable = objective, args, differentiable
        self.autocast = Autocast.current(leaves(init)[0].device)
        self.spared = tracer.spared if tracer else Spared()
        with torch.enable_grad():
            point = [
                # An alias: the objective may capture the same parameters, as a proximal term does.
                leaf.view_as(leaf) if differentiable and leaf.requires_grad else _stand_in(leaf)
                for leaf in leaves(init)
            ]
            if tracer:
                tracer.know(point)
                tracer.note(args)
            before = _generators(point[0])
            with self.autocast.evaluating(), tracer or contextlib.nullcontext(), Watch() as watch:
                loss = objective(pytree.tree_unflatten(point, pytree.tree_structure(init)), *args)
            self.ranks = watch.ranks
            _check_ranks(watch.ranks, point, args)
            self.differentiates = tracer is not None and tracer.differentiates
            self.draws = before != _generators(point[0])
            check_loss(loss, init, max_batch_dims)
            if tracer and tracer.differentiable and not tracer.captured:
                refuse_hidden(graph_nodes([loss]), point)
            self.raveler = Raveler(init, loss.shape)
            grads = gradient(loss, point, create_graph=differentiable)
            if tracer and not recording():
                tracer.reads.warn_forgotten(init, lambda: self._loss(point))
            start = Evaluation(self.raveler.ravel(point).clone(), loss.double(), self.raveler.ravel(grads))
        self.start = start if differentiable else start.detach()
        self.reach: Reach | None = None  # what the gradient of an unrolled solution reaches
        self.hparams: list[Tensor] = []  # the tensors among them that were found
        self.shrink: Shrink | None = None  # the prox of a composite problem
        self.terms: Any = None  # the residuals of a problem of least squares
        self.init = pytree.tree_map(torch.Tensor.detach, init)  # with its graph, all earlier solves would stay alive
        if free_looks(self.start.f):
            self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Look whether the losses at the start are finite. Where a look is not free, a solve that went wrong asks.

        Raises:
            NonFiniteError: they are not; where failures are ignored, those of no problem are.
        """
        if _is_lost(torch.isfinite(self.start.f)):
            raise NonFiniteError(blame_nonfinite("objective", self.init, self.args))

    @property
    def first_residual(self) -> Tensor:
        """The gradient at the start, ``[*batch, n]``."""
        return self.start.g

    def evaluate(self, y: Tensor) -> Evaluation:
        """Losses and gradients at ``y``; with a graph only for a differentiable (unrolled) problem."""
        with torch.enable_grad():
            if not (self.differentiable and y.requires_grad):
                y = _stand_in(y)
            with UNCOMPILED if self.differentiable else contextlib.nullcontext():
                loss, grads = self._gradient(y)
            g = self.raveler.ravel(grads)
        found = Evaluation(y, loss.double(), g)
        return found if self.differentiable else found.detach()

    def in_numbers(self, y: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and the gradient at ``y``, of one problem on the host; all in float64."""
        with torch.enable_grad():
            loss, grads = self._gradient(_stand_in(torch.from_numpy(y).to(self.raveler.dtype)))
        parts = [grad.to(self.raveler.dtype).numpy(force=True).ravel() for grad in grads]  # NumPy has no bfloat16
        g = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return float(loss.detach()), g.astype(np.float64, copy=False)

    def _gradient(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The losses at a vector that requires grad, and the gradient leaf by leaf."""
        point = self.raveler.unravel(y)
        loss = self._loss(point)
        return loss, gradient(loss, point, create_graph=self.differentiable)

    def losses(self, y: Tensor) -> Tensor:
        """Losses at ``y`` without a graph, at a third of the cost of `evaluate`."""
        with torch.enable_grad():  # an objective may take gradients itself
            return self._loss(self.raveler.unravel(_stand_in(y))).detach().double()

    @property
    def tree(self) -> Tree:
        """The start as the tree that it is, detached."""
        return self.raveler.unflatten(self.raveler.unravel(self.start.y.detach()))

    def residual_at(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient at ``y``, whose norm says how far the solve came, and the losses; both without a graph."""
        at = self.evaluate(y).detach()
        return at.g, at.f

    def linearize(self, y: Tensor, create_graph: bool = True) -> Linearization:
        """The gradient at ``y`` with its graph towards ``y`` and everything that the objective captured."""
        with UNCOMPILED:
            return linearize_objective(self._loss, self.raveler.unravel(y), create_graph=create_graph)

    def sum_loss(self, *point: Tensor) -> Tensor:
        """The summed loss as a function of the leaves, for `torch.func`."""
        with UNCOMPILED:
            return self._loss(list(point)).sum()

    def loss(self, params: Tree) -> Tensor:
        """The losses at a tree of params."""
        return self.under_rules(self.objective, params)

    def under_rules(self, function: Callable[..., Tensor], params: Tree) -> Tensor:
        """A function of params and args, evaluated as the objective is."""
        with self.autocast.evaluating(), sparing(self.spared):
            return function(params, *self.args)

    def _loss(self, point: Sequence[Tensor]) -> Tensor:
        return self.loss(self.raveler.unflatten(point))


def _is_lost(finite: Tensor) -> bool:
    """Whether to give a solve up: one of its problems cannot begin; with ``throw="ignore"``, none of them can."""
    return not bool(finite.any() if is_ignored() else finite.all())


def _check_ranks(ranks: Ranks | None, point: Sequence[Tensor], args: tuple[Tree, ...]) -> None:
    """Where a problem is summed over ranks, all have to begin with the same params and hyperparameters."""
    if ranks is not None and not recording():
        check_settings(ranks)
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]
        ranks.check_same([*point, *tensors], SAME_START)


def _generators(like: Tensor) -> list[Any]:
    """The states of the global generators of random numbers; none while a recording is made, which cannot look."""
    if recording():
        return []
    kind = like.device.type
    others = get_device_states(like)[1] if kind != "cpu" and hasattr(torch, kind) else []
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (users do)
    words, place = numpy["state"]["key"].tobytes(), (numpy["state"]["pos"], numpy["has_gauss"])
    states = [torch.get_rng_state(), *others]
    # Read without an operation, which a mode around the solve would see.
    return [*(string_at(state.data_ptr(), state.nbytes) for state in states), words, place, random.getstate()]


def linearize_objective(
    loss_at: Callable[[Sequence[Tensor]], Tensor], point: Sequence[Tensor], *, create_graph: bool = True
) -> Linearization:
    """The gradient of ``loss_at`` as the residual, with its graph."""
    with torch.enable_grad():
        free = [leaf.detach().requires_grad_() for leaf in point]
        loss = loss_at(free)
        return Linearization(free, loss, gradient(loss, free, create_graph=create_graph))


class RootProblem:
    """A square residual ``r(y) = 0``, its start and its batch shape, checked once.

    Args:
        batch_dims: how many leading dimensions of every leaf count independent problems.

    Raises:
        TypeError, ValueError: as `Problem`; also where ``residual(init)`` is not a tree like ``init``.
    """

    def __init__(
        self,
        residual: Callable[..., Tree],
        init: Tree,
        args: tuple[Tree, ...] = (),
        *,
        batch_dims: int = 0,
        tracer: Tracer | None = None,
    ):
        check_init(init)
        self.residual, self.args = residual, args
        self.autocast = Autocast.current(leaves(init)[0].device)
        self.raveler = Raveler(init, check_batch(init, batch_dims))
        self.spared = tracer.spared if tracer else Spared()
        differentiable = tracer is not None and tracer.differentiable
        with torch.set_grad_enabled(differentiable or torch.is_grad_enabled()):  # a residual may take gradients itself
            point = [leaf.detach().requires_grad_(torch.is_grad_enabled()) for leaf in leaves(init)]
            if tracer:
                tracer.know(point)
                tracer.note(args)
            with self.autocast.evaluating(), tracer or contextlib.nullcontext(), Watch() as watch:
                found = residual(self.raveler.unflatten(point), *args)
            check_residual(found, init)
            self.ranks = watch.ranks
            _check_ranks(watch.ranks, point, args)
            if tracer and tracer.differentiable and not tracer.captured:
                refuse_hidden(graph_nodes(leaves(found)), point)
        self.differentiates = tracer is not None and tracer.differentiates
        self.data: Any = None  # what a solver of a special form needs beside the residual
        self.y = self.raveler.ravel(point).detach().clone()
        self.r = self.raveler.ravel(leaves(found)).detach()
        self.init = pytree.tree_map(torch.Tensor.detach, init)
        if free_looks(self.r):
            self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Look whether the residual at the start is finite; as `Problem.refuse_nonfinite`."""
        if _is_lost(torch.isfinite(self.r).all(-1)):
            raise NonFiniteError(blame_nonfinite("residual", self.init, self.args))

    @property
    def first_residual(self) -> Tensor:
        """The residual at the start, ``[*batch, n]``."""
        return self.r

    def evaluate(self, y: Tensor) -> Tensor:
        """The residual at ``y``, both ``[*batch, n]``."""
        if self.differentiates:
            found: Tensor = without_graph(lambda point: self.flat_residual(*point), [y])
            return found
        with torch.no_grad():
            return self.flat_residual(y)

    def flat_residual(self, y: Tensor) -> Tensor:
        """The residual at ``y`` with whatever graph ``y`` asks for, both ``[*batch, n]``."""
        return self.raveler.ravel(self._residual(self.raveler.unravel(y)))

    def residual_at(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual at ``y``, and no losses; as `Problem.residual_at`."""
        return self.evaluate(y), None

    def linearize(self, y: Tensor) -> Linearization:
        """The residual at ``y`` with its graph towards ``y``."""
        with UNCOMPILED:
            return linearize_residual(self._residual, self.raveler.unravel(y))

    def under_rules(self, function: Callable[..., Tree], params: Tree) -> Tree:
        """A function of unknowns and args, evaluated as the residual is."""
        with self.autocast.evaluating(), sparing(self.spared):
            return function(params, *self.args)

    def _residual(self, point: Sequence[Tensor]) -> list[Tensor]:
        return leaves(self.under_rules(self.residual, self.raveler.unflatten(point)))


if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultTypeVar

    Posed = DefaultTypeVar("Posed", bound=Problem | RootProblem, default=Any)
else:
    Posed = TypeVar("Posed")


def linearize_residual(
    residual_at: Callable[[Sequence[Tensor]], list[Tensor]], point: Sequence[Tensor]
) -> Linearization:
    """A residual with its graph."""
    with torch.enable_grad():
        free = [leaf.detach().requires_grad_() for leaf in point]
        return Linearization(free, None, residual_at(free))


def graph_nodes(tensors: Iterable[Tensor], since: int = 0) -> Iterator[Node]:
    """Every node of the autograd graphs of these tensors, once; only those made from a sequence number on."""
    stack = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen and sequence_number(node) >= since:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


def refuse_hidden(nodes: Iterable[Node], known: Sequence[Tensor]) -> None:
    """Raise where a graph reaches a tensor that requires grad and that closure conversion has not seen."""
    variable = other_variable(nodes, known)
    if variable is not None:
        raise ValueError(
            f"The inner problem depends on a tensor of shape {tuple(variable.shape)} that requires grad, in a way "
            "that cannot be followed (as operand of a custom autograd Function, in compiled code, or by a value that "
            "was computed from it in an earlier evaluation and kept, as by a cache), so its hypergradient would be "
            "missing. Pass the tensor as one of args, compute from it anew, or detach it if no gradient is wanted. "
            "Within torch.nn.utils.parametrize.cached(), call the module once before the solve. "
            "Where several threads call one module, take bilevel.nn.functional_call: with that of torch.func each "
            "sees the tensors of the others."
        )


def other_variable(nodes: Iterable[Node], known: Sequence[Tensor]) -> Tensor | None:
    """The first tensor of the user's that a graph accumulates gradients for and that is not one of ``known``."""
    own = {id(tensor) for tensor in known}
    variables = (getattr(node, "variable", None) for node in nodes)
    others = (variable for variable in variables if variable is not None and id(variable) not in own)
    return next((variable for variable in others if not hasattr(variable, STAND_IN)), None)


def _stand_in(point: Tensor) -> Tensor:
    leaf = point.detach().requires_grad_()
    setattr(leaf, STAND_IN, True)
    return leaf


def gradient(loss: Tensor, point: list[Tensor], create_graph: bool) -> list[Tensor]:
    """The gradients of the summed losses by leaves, zero where they don't reach a leaf.

    Raises:
        ValueError: they reach none.
    """
    if not loss.requires_grad:
        raise ValueError(
            "objective has no gradient path to init: its result does not depend on the params that it is given. "
            "Compute the loss from the argument (functional_call(module, params, ...)), and neither detach it nor "
            "run under no_grad."
        )
    grads = pull([loss], point, [torch.ones_like(loss)], create_graph=create_graph)
    if all(grad is None for grad in grads):
        raise ValueError(
            "objective has no gradient path to init: its result depends on other tensors only. Compute the loss "
            "from the params that the objective is given, not from the module's own."
        )
    return filled(grads, point)


def gradient_or_zero(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """The gradients of a scalar, zero where they do not reach: it may depend on none of them."""
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return filled(grads, wanted)


def check_init(init: Tree) -> None:
    flat = leaves(init)
    if not flat:
        raise ValueError("init is empty: there is nothing to minimise over. Pass a tensor or a tree of tensors.")
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"init contains a {type(leaf).__name__}: every leaf must be a tensor.")
        if hasattr(leaf, "device_mesh"):
            raise NotImplementedError(
                "init contains a DTensor, parameters in shards as FSDP2 makes them: solvers here work on whole "
                "vectors. Keep the params whole on every rank and put the data in shards "
                "(bilevel.distributed.sharded); docs/scaling.md says what sharded params would take."
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"init contains a tensor of {leaf.dtype}: only real floating-point params can be optimised. "
                "Convert it with .float(), or keep it out of init and let the objective capture it."
            )
        if leaf.layout != torch.strided or leaf.element_size() == 1:
            raise TypeError(
                f"init contains a tensor of {leaf.dtype}, {leaf.layout}: params are dense, of 16 bits or more. Convert "
                "it with .to_dense(), or .bfloat16()."
            )
        if leaf.is_meta:
            raise ValueError("init is on the meta device, which holds no numbers: give the params their values first.")
        if leaf.device != flat[0].device:
            raise ValueError(f"init is spread over {flat[0].device} and {leaf.device}: put all leaves on one device.")
    refuse_mps("init", flat[0].device)
    if sum(leaf.numel() for leaf in flat) == 0:
        raise ValueError("init holds no numbers (every leaf has a dimension of size 0).")


def check_batch(init: Tree, batch_dims: int) -> torch.Size:
    """The leading dimensions that all leaves share."""
    shapes = {leaf.shape[:batch_dims] for leaf in leaves(init)}
    if len(shapes) > 1 or any(leaf.dim() < batch_dims for leaf in leaves(init)):
        raise ValueError(
            f"init has leaves of shapes {[tuple(leaf.shape) for leaf in leaves(init)]}: with batched=True the first "
            "dimension of every leaf is T, the number of independent problems."
        )
    return torch.Size(shapes.pop())


def check_residual(found: Tree, init: Tree, what: str = "residual") -> None:
    same = pytree.tree_structure(found) == pytree.tree_structure(init)
    if not same or any(
        not isinstance(r, Tensor) or r.shape != y.shape for r, y in zip(leaves(found), leaves(init), strict=True)
    ):
        raise ValueError(
            f"{what} returned {_shapes(found)} for init {_shapes(init)}: a square system has as many equations as "
            f"unknowns, in a tree of the same structure and shapes.{ordered(found, init)}"
        )
    for r, y in zip(leaves(found), leaves(init), strict=True):
        if r.is_complex() and not y.is_complex():
            raise ValueError(
                f"{what} returned {r.dtype} for unknowns of {y.dtype}: of a complex equation, real and imaginary parts "
                "are two. Return them as they are, torch.view_as_real(r), with as many real unknowns."
            )


def ordered(found: Tree, init: Tree) -> str:
    """What to add about two trees that differ, where they do only in the order of their keys."""
    paths = [[path for path, _ in pytree.tree_flatten_with_path(tree)[0]] for tree in (found, init)]
    if paths[0] == paths[1] or set(map(pytree.keystr, paths[0])) != set(map(pytree.keystr, paths[1])):
        return ""
    return " The keys stand in another order than those of init: give them in its order."


def _shapes(tree: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)


def check_loss(loss: Tensor, init: Tree, max_batch_dims: int = 1) -> None:
    usable = isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() > 0
    if not usable or loss.dim() > max_batch_dims:
        found = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss)
        pair = isinstance(loss, tuple) and len(loss) == 2
        advice = "Reduce the loss over the examples, for T problems one by one."
        raise ValueError(
            f"objective returned {found}: a scalar (one problem) or a vector [T] (T independent problems) of "
            f"floating point is needed. {'Of a pair (loss, aux), pass has_aux=True.' if pair else advice}"
        )
    for leaf in leaves(init):
        if loss.dim() and leaf.shape[: loss.dim()] != loss.shape:
            raise ValueError(
                f"objective returned {loss.shape[0]} losses, one for each of T problems, but init has a leaf of "
                f"shape {tuple(leaf.shape)}: its first dimension must be T = {loss.shape[0]}. "
                "Use bilevel.stack(params, T), or return a scalar for one problem."
            )


def blame_nonfinite(what: str, init: Tree, args: tuple[Tree, ...]) -> str:
    culprits = [name for name, tree in _named_inputs(init, args) if _has_nonfinite(tree)]
    if culprits:
        return f"{' and '.join(culprits)} contains NaN or infinite values: mend the data before the solve."
    return (
        f"{what} is NaN or infinite at init although init and args are finite: look at the tensors that it "
        "captures, or start from another init."
    )


def _named_inputs(init: Tree, args: tuple[Tree, ...]) -> Iterator[tuple[str, Tree]]:
    yield "init", init
    for index, arg in enumerate(args):
        yield f"args[{index}]", arg


def _has_nonfinite(tree: Tree) -> bool:
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor) and is_continuous(leaf)]
    return any(not bool(torch.isfinite(leaf).all()) for leaf in tensors)
