"""One problem over many processes of `torch.distributed`: data in shards, parameters and vectors on every rank.

`sharded` turns the loss of a rank's own data into the loss of all data: then `argmin`, its Hessian products, CG and the
hypergradient are those of one process, and all ranks go through the same steps. `AllReduce` does the same for a linear
operator. `reduce_gradients` sums gradients of any training in one flat all-reduce, and `together` lets no rank wait for
one that raised. Without a process group all of them do nothing, so that one program serves one process and many.

Gloo on CPUs, NCCL on GPUs; no DDP hooks, which do not see functional gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ._torch import FunctionContext, TransformType, get_interpreter_stack
from .linalg.gauss_newton import GaussNewton, OfModule
from .linalg.noise import signs
from .linalg.operator import Operator
from .ranks import SAME_OPERATOR, tell_ranks
from .recording import free_looks
from .tree import Tree, digest, is_continuous, leaves, tree_map

if dist.is_available() and not dist.is_initialized():
    # Its functions take the group of all ranks for their default when they are imported, and optimizers import them.
    # Once there is a group they would hold it to Python's end, and gloo's threads, which then abort the process.
    import torch.distributed.nn.functional

Group: TypeAlias = "dist.ProcessGroup | None"
"""A process group of `torch.distributed`; None: all ranks."""


def world_size(group: Group = None) -> int:
    """Ranks; 1 without a process group.

    Raises:
        ValueError: this process is not of the group; as all functions here but `rank`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"Rank {dist.get_rank()} is not in this process group: only its own ranks may call this.")
    return size


def rank(group: Group = None) -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def shard(count: int, group: Group = None) -> slice:
    """This rank's part of ``count`` things, as even as can be: the first ranks have one more.

    Raises:
        ValueError: fewer things than ranks.
    """
    ranks, own = world_size(group), rank(group)
    if count < ranks:
        raise ValueError(f"{count} things cannot be shared out among {ranks} ranks: start fewer, or give more to do.")
    share, more = divmod(count, ranks)
    begin = own * share + min(own, more)
    return slice(begin, begin + share + (own < more))


def sharded(objective: Callable[..., Tensor], group: Group = None) -> Callable[..., Tensor]:
    """The sum over the ranks of each one's own ``objective(params, *args)``, as one objective that all of them have.

    Every rank calls `argmin` (or an outer loss) with it, with the same params and hyperparameters, at the same time; a
    loss, a gradient and a Hessian product each cost one all-reduce of their size. A mean over all data is a sum of
    ``loss.sum() / total``; a penalty is added in parts, or by one rank alone. Exact for first and second derivatives
    (`Implicit` and `Unroll` by reverse mode).

    Not for the residuals of `least_squares`, whose squares are what is summed: give `argmin` the sharded cost.

    Raises:
        RankError: (as the following, when the sum is called) ``objective`` raised on another rank.
        TypeError: it returns something other than a tensor.
        ValueError: a captured tensor requires grad, whose gradient would be that of this rank's data alone:
            hyperparameters must be among ``args``. The losses of the ranks have different shapes or dtypes. The ranks
            begin with different params or hyperparameters, or (in the backward pass) come with different gradients of
            the outer loss.
    """

    ranks = _Group(group)
    known: dict[Hashable, Tensor] = {}  # by the shapes of the params, which all ranks share: what a loss is like

    def total(params: Tree, *args: Any) -> Tensor:
        if _alone.get() or world_size(group) == 1:
            return objective(params, *args)
        tell_ranks(ranks)
        here = [tree_map(lambda leaf: _replicate(leaf, group), tree) for tree in (params, *args)]
        kind = tuple((leaf.shape, leaf.dtype) for leaf in leaves(params) if isinstance(leaf, Tensor))
        like = None if _under_vmap() else known.get(kind)
        with _telling(group) if like is None else _failing(like, group):
            loss = objective(*here)
            _check_own(loss)
        if like is None and _agree(group, zlib.crc32(repr((loss.shape, loss.dtype)).encode())):
            raise ValueError(
                f"The sharded objective returned losses of different shapes or dtypes on the ranks, here a "
                f"{loss.dtype} of shape {tuple(loss.shape)}: they are summed."
            )
        known[kind] = torch.empty_like(loss, requires_grad=False)
        result: Tensor = _Loss.apply(_tied(loss, here), group)
        return result

    total.sums_over_ranks = True  # type: ignore[attr-defined]
    return total


def _tied(loss: Tensor, trees: list[Tree]) -> Tensor:
    """The loss itself, with a graph from each leaf to it and to its derivatives of every order.

    A rank whose data do not use a leaf, or use it linearly, would leave out a reduction that the others make, and pair
    its next one with that. Of sine and tanh every derivative depends on all leaves, and is finite everywhere.
    """
    firsts = [
        (torch.view_as_real(leaf) if leaf.is_complex() else leaf).reshape(-1)[:1].sum().to(loss.device, loss.dtype)
        for tree in trees
        for leaf in leaves(tree)
        if isinstance(leaf, Tensor) and is_continuous(leaf)
    ]
    return loss + 0 * torch.stack(firsts).nan_to_num().tanh().sum().sin() if firsts else loss


_alone: ContextVar[bool] = ContextVar("alone", default=False)
"""Whether sharded objectives are those of this rank's own data now."""


@dataclass(frozen=True)
class _Group:
    """See `Ranks`."""

    group: Group

    def check_same(self, tensors: Iterable[Tensor], what: str) -> None:
        if _agree(self.group, digest(tensors)):
            raise ValueError(f"The ranks have different {what}.")

    def first(self, number: int) -> int:
        found: int = from_first(number, self.group)
        return found

    def operator(self, factory: Callable[..., Operator], *args: Any) -> Operator:
        if isinstance(factory, GaussNewton | OfModule):  # made of functions of this rank's data
            token = _alone.set(True)
            try:
                return AllReduce(factory(*args), self.group)
            finally:
                _alone.reset(token)
        operator = factory(*args)
        if not isinstance(operator, AllReduce):
            probe = signs((*operator.batch_shape, operator.size), 0, operator.device).to(operator.dtype)
            self.check_same([operator.matvec(probe)], SAME_OPERATOR)
        return operator


class AllReduce(Operator):
    """The sum over the ranks of each one's own operator: ``A = sum_r A_r``. One all-reduce of n numbers a product.

    For a Hessian of data in shards, so that any linear solver runs over all of it: vectors are on every rank, and all
    ranks make the same steps.
    """

    def __init__(self, operator: Operator, group: Group = None):
        super().__init__(operator.batch_shape, operator.size, operator.dtype, operator.device, operator.symmetric)
        self.operator, self.group = operator, group

    def matvec(self, v: Tensor) -> Tensor:
        """``sum_r A_r v``."""
        return all_reduce(self.operator.matvec(v), self.group)

    def rmatvec(self, v: Tensor) -> Tensor:
        """``sum_r A_r^T v``."""
        return all_reduce(self.operator.rmatvec(v), self.group)


def all_reduce(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over the ranks, detached; the same bits on each."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def reduce_gradients(params: Iterable[Tensor], *numbers: float, group: Group = None) -> list[float]:
    """Sum the ``grad`` of the params over the ranks, and some numbers with them: as one process would have them.

    For an average over tasks, each rank's loss is its sum divided by the number of all tasks. A grad that is None on
    this rank counts as zero; one that is None on every rank (of frozen params, of those that no loss used) stays None,
    so that an optimizer passes it by. Gradients are summed in the widest dtype of the params, at least float32, and a
    sparse one becomes dense.

    Three all-reduces: a word that all ranks are here, with the same params; the numbers, in float64; all gradients.

    Args:
        params: the same on every rank, in the same order.
        numbers: such as losses, or a flag that asks all ranks to stop.

    Returns:
        The sums of the numbers.

    Raises:
        TypeError: params holds what is no tensor.
        ValueError: the ranks have other params, or another count of numbers; on every rank.
        RankError: another rank raised, here or in a block of `together`.
    """
    params = list(params)
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(f"params holds a {type(param).__name__}: tensors are needed, such as module.parameters().")
    if world_size(group) == 1:
        return [float(number) for number in numbers]
    with _telling(group):
        device = params[0].device if params else _device(group)
        present = [float(param.grad is not None) for param in params]
        header = torch.tensor([*present, *map(float, numbers)], dtype=torch.float64, device=device)
        dtype = torch.float32
        for param in params:
            dtype = torch.promote_types(dtype, param.dtype.to_real())
        layout = _layout(params, len(numbers))
        own = {place: _flat(param, device, dtype) for place, param in enumerate(params) if param.grad is not None}
    if _agree(group, layout):
        raise ValueError(
            "The ranks call reduce_gradients with other params or another count of numbers: all need the same, in the "
            "same order."
        )
    sums: list[float] = all_reduce(header, group).tolist()  # one copy to the host
    some = [place for place in range(len(params)) if sums[place] > 0]
    _reduce_flat([params[place] for place in some], [own.get(place) for place in some], device, dtype, group)
    return sums[len(params) :]


def _reduce_flat(
    params: list[Tensor], own: list[Tensor | None], device: torch.device, dtype: torch.dtype, group: Group
) -> None:
    """One all-reduce of all gradients; each becomes that of its param."""
    if not params:
        return
    sizes = [param.numel() * (2 if param.is_complex() else 1) for param in params]
    parts = [
        torch.zeros(size, device=device, dtype=dtype) if part is None else part
        for part, size in zip(own, sizes, strict=True)
    ]
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=group)
    for param, part in zip(params, flat.split(sizes), strict=True):
        if param.is_complex():
            part = torch.view_as_complex(part.view(-1, 2))
        param.grad = part.view(param.shape).to(param.device, param.dtype)


def _layout(params: list[Tensor], count: int) -> int:
    """A number that tells apart lists of params of other shapes or dtypes; the same in every process."""
    described = repr((count, [(tuple(param.shape), str(param.dtype)) for param in params]))
    return zlib.crc32(described.encode())


def _flat(param: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    grad = param.grad
    assert grad is not None
    grad = grad.detach().to_dense()
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    return grad.reshape(-1).to(device, dtype)


class RankError(RuntimeError):
    """Another rank raised: this one stops, too, and does not wait for it."""


@contextmanager
def together(group: Group = None) -> Iterator[None]:
    """A block that all ranks leave in the same way: where one of them raises, the others raise `RankError`.

        with together():
            loss = objective(batch)         # of this rank's own data, which may be bad
            loss.backward()
            totals = reduce_gradients(params, loss)

    A rank whose process ends is heard by the others in any case; one that catches its error, or has something to do
    before it ends, would leave them waiting in the next all-reduce, for half an hour by default. Costs an all-reduce of
    three numbers. Of collectives the block has `reduce_gradients` and `sharded` objectives only.

    Raises:
        RankError: at the end of the block, or in its `reduce_gradients`.
    """
    with _telling(group):
        yield
    _agree(group)


@contextmanager
def _telling(group: Group) -> Iterator[None]:
    """Tells the other ranks of an error in the block, unless they know of it."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, RankError) or getattr(error, "told_to_ranks", False)
        if not known and world_size(group) > 1:
            error.told_to_ranks = True  # type: ignore[attr-defined]
            with suppress(Exception):  # the ranks may be gone, and this error is the one to see
                _exchange(group, rank(group) + 1)
        raise


def _agree(group: Group, layout: int = 0) -> bool:
    """Wait until all ranks are here; whether their layouts differ.

    Raises:
        RankError: one of them raised before it came.
    """
    if world_size(group) == 1:
        return False
    failed, highest, lowest = _exchange(group, 0, layout)
    if failed:
        raise RankError(
            f"Rank {failed - 1} raised an error, so rank {rank(group)} stops as well: its own message says why."
        )
    return highest != -lowest


def _exchange(group: Group, failed: int, layout: int = 0) -> list[int]:
    word = torch.tensor([failed, layout, -layout], dtype=torch.int64, device=_device(group))
    dist.all_reduce(word, op=dist.ReduceOp.MAX, group=group)
    found: list[int] = word.tolist()
    return found


def _device(group: Group) -> torch.device:
    """Where the group's backend has its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def from_first(value: Tree, group: Group = None) -> Tree:
    """What rank 0 has, on every rank: a decision that all must take alike. Anything that can be pickled."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def _replicate(leaf: object, group: Group) -> object:
    if isinstance(leaf, Tensor) and is_continuous(leaf):
        return _Replicate.apply(leaf, group)
    return leaf


@contextmanager
def _failing(like: Tensor, group: Group) -> Iterator[None]:
    """After an error goes through the reduction in which the others wait, with no number, and a word that it failed."""
    try:
        yield
    except Exception as error:
        error.told_to_ranks = True  # type: ignore[attr-defined]
        with suppress(Exception):  # the ranks may be gone, and this error is the one to see
            all_reduce(_with_word(torch.full_like(like, torch.nan), failed=True), group)
        raise


def _under_vmap() -> bool:
    """Whether tensors have more dimensions than they tell."""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or [])


def _with_word(loss: Tensor, failed: bool) -> Tensor:
    return torch.cat([loss.detach().reshape(-1), loss.new_full((1,), float(failed))])


def _check_own(loss: object) -> None:
    """The loss of a rank's own data is a tensor, and every path from it to a leaf passes that of an argument."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The sharded objective returned a {type(loss).__name__}: a tensor is needed, which is summed over the "
            "ranks. What comes beside a loss (has_aux) is not: compute it from the solution."
        )
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.name().startswith(_Replicate.__name__):
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            raise ValueError(
                f"The sharded objective captured a tensor {tuple(leaf.shape)} that requires grad: its gradient would "
                "be that of this rank's data alone. Pass it in args, argmin(sharded(objective), init, x), or detach it."
            )
        waiting += [following for following, _ in node.next_functions]


class _Collective(torch.autograd.Function):
    """What all share: they work under `torch.func`, forward mode and vmap too."""

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        ctx.group = inputs[1]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, None], tensor: Tensor, group: Group) -> tuple[Tensor, Any]:
        return cls.apply(tensor, group), in_dims[0]

    @classmethod
    def jvp(cls, ctx: FunctionContext, tangent: Tensor, _: None) -> Tensor:
        moved: Tensor = cls.apply(tangent, ctx.group)
        return moved


class _Replicate(_Collective):
    """Forward, the tensor that all ranks have; backward, the sum of what each rank's data says of it.

    Its backward is `_Sum` and that of `_Sum` is this, so derivatives of every order are right.
    """

    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionContext, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Sum(_Collective):
    """Forward, the sum over the ranks; backward, the same gradient on each."""

    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: FunctionContext, grad: Tensor) -> tuple[Tensor, None]:
        return _Replicate.apply(grad, ctx.group), None


class _Loss(_Sum):
    """Of losses: a rank whose objective raised is heard here, where the others would wait for it.

    Where looks at values are not free, they get a NaN in place of an error.
    """

    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        total = all_reduce(_with_word(tensor, failed=False), group)
        if free_looks(total) and bool(total[-1] > 0):
            raise RankError(
                f"The objective raised an error on another rank, so rank {rank(group)} stops as well: that rank's own "
                "message says why."
            )
        return total[:-1].view(tensor.shape)

    @classmethod
    def jvp(cls, ctx: FunctionContext, tangent: Tensor, _: None) -> Tensor:
        moved: Tensor = _Sum.apply(tangent, ctx.group)
        return moved
