"""One problem over many processes of `torch.distributed`: data in shards, parameters and vectors on every rank.

`sharded` turns the loss of a rank's own data into the loss of all data: then `argmin`, its Hessian products, CG and the
hypergradient are those of one process, and all ranks go through the same steps. `AllReduce` does the same for a linear
operator. `reduce_gradients` sums gradients of any training in one flat all-reduce. Without a process group all of them
do nothing, so that one program serves one process and many.

Gloo on CPUs, NCCL on GPUs; no DDP hooks, which do not see functional gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .linalg.operator import Operator
from .tree import Tree, is_continuous, tree_map

Group = Any
"""A process group of `torch.distributed`; None: all ranks."""


def world_size(group: Group = None) -> int:
    """Ranks; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Of this process; 0 without a process group."""
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
    ``loss.sum() / total``. Exact for first and second derivatives (`Implicit` and `Unroll` by reverse mode).

    Raises:
        ValueError: a captured tensor requires grad. Its gradient would be that of this rank's data alone:
            hyperparameters must be among ``args``.
    """

    def total(params: Tree, *args: Any) -> Tensor:
        if world_size(group) == 1:
            return objective(params, *args)
        here = [tree_map(lambda leaf: _replicate(leaf, group), tree) for tree in (params, *args)]
        loss = objective(*here)
        _refuse_captured(loss)
        result: Tensor = _Sum.apply(loss, group)
        return result

    return total


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
    """Sum the ``grad`` of the params over the ranks, in place, and some numbers with them: one flat all-reduce.

    For an average over tasks, each rank's loss is its sum divided by the number of all tasks. A grad that is None on
    this rank counts as zero, and is filled in.

    Args:
        numbers: such as losses, or a flag that asks all ranks to stop; summed in float64.

    Returns:
        The sums of the numbers.
    """
    params = list(params)
    if world_size(group) == 1:
        return list(numbers)
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    wide = torch.float64 if numbers and grads[0].device.type == "cpu" else torch.float32
    dtype = torch.promote_types(wide, grads[0].dtype) if grads else wide
    extra = torch.tensor(numbers, dtype=dtype, device=grads[0].device if grads else None)
    flat = torch.cat([*(grad.reshape(-1).to(dtype) for grad in grads), extra])
    dist.all_reduce(flat, group=group)
    parts = flat.split([*(grad.numel() for grad in grads), len(numbers)])
    for param, part in zip(params, parts, strict=False):
        param.grad = part.view_as(param).to(param.dtype)
    return [float(number) for number in parts[-1]]


def from_first(value: Any, group: Group = None) -> Any:
    """What rank 0 has, on every rank: a decision that all must take alike. Anything that can be pickled."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _replicate(leaf: Any, group: Group) -> Any:
    if isinstance(leaf, Tensor) and is_continuous(leaf):
        return _Replicate.apply(leaf, group)
    return leaf


def _refuse_captured(loss: Tensor) -> None:
    """Every path from the loss to a leaf has to pass the replication of an argument."""
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
    """What the two share: they work under `torch.func`, forward mode and vmap too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        ctx.group = inputs[1]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, None], tensor: Tensor, group: Group) -> tuple[Tensor, Any]:
        return cls.apply(tensor, group), in_dims[0]


class _Replicate(_Collective):
    """Forward, the tensor that all ranks have; backward, the sum of what each rank's data says of it.

    Its backward is `_Sum` and that of `_Sum` is this, so derivatives of every order are right.
    """

    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Replicate.apply(tangent, ctx.group)


class _Sum(_Collective):
    """Forward, the sum over the ranks; backward, the same gradient on each."""

    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Replicate.apply(grad, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Sum.apply(tangent, ctx.group)
