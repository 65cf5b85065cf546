"""How a solve learns that its problem is summed over the ranks of `torch.distributed`, and what it then asks of them.

Nothing here imports `torch.distributed`: the functions of `bilevel.distributed` tell who watches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The ranks over which a function is summed. Each method is a collective that all of them call."""

    def check_same(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raise a ValueError on every rank where the bits of these tensors differ; ``what`` names them."""

    def first(self, number: int) -> int:
        """The number that the first rank has."""

    def operator(self, factory: Callable[..., Any], *args: Any) -> Any:
        """``factory(*args)``, of all data; refused with a ValueError where it is that of a rank's own data."""


class Watch:
    """A block in which functions are evaluated; ``ranks``: those over which one of them was summed, or None."""

    def __init__(self) -> None:
        self.ranks: Ranks | None = None
        self._token: Token[Watch | None] | None = None

    def __enter__(self) -> Watch:
        self._token = _watching.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _watching.reset(self._token)
        if self.ranks is not None:
            tell_ranks(self.ranks)  # a problem inside of another one


def tell_ranks(ranks: Ranks) -> None:
    """Tell who watches that a function is being summed over these ranks."""
    watch = _watching.get()
    if watch is not None:
        watch.ranks = ranks


_watching: ContextVar[Watch | None] = ContextVar("watching", default=None)

asked: ContextVar[Mapping[str, Any] | None] = ContextVar("asked", default=None)
"""The keywords of the solve that is being made."""


def is_ignored() -> bool:
    """Whether that solve ignores failures."""
    given = asked.get()
    return given is not None and given.get("throw") == "ignore"


def check_settings(ranks: Ranks) -> None:
    """Raise a ValueError on every rank where they ask for different solves."""
    given = asked.get()
    if given is None:
        return
    settings = [(name, given.get(name)) for name in ("solver", "hypergrad", "throw")]
    texts = [f"{name}={value!r} {getattr(value, 'callback', None) is None}" for name, value in settings]
    own = re.sub(r" at 0x[0-9a-f]+", "", f"{texts} {given.get('warm_start') is None}")  # an object is elsewhere
    ranks.check_same([torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)], SAME_SETTINGS)


SAME_SETTINGS = (
    "settings of the solve (solver, callback, hypergrad, throw, warm_start), on which depends what is evaluated. Ranks "
    "evaluate together, so that one would wait for the others: give all of them the same settings; what one rank alone "
    "shall print, let its callback decide by bl.distributed.rank()"
)
SAME_START = (
    "params, or hyperparameters that require grad. All ranks take the steps of one solve, which have to be the same to "
    "the last digit: make them under the same seed, or send those of the first rank with bl.distributed.from_first"
)
SAME_GRADIENT = (
    "gradients of the outer loss. Each rank has to have that of all data, to the last digit: take "
    "bl.distributed.sharded(outer). The hypergradient is then whole on every rank, and reduce_gradients is not needed"
)
SAME_OPERATOR = (
    "products of the operator, which is that of this rank's own data. Sum it: "
    "operator=lambda problem, at: bl.distributed.AllReduce(operator(problem, at))"
)
