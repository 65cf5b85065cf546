"""The path of an inner solver: its steps as pure functions of point, state and hyperparameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .._torch import FunctionContext, TorchDispatchMode, after_backward, is_functorch_wrapped_tensor, pytree
from ..closure import Closure, Tracer, in_transform, substituting
from ..inner.first_look import LOOKED, raised
from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import InnerSolver, Progress
from ..inner.steps import SGD, LastStep, State, Steps
from ..linalg.curvature import fused_norm, has_layer_norm
from ..notices import tell
from ..problem import Objective, Problem, gradient, graph_nodes, refuse_hidden
from ..ranks import SAME_GRADIENT, Ranks
from ..reach import Reach
from ..recording import free_looks, recording
from ..solution import Result, Solution, SolveError, SolveWarning, Throw, settle
from ..tree import Raveler, Tree, leaves
from .advice import NONFINITE_ADVICE
from .call import measured_at_solution
from .statement import free_leaves

PATH_ADVICE: dict[Result | None, str] = {
    None: (
        "The derivative is that of the steps that were made, wherever they ended: raise max_steps, take another step "
        "size, or loosen gtol"
    ),
    Result.NONFINITE: (
        "Lower the step size, start elsewhere, or look whether the loss falls without end (without a penalty it may "
        "have no minimum)"
    ),
}


@dataclass(frozen=True)
class Walk:
    """The steps of a path as functions of point, state and hyperparameters.

    Attributes:
        closure: the objective. hparams: the tensors that objective and rule reach.
        draws: the objective draws random numbers.
    """

    closure: Closure
    raveler: Raveler
    steps: Steps
    hparams: list[Tensor]
    draws: bool

    def step(self, y: Tensor, state: State, hparams: list[Tensor], index: int) -> tuple[Tensor, State]:
        """One step, as `torch.func` differentiates it."""
        g = torch.func.grad(lambda flat: self.closure(self.raveler.unravel(flat), hparams).sum())(y)
        return self.ruled(y, g, state, hparams, index)

    def eager_step(
        self, y: Tensor, state: State, hparams: list[Tensor], index: int, create_graph: bool
    ) -> tuple[Tensor, State]:
        """The same as autograd differentiates it, in half of the time; where a graph is wanted, y requires grad."""
        with torch.enable_grad():
            point = self.raveler.unravel(y if create_graph else y.detach().requires_grad_())
            g = self.raveler.ravel(gradient(self.closure(point, hparams), point, create_graph))
        return self.ruled(y, g, state, hparams, index)

    def ruled(self, y: Tensor, g: Tensor, state: State, hparams: list[Tensor], index: int) -> tuple[Tensor, State]:
        """The step from the gradient at ``y``."""
        with substituting(self.closure.captured, hparams):  # settings of the rule
            return self.steps.rule.step(y, g, state, index)


class Path:
    """A fixed number of steps from ``init``, and how they are made.

    Args:
        to_init: whether a gradient flows to ``init``.

    Raises:
        NotImplementedError: the objective uses a fused batch norm, whose derivatives under `torch.func` are wrong.
        ValueError: a hyperparameter that closure conversion cannot follow.
    """

    def __init__(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], steps: Steps, method: str, *, to_init: bool
    ):
        tracer = Tracer()
        tracer.note(steps.rule.tensors)
        self.problem = Problem(objective, init, args, tracer=tracer)
        hparams = self.problem.hparams = tracer.resolved
        self.problem.reach = Reach.of(objective, init, args, tracer.captured, to_init=to_init)
        if not to_init and torch.is_grad_enabled() and _depends(init, tracer.captured):
            tell(INIT.format(method=method), UserWarning, kind="init")
        closure = Closure.traced(objective, pytree.tree_structure(init), args, tracer, self.problem.start.y.device)
        point, free = free_leaves(self.problem.raveler.unravel(self.problem.start.y)), free_leaves(hparams)
        with torch.enable_grad(), _Draws() as draws:
            nodes = list(graph_nodes([closure(point, free)]))
        refuse_hidden(nodes, [*point, *free])
        self.walk = Walk(closure, self.problem.raveler, steps, hparams, draws.found)
        self.layer_norm = has_layer_norm(nodes)
        fused = fused_norm(nodes)
        if fused:
            raise NotImplementedError(
                f"hypergrad={method} cannot be used: the objective contains the fused {fused}, whose derivatives "
                "under torch.func are silently wrong. Use Unroll(), or a norm written with torch.var_mean and rsqrt."
            )
        if draws.found and recording():
            raise NotImplementedError(
                f"hypergrad={method} cannot be recorded with an objective that draws random numbers: steps that are "
                "made again have to draw the same, and a recording cannot set generators back. Use Unroll(), or draw "
                "outside of the objective."
            )

    def solution(self, y: Tensor, state: State) -> Solution:
        """What ended at ``y`` after all steps."""
        progress = Progress.begin(self.problem.start, None)
        progress.steps = progress.steps + self.walk.steps.max_steps
        return replace(progress.solution(y), state=LastStep(state))


class _Draws(TorchDispatchMode):
    """Sees whether an operation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def eager_problem(
    objective: Objective, init: Tree, args: tuple[Tree, ...], settings: Sequence[Tensor]
) -> tuple[Problem, bool]:
    """A problem whose steps leave a graph, where gradients are on, and whether its objective has a layer norm.

    Args:
        settings: tensors that the steps use beside those of the objective.
    """
    tracer = Tracer(differentiable=False)
    tracer.note(list(settings))
    if not torch.is_grad_enabled():
        return Problem(objective, init, args, tracer=tracer), False
    problem = Problem(objective, init, args, differentiable=True, tracer=tracer)
    problem.reach = Reach.of(objective, init, args, tracer.captured, to_init=True)
    problem.hparams = tracer.captured
    return problem, has_layer_norm(graph_nodes([problem.start.f], since=tracer.born))


def unrollable(solver: InnerSolver, method: str) -> Steps:
    """The steps of a solver whose path can be differentiated."""
    if in_transform():
        raise NotImplementedError(
            f"hypergrad={method}(...) does not work under torch.func: use Implicit(), or autograd outside of it."
        )
    if isinstance(solver, Steps):
        return solver
    if isinstance(solver, GradientDescent) and not solver.line_search:
        lr = (
            torch.tensor(solver.lr, dtype=torch.float64, device="cpu").unsqueeze(-1)
            if isinstance(solver.lr, tuple)
            else solver.lr
        )
        return Steps(SGD(lr, solver.momentum), solver.max_steps, solver.gtol, callback=solver.callback)
    raise TypeError(
        f"hypergrad={method}(...) cannot differentiate {solver!r}: it needs Steps(rule, ...), or GradientDescent "
        "without line_search. Every solver works with hypergrad=Implicit()."
    )


def fixed_steps(solver: InnerSolver, method: str) -> Steps:
    """The same, for methods that know the number of steps beforehand."""
    steps = unrollable(solver, method)
    if steps.gtol is not None or (isinstance(solver, GradientDescent) and solver.safeguard):
        raise TypeError(f"hypergrad={method}(...) needs a fixed number of steps: leave gtol and safeguard away.")
    if steps.callback is not None:
        raise TypeError(
            f"hypergrad={method}(...) makes its steps anew in parts, which no callback sees: leave callback away, or "
            "take Unroll() or Implicit()."
        )
    return steps


def finish(problem: Problem, found: Solution, throw: Throw, layer_norm: bool = False) -> Solution:
    """Measure what was found, let a failure be heard, and give the value the shape of ``init``.

    Args:
        layer_norm: the objective uses one, so that second derivatives are refused.
    """
    found = measured_at_solution(problem, found)
    settle(found, throw, "The inner solve", PATH_ADVICE, start=problem.first_residual)
    looks = throw != "ignore" and free_looks(found.value) and not is_functorch_wrapped_tensor(found.value)
    if looks and LOOKED.is_new(problem.objective, "path") and (rise := raised(problem, found)):
        tell(f"The inner solve: {rise}", SolveWarning)
    value = _FirstOrderOnly.apply(found.value) if layer_norm and found.value.requires_grad else found.value
    if problem.ranks is not None and value.requires_grad:
        value.register_hook(partial(_check_same_gradient, problem.ranks))
    if throw != "ignore" and value.requires_grad and not recording():
        value = _Guarded.apply(value, problem.hparams, found.without_values())
    tree = problem.raveler.unflatten(problem.raveler.unravel(value))
    return replace(found.with_value(tree), reach=problem.reach)


def _check_same_gradient(ranks: Ranks, grad: Tensor) -> None:
    if not is_functorch_wrapped_tensor(grad):
        ranks.check_same([grad], SAME_GRADIENT)


@dataclass(frozen=True)
class Randomness:
    """The state of the random number generators, so that a step made again draws the same (dropout, noise)."""

    host: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str

    @classmethod
    def now(cls, like: Tensor) -> Randomness:
        devices, states = get_device_states(like)
        return cls(torch.get_rng_state(), devices, states, like.device.type)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state, and leave no trace."""
        kind = self.kind if self.devices else "cuda"
        with torch.random.fork_rng(self.devices, device_type=kind):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states, device_type=kind)
            yield


def no_forward_mode(method: str) -> NotImplementedError:
    """What a `torch.autograd.Function` raises that has a backward pass alone."""
    return NotImplementedError(
        f"A forward-mode derivative was asked for through hypergrad={method}, which is differentiated in reverse mode "
        "only. Use Implicit(), or Unroll() without checkpoint and mode, which have both."
    )


def _depends(init: Tree, hparams: Sequence[Tensor]) -> bool:
    """Whether the start was computed from something that requires grad, or is a hyperparameter itself."""
    known = {id(tensor) for tensor in hparams}
    return any(leaf.requires_grad and (not leaf.is_leaf or id(leaf) in known) for leaf in leaves(init))


INIT = (
    "init depends on a hyperparameter, and hypergrad={method}(...) leaves out the part of the gradient that goes "
    "through the start of the steps. Take Unroll(), or ForwardGradient(to_init=True); or pass init detached, if that "
    "part is not wanted."
)


class _Guarded(torch.autograd.Function):
    """The value itself; in the backward pass that begins here, gradients of hyperparameters have to be finite."""

    @staticmethod
    def forward(ctx: FunctionContext, value: Tensor, hparams: list[Tensor], found: Solution) -> Tensor:
        ctx.hparams, ctx.found = hparams, found
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionContext, *grads: Tensor) -> tuple[Tensor, None, None]:
        hooks: list[Any] = []

        def remove() -> None:
            while hooks:
                hooks.pop().remove()

        def check(grad: Tensor) -> None:
            if not bool(torch.isfinite(grad).all()):
                remove()
                raise SolveError(f"The hypergradient is NaN or infinite. {NONFINITE_ADVICE}", ctx.found)

        hooks += [tensor.register_hook(check) for tensor in ctx.hparams if tensor.requires_grad]
        after_backward(remove)
        return grads[0], None, None

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent)


class _FirstOrderOnly(torch.autograd.Function):
    """The value itself; refuses the second derivatives that PyTorch gets wrong."""

    @staticmethod
    def forward(ctx: FunctionContext, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionContext, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "A second derivative (create_graph=True) was asked for through the unrolled steps of an objective with "
                "layer_norm, whose third derivative is silently wrong by several percent in PyTorch. Use group_norm, "
                "rms_norm, or a norm written with torch.var_mean and rsqrt."
            )
        return grads[0]

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor) -> Tensor:
        return tangent.clone()
