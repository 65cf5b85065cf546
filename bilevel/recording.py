"""A tensor program recorded once and replayed: CUDA graphs, for programs of many small kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ._torch import maybe_current_level, pytree
from .tree import Tree

MAX_RECORDINGS = 16
"""Recordings that one function keeps."""

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


class Recorded:
    """``fn``, recorded as a CUDA graph for each set of shapes of its arguments, and replayed; see `capture`."""

    def __init__(self, fn: Callable[..., Tree], max_recordings: int = MAX_RECORDINGS):
        if not isinstance(max_recordings, int) or max_recordings < 1:
            raise ValueError(f"max_recordings is {max_recordings}: at least one recording must be kept.")
        self.fn, self.max_recordings = fn, max_recordings
        self._programs: dict[Hashable, _Program] = {}  # the one that was used last stands at the end
        self._lock = threading.RLock()

    def __call__(self, *args: Tree) -> Tree:
        """``fn(*args)``, without a graph of autograd."""
        return self.run(_plain, *args)

    def run(self, program: Callable[..., Tree], *args: Tree) -> Tree:
        """``program(fn, *args)`` as one recording; the tensors that it returns are detached and the caller's own."""
        if maybe_current_level() is not None:
            raise RuntimeError(
                "A captured function was called under torch.func: its results are detached, so that their derivatives "
                "would be zero. Capture what takes the derivative, capture(torch.func.grad(fn)), or call fn itself."
            )
        flat, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        # A captured function that another one calls is part of the recording of that one.
        if not tensors or tensors[0].device.type not in GRAPHS or recording():
            return pytree.tree_map_only(Tensor, Tensor.detach, program(self.fn, *args))
        device = tensors[0].device
        for tensor in tensors:
            if tensor.device != device:
                raise ValueError(f"The arguments are on {device} and {tensor.device}: a recording is of one device.")
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast(device), *_kernels()
        key = (program, spec, modes, *(_signature(leaf) for leaf in flat))
        try:
            hash(key)
        except TypeError as error:
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in flat if type(leaf).__hash__ is None}))
            raise TypeError(
                f"An argument holds {kinds or 'something'}, which is no constant of a recording, as it cannot be "
                "hashed: pass a tensor, torch.as_tensor(array), or a number."
            ) from error
        with self._lock, _on(device):  # a recording has one set of inputs
            known = self._programs.pop(key, None)
            if known is None:
                while len(self._programs) >= self.max_recordings:
                    del self._programs[next(iter(self._programs))]
                known = _Program(lambda *args: program(self.fn, *args), flat, spec)
            self._programs[key] = known
            return known.replay(tensors)


def capture(fn: Callable[..., Tree], max_recordings: int = MAX_RECORDINGS) -> Recorded:
    """Record ``fn`` as a CUDA graph and replay it: the launches of thousands of kernels for the price of one.

    The first call with arguments of some shapes, dtypes, devices and flags of ``requires_grad``, other constants, or
    another state of autocast, of grad mode, or of what PyTorch chooses kernels by (TF32, deterministic algorithms),
    runs ``fn`` a few times and records it. Later ones copy their arguments
    into those of the recording and replay its kernels; nothing that ``fn`` does in Python is done again. So ``fn`` may
    not look at a value: no ``.item()``, no solver that stops by its tolerance. `GradientDescent` with one ``lr`` and
    `Steps` serve, of the linear solvers all on the device that are given ``max_steps``, with any preconditioner, and
    `Identity`. In a recording CG makes all of its ``max_steps``, those after the tolerance is met without effect, and
    no solve warns or raises: its stats tell. The memory of a recording is held as long as the object lives.

    On a CPU ``fn`` is called as it is.

    Args:
        fn: from trees of tensors to a tree of tensors; other leaves are constants of the recording, and hashable. A
            `Solution` is a tree of its value, stats and adjoint. What ``fn`` reads beside its arguments is read where
            it was: changed in place, it has its new values; assigned anew (``param.data = ...``, a module in eval
            mode) it is as it was at the recording. Pass such things as arguments, and do not
            change arguments in place: those of a recording are copies.
        max_recordings: kept at most, each with its memory; the one that was not used for longest goes first.

    Returns:
        A function of the same arguments, whose results are detached. `mean_over_tasks`, `losses_of_tasks` and
        `map_tasks` take it in the place of their ``fn``; they then record the gradient of a chunk of tasks.

    Raises:
        RuntimeError: (when called) ``fn`` does what cannot be recorded. An error of its own, which it has without a
            recording too, comes as it is.
            Also under a transform of `torch.func`, since derivatives of detached results would be zero.
        TypeError: an argument is neither a tensor nor hashable. ValueError: arguments on several devices.
    """
    return Recorded(fn, max_recordings)


class Graph(Protocol):
    """A recording of ``fn(*inputs)``: ``replay`` computes ``outputs`` anew, in place, from the values of ``inputs``."""

    outputs: list[Tensor]

    def __init__(self, fn: Callable[..., list[Tensor]], inputs: Sequence[Tensor]): ...

    def replay(self) -> None: ...

    def enter(self) -> None:
        """Before the inputs are written."""

    def leave(self) -> None:
        """After the outputs have been read."""


class NotRecordedError(RuntimeError):
    """The function runs, but cannot be recorded."""


class CudaGraph(Graph):
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, fn: Callable[..., list[Tensor]], inputs: Sequence[Tensor]):
        before = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                fn(*inputs)
        before.wait_stream(aside)
        self.graph, self.done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        try:
            # Of this thread: another one, such as a loader that pins memory, may call CUDA meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = fn(*inputs)
        except RuntimeError as error:
            raise NotRecordedError(str(error)) from error
        finally:  # a capture that failed leaves the thread on its own stream
            torch.cuda.set_stream(before)
        self.done.record()

    def replay(self) -> None:
        self.graph.replay()

    def enter(self) -> None:
        """Wait, on this stream, for the replay of another one: both use the same memory."""
        torch.cuda.current_stream().wait_event(self.done)

    def leave(self) -> None:
        """The outputs have been read, as far as this stream is concerned."""
        self.done.record()


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""By the type of device; on another one a program is called as it is."""


_TENSOR = object()
"""Stands for a tensor among the leaves of a result."""


class _Program:
    """One recording, with inputs of its own."""

    def __init__(self, fn: Callable[..., Tree], flat: Sequence[object], spec: pytree.TreeSpec):
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
        except (NotRecordedError, NotImplementedError) as error:
            raise RuntimeError(
                f"The function could not be recorded ({_first_line(error)}). In a recording nothing may look at a "
                "value or copy from the host: take solvers with a fixed number of steps (GradientDescent, "
                "CG(max_steps=...)), or call the function without capture."
            ) from error

    def replay(self, tensors: Sequence[Tensor]) -> Tree:
        with torch.no_grad():
            self.graph.enter()
            for own, given in zip(self.inputs, tensors, strict=True):
                own.copy_(given)
            self.graph.replay()
            fresh = iter([out.clone() for out in self.graph.outputs])
            self.graph.leave()
        return pytree.tree_unflatten([next(fresh) if leaf is _TENSOR else leaf for leaf in self.found], self.spec)


def _plain(fn: Callable[..., Tree], *args: Tree) -> Tree:
    return fn(*args)


def _signature(leaf: Hashable) -> Hashable:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf  # 2, 2.0 and True are equal, and other programs
    return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad


def _autocast(device: torch.device) -> Hashable:
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def _kernels() -> tuple[bool, bool, bool]:
    """By what PyTorch chooses among the kernels of an operation, which a recording keeps."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return matmul, convolution, torch.are_deterministic_algorithms_enabled()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The device is the current one: streams, and what ``fn`` makes without naming a device, belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
