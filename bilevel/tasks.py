"""Independent tasks a few at a time, side by side over threads: the memory of a few, the time of all cores.

Small tensor programs do not use the threads inside an operation. On a CPU it is faster to give each thread tasks of
its own, and a task whose tensors fit into the cache is faster still; on a GPU all tasks at once fill the card.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._torch import FunctionContext, num_function_modes, pytree
from .checks import check_leaves
from .closure import Autocast, in_transform, is_dual
from .context import uncompiled
from .problem import graph_nodes, other_variable
from .recording import Recorded
from .tree import Tree, leaves, tree_map

T = TypeVar("T")


@uncompiled
def map_tasks(fn: Callable[..., Tree], *data: Tree, chunk_size: int | None = None, num_threads: int = 1) -> Tree:
    """``fn(*data)`` on a few tasks at a time, without gradients, its results joined along the first dimension.

    Args:
        fn: from data of t tasks, leaves ``[t, ...]``, to a tree of tensors ``[t, ...]``. Called from several threads
            where ``num_threads`` says so: it must then not change what they share (`nn.functional_call` serves
            modules, that of PyTorch does not), nor draw from the global random generator. Or one of `capture`.
        data: trees of tensors ``[T, ...]``.
        chunk_size: tasks at a time, at most; None: as many as there are, shared among the threads.
        num_threads: threads that work side by side; `torch.get_num_threads` is the number to take on a CPU.

    Raises:
        ValueError: no tasks, or leaves that disagree about T.
    """

    def checked(*chunk: Tree) -> Tree:
        result, count = fn(*chunk), _count(chunk)
        wrong = [part for part in leaves(result) if not isinstance(part, Tensor) or part.shape[:1] != (count,)]
        if wrong:
            kinds = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in wrong]
            raise ValueError(f"fn returned {kinds} for {count} tasks: tensors [t, ...] of its t tasks are needed.")
        return result

    with torch.no_grad():
        found = list(_in_chunks(checked, data, chunk_size, num_threads))
    return found[0] if len(found) == 1 else tree_map(lambda *parts: torch.cat(parts), *found)


@uncompiled
def mean_over_tasks(
    fn: Callable[..., tuple[Tensor, Tree]],
    params: Tree,
    *data: Tree,
    chunk_size: int | None = None,
    num_threads: int = 1,
    keep: Callable[[Tree], Tree] | None = None,
) -> tuple[Tensor, list[Tree]]:
    """The mean of the losses of T tasks, as a function of ``params``: the meta-objective of few-shot learning.

    The gradient is computed at once, chunk by chunk, and each chunk's graph is dropped: memory is that of
    ``chunk_size * num_threads`` tasks, however many there are. So it can be differentiated once. The result does not
    depend on the number of threads, for a given size of the chunks. Gradients flow to ``params``, and to ``data`` that
    require grad.

    Args:
        fn: ``fn(params, *data)`` with data of t tasks gives their losses ``[t]`` and whatever else the caller wants;
            see `map_tasks` for what threads ask of it.
        params: a tree of tensors, the same for all tasks.
        data, chunk_size, num_threads: as in `map_tasks`.
        keep: what to keep of what else ``fn`` returned, called when the gradient of the chunk is known; None: all.
            Solutions of many tasks are large: ``Solution.without_values`` keeps their stats. Of a captured ``fn`` it is
            part of the recording: pass the same function each time.

    Returns:
        The mean, 0-d, and for each chunk, in order, what is kept of what else ``fn`` returned: its tensors detached, a
        `Solution` without its state.

    Raises:
        ValueError: no tasks, or leaves that disagree about T; the losses are no vector ``[t]``, or depend on a tensor
            that requires grad and is neither in ``params`` nor in ``data``, such as one that ``fn`` captured.
        NotImplementedError: a second derivative is asked for, or one in forward mode.
    """
    flat, spec = pytree.tree_flatten(params)
    num_tasks, total, rests = _count(data), [], []
    shared, own = _wanted(flat), _wanted(leaves(data))
    sums: list[Tensor] = [torch.zeros_like(leaf) for leaf in shared]
    of_chunks: list[list[Tensor]] = []

    def chunk_gradient(*chunk: Tree) -> tuple[Tensor, list[Tensor], Tree]:
        return _run(_gradient, fn, flat, spec, chunk, 1 / num_tasks, keep)

    for losses, grads, rest in _in_chunks(chunk_gradient, data, chunk_size, num_threads):
        total.append(losses)
        rests.append(rest)
        for total_grad, grad in zip(sums, grads, strict=False):
            total_grad += grad
        of_chunks.append(grads[len(shared) :])
    return _Known.apply(torch.cat(total).mean(), [*sums, *_joined(of_chunks)], *shared, *own), rests


@uncompiled
def losses_of_tasks(
    fn: Callable[..., tuple[Tensor, Tree]],
    params: Tree,
    *data: Tree,
    chunk_size: int | None = None,
    num_threads: int = 1,
) -> tuple[Tensor, list[Tree]]:
    """The losses of T tasks, as a function of ``params`` of their own: the outer losses at T solutions.

    As `mean_over_tasks`, but with T sets of parameters.

    Args:
        params: a tree of tensors ``[T, ...]``; ``fn`` gets those of its t tasks.
        fn, data, chunk_size, num_threads: as in `mean_over_tasks`.

    Raises:
        ValueError, NotImplementedError: as `mean_over_tasks`.

    Returns:
        The losses ``[T]``, and what else ``fn`` returned for each chunk, in order.
    """
    flat, spec = pytree.tree_flatten(params)
    total, all_grads, rests = [], [], []

    def chunk_gradient(own: list[Tensor], *chunk: Tree) -> tuple[Tensor, list[Tensor], Tree]:
        return _run(_gradient, fn, own, spec, chunk, 1.0)

    for losses, grads, rest in _in_chunks(chunk_gradient, (flat, *data), chunk_size, num_threads):
        total.append(losses)
        rests.append(rest)
        all_grads.append(grads)
    return _Known.apply(torch.cat(total), _joined(all_grads), *_wanted(flat), *_wanted(leaves(data))), rests


def _run(program: Callable[..., T], fn: Callable[..., Any], *args: Any) -> T:
    """``program(fn, *args)``, from its recording where ``fn`` is recorded."""
    return fn.run(program, *args) if isinstance(fn, Recorded) else program(fn, *args)


def _joined(of_chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Gradients ``[t, ...]`` of the chunks to those of all tasks."""
    return [torch.cat(grads) for grads in zip(*of_chunks, strict=True)]


def _wanted(flat: Sequence[Tensor]) -> list[Tensor]:
    """The leaves whose gradients are asked for."""
    if any(is_dual(leaf) for leaf in flat):
        _refuse_forward_mode()
    return [leaf for leaf in flat if leaf.requires_grad and torch.is_grad_enabled()]


def _free(leaf: Tensor) -> Tensor:
    """Apart from the graph that it has, which is not one of the chunk."""
    return leaf.detach().requires_grad_(leaf.requires_grad and torch.is_grad_enabled())


def _gradient(
    fn: Callable[..., tuple[Tensor, Tree]],
    flat: list[Tensor],
    spec: pytree.TreeSpec,
    chunk: tuple[Tree, ...],
    by: float,
    keep: Callable[[Tree], Tree] | None = None,
) -> tuple[Tensor, list[Tensor], Tree]:
    """Losses, the gradients of ``by`` times their sum, and what is kept of the rest.

    The gradients are those for the leaves of the params, then of the chunk, that require grad.
    """
    free, own = [_free(leaf) for leaf in flat], tree_map(_free, chunk)
    losses, rest = _pair(fn(pytree.tree_unflatten(free, spec), *own))
    if losses.shape != (_count(chunk),):
        raise ValueError(
            f"fn returned losses of shape {tuple(losses.shape)} for {_count(chunk)} tasks: one for each is needed."
        )
    if is_dual(losses):
        _refuse_forward_mode()
    wanted, grads = [leaf for leaf in [*free, *leaves(own)] if leaf.requires_grad], None
    if losses.requires_grad:
        _refuse_captured(losses, wanted)
    if wanted and losses.requires_grad:
        grads = torch.autograd.grad(losses.sum() * by, wanted, allow_unused=True, materialize_grads=True)
    found = [torch.zeros_like(leaf) for leaf in wanted] if grads is None else list(grads)
    # What is kept would keep the graph of its chunk.
    kept = pytree.tree_map_only(Tensor, Tensor.detach, keep(rest) if keep else rest)
    return losses.detach(), found, kept


def _pair(found: object) -> tuple[Tensor, Tree]:
    """What ``fn`` returned, where it is a tensor of losses and something else."""
    if isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], Tensor):
        losses, rest = found
        return losses, rest
    what = f"a {type(found).__name__}"
    advice = "Return a tuple, with all else in one tree: (losses, {'name': tensor})"
    if isinstance(found, Tensor):
        what = f"one tensor of shape {tuple(found.shape)}"
        advice = "Where nothing else is wanted, return (losses, None)"
    elif isinstance(found, tuple | list):
        what = f"({', '.join(type(part).__name__ for part in found)})"
    raise ValueError(
        f"fn returned {what}: a pair is needed, the losses [t] of its t tasks and whatever else is wanted. {advice}."
    )


def _refuse_captured(losses: Tensor, wanted: Sequence[Tensor]) -> None:
    """Raise where the losses depend on another tensor that requires grad: its gradient would be lost."""
    variable = other_variable(graph_nodes([losses]), wanted)
    if variable is not None:
        raise ValueError(
            f"fn depends on a tensor of shape {tuple(variable.shape)} that requires grad and is not one of params or "
            "data, so its gradient would be missing. Put it into params, or detach it if no gradient is wanted."
        )


def _refuse_forward_mode() -> None:
    raise NotImplementedError(
        "A forward-mode derivative was asked for, but the tasks are differentiated a few at a time, in reverse mode: "
        "call the function on all tasks at once instead."
    )


class _Known(torch.autograd.Function):
    """Values whose gradients are known already: a mean ``[]``, or losses ``[T]`` of what has T in front."""

    @staticmethod
    def forward(ctx: FunctionContext, value: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionContext, by_value: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "A graph of the gradient was asked for (create_graph=True), but the gradient was computed task by task "
                "and its graphs are gone: call the function on all tasks at once instead."
            )
        trailing = [(1,) * (grad.dim() - by_value.dim()) for grad in ctx.grads]
        factors = [by_value.reshape((*by_value.shape, *ones)) for ones in trailing]
        return None, None, *(factor.to(grad.dtype) * grad for factor, grad in zip(factors, ctx.grads, strict=True))


def _in_chunks(
    fn: Callable[..., Any], data: tuple[Tree, ...], chunk_size: int | None, num_threads: int
) -> Iterator[Tree]:
    """``fn`` of each chunk, in order; no more than a few results wait for their turn."""
    for name, value in (("chunk_size", 1 if chunk_size is None else chunk_size), ("num_threads", num_threads)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}: a whole number is needed.")
        if value < 1:
            raise ValueError(f"{name} is {value}: at least 1 is needed.")
    check_leaves("data", leaves(data), lambda _: True, "torch.as_tensor(array)")
    num_tasks, device = _count(data), leaves(data)[0].device
    rounds = math.ceil(num_tasks / min(chunk_size or num_tasks, num_tasks) / num_threads)
    size = math.ceil(num_tasks / rounds / num_threads)  # equal shares
    chunks = [tree_map(lambda leaf: leaf[at : at + size], data) for at in range(0, num_tasks, size)]  # noqa: B023
    workers = min(num_threads, len(chunks))
    if workers == 1 or in_transform() or num_function_modes() > 0:
        # Transforms and modes belong to their thread.
        yield from (fn(*chunk) for chunk in chunks)
        return
    grad = torch.is_grad_enabled()
    autocasts = [Autocast.current(torch.device(kind)) for kind in sorted({device.type, "cpu"})]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work(chunk: tuple[Tree, ...]) -> Tree:
        # A new thread has the first device, its default stream, and no autocast.
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for autocast in autocasts:
                stack.enter_context(autocast.entered())
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return fn(*chunk)

    before, waiting = torch.get_num_threads(), deque[Future[Tree]]()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, num_threads // workers),))
    try:
        for chunk in chunks:
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, chunk))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # threads that start later take the number that was set last


def _count(data: Tree) -> int:
    """T, on which all leaves agree."""
    counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves(data)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"data has leaves of shapes {[tuple(leaf.shape) for leaf in leaves(data)]}: the first dimension of each "
            "is T, the number of tasks, at least one."
        )
    return counts.pop()
