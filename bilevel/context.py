"""What is switched in PyTorch while a problem is evaluated, and around a whole solve.

These are settings of the process, not of a thread: the first to enter switches, the last to leave switches back, so
that solves in several threads do not undo each other's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._torch import break_graph, compiler_is_loaded, swapped_last_in_first_out
from .ranks import asked
from .tree import Tree, map_tensors, tensors

P = ParamSpec("P")
R = TypeVar("R")


class Switch:
    """A setting of the process that holds while anyone is inside: a context to be entered by any number of threads."""

    def __init__(self, switched: Callable[[], AbstractContextManager[object]]):
        self._switched = switched
        self._lock = threading.RLock()
        self._inside = 0
        self._entered: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._entered = self._switched()
                self._entered.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._entered is not None:
                self._entered.__exit__(None, None, None)
                self._entered = None


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention by its formula, which has derivatives of any order: the fused kernels have one, the fast path none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), LAST_IN_FIRST_OUT:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written. Where nothing was ever compiled, the compiler is not even loaded."""
    if not compiler_is_loaded():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


LAST_IN_FIRST_OUT = Switch(swapped_last_in_first_out)
"""Around a `torch.func.functional_call`: it leaves modules that share submodules as they were."""
EVALUATING = Switch(_twice_differentiable)
"""Around every evaluation of what the user wrote."""
UNCOMPILED = Switch(_uncompiled)
"""Around evaluations that are seen by a mode of ours or differentiated twice: compiled code bears neither."""


def solves(fn: Callable[P, R]) -> Callable[P, R]:
    """Mark a function as one that solves: it is not compiled, and works under `torch.inference_mode` as under no_grad.

    Tensors among its arguments that were made under inference mode are copied, since they can never be differentiated.
    """

    @functools.wraps(fn)
    def solve(*args: P.args, **kwargs: P.kwargs) -> R:
        token = asked.set(kwargs)
        try:
            with EVALUATING:
                if not torch.is_inference_mode_enabled():
                    return fn(*usable(args), **usable(kwargs))
                with torch.inference_mode(False), torch.no_grad():
                    return fn(*usable(args), **usable(kwargs))
        finally:
            asked.reset(token)

    return uncompiled(solve)


def differentiates(fn: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that takes derivatives itself: it does so under `torch.inference_mode` and no_grad as well.

    Tensors among its arguments that were made under inference mode are copied.
    """

    @functools.wraps(fn)
    def differentiate(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return fn(*usable(args), **usable(kwargs))

    return differentiate


def uncompiled(fn: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, which loads the compiler only where something was compiled."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiler_is_loaded():
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(fn))
        return disabled[0](*args, **kwargs)

    break_graph(call)
    call.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return call


def usable(tree: Tree) -> Tree:
    """The tree, with copies of tensors that were made under inference mode."""
    if not any(leaf.is_inference() for leaf in tensors(tree)):
        return tree
    return map_tensors(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, tree)
