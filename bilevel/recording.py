"""A tensor program recorded once and replayed: CUDA graphs, for programs of many small kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ._torch import pytree
from .tree import Tree

WARM_UP = 3
"""Runs before a recording, in which libraries choose algorithms and take their workspaces."""


def recording() -> bool:
    """Whether the operations of this thread are being recorded, when no value can be looked at."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or get_proxy_mode() is not None


FREE_LOOKS = {"cpu"}
"""Types of devices on which a look at a value costs nothing; on others it waits for all that was asked for before."""


def free_looks(tensor: Tensor) -> bool:
    """Whether values of the device of this tensor may be looked at as often as is useful."""
    return tensor.device.type in FREE_LOOKS and not recording()


class Captured:
    """``fn``, recorded as a CUDA graph for each set of shapes of its arguments, and replayed; see `capture`."""

    def __init__(self, fn: Callable[..., Tree]):
        self.fn = fn
        self._programs: dict[Hashable, _Program] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Tree) -> Tree:
        """``fn(*args)``, without a graph of autograd."""
        return self.run(_plain, *args)

    def run(self, program: Callable[..., Tree], *args: Tree) -> Tree:
        """``program(fn, *args)`` as one recording; the tensors that it returns are detached and the caller's own."""
        flat, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].device.type not in GRAPHS:
            return pytree.tree_map_only(Tensor, Tensor.detach, program(self.fn, *args))
        key = (program, spec, torch.is_grad_enabled(), *(_signature(leaf) for leaf in flat))
        with self._lock:  # a recording has one set of inputs
            if key not in self._programs:
                self._programs[key] = _Program(lambda *args: program(self.fn, *args), flat, spec)
            return self._programs[key].replay(tensors)


def capture(fn: Callable[..., Tree]) -> Captured:
    """Record ``fn`` as a CUDA graph and replay it: the launches of thousands of kernels for the price of one.

    The first call with arguments of some shapes, dtypes and flags of ``requires_grad`` runs ``fn`` a few times and
    records it. Later ones copy their arguments into those of the recording and replay its kernels; nothing that ``fn``
    does in Python is done again. So ``fn`` may not look at a value: no ``.item()``, no solver that stops by its
    tolerance. `GradientDescent` and `Steps` with ``max_steps``, `CG`, `Neumann` and `Identity` serve. In a recording CG
    makes all of its ``max_steps``, those after the tolerance is met without effect, and no solve warns or raises: its
    stats tell. The memory of a recording is held as long as the object lives.

    On a CPU ``fn`` is called as it is.

    Args:
        fn: from trees of tensors to a tree of tensors; other leaves are constants of the recording. A `Solution` is a
            tree of its value, stats and adjoint. What ``fn`` reads beside its arguments is read where it was.

    Returns:
        A function of the same arguments, whose results are detached. `mean_over_tasks`, `losses_of_tasks` and
        `map_tasks` take it in the place of their ``fn``; they then record the gradient of a chunk of tasks.

    Raises:
        RuntimeError: (when called) ``fn`` does what cannot be recorded.
    """
    return Captured(fn)


class Graph(Protocol):
    """A recording of ``fn(*inputs)``: ``replay`` computes ``outputs`` anew, in place, from the values of ``inputs``."""

    outputs: list[Tensor]

    def __init__(self, fn: Callable[..., list[Tensor]], inputs: Sequence[Tensor]): ...

    def replay(self) -> None: ...


class CudaGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, fn: Callable[..., list[Tensor]], inputs: Sequence[Tensor]):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                fn(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = fn(*inputs)

    def replay(self) -> None:
        self.graph.replay()


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""By the type of device; on another one a program is called as it is."""


_TENSOR = object()
"""Stands for a tensor among the leaves of a result."""


class _Program:
    """One recording, with inputs of its own."""

    def __init__(self, fn: Callable[..., Tree], flat: Sequence[Any], spec: pytree.TreeSpec):
        kept = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in flat if isinstance(leaf, Tensor)]

        def program(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            args = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            found, self.spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(args, spec)))
            self.found = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in found]
            return [leaf.detach() for leaf in found if isinstance(leaf, Tensor)]

        self.inputs = kept
        try:
            self.graph = GRAPHS[kept[0].device.type](program, kept)
        except RuntimeError as error:
            raise RuntimeError(
                f"The function could not be recorded ({_first_line(error)}). In a recording nothing may look at a "
                "value or copy from the host: take solvers with a fixed number of steps (GradientDescent, "
                "CG(max_steps=...)), or call the function without capture."
            ) from error

    def replay(self, tensors: Sequence[Tensor]) -> Tree:
        with torch.no_grad():
            for own, given in zip(self.inputs, tensors, strict=True):
                own.copy_(given)
            self.graph.replay()
            fresh = iter([out.clone() for out in self.graph.outputs])
        return pytree.tree_unflatten([next(fresh) if leaf is _TENSOR else leaf for leaf in self.found], self.spec)


def _plain(fn: Callable[..., Tree], *args: Tree) -> Tree:
    return fn(*args)


def _signature(leaf: Any) -> Hashable:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
