"""Counts what a program asks the host to know: looks at values, and copies between devices."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import recording

LOOKS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item", "aten::equal", "aten::nonzero")
"""Operations whose result the host waits for: ``bool``, ``float``, ``int``, ``.item()``, ``torch.equal``, masks."""


class Looks(TorchDispatchMode):
    """Counts the looks of what runs inside, by the line of the library that looks.

    Attributes:
        at: how often, by file and line.
    """

    def __init__(self):
        super().__init__()
        self.at = Counter()

    @property
    def count(self):
        return sum(self.at.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        masked = name == "aten::index" and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])
        if name in LOOKS or masked:
            self.at[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place():
    frames = [f for f in traceback.extract_stack() if "/bilevel/" in f.filename]
    return f"{frames[-1].filename.rsplit('/bilevel/')[-1]}:{frames[-1].name}" if frames else "elsewhere"


@contextlib.contextmanager
def looks_cost(monkeypatch):
    """Inside, a CPU is a device on which looks are not free, and they are counted."""
    with monkeypatch.context() as patch:
        patch.setattr(recording, "FREE_LOOKS", set())
        with Looks() as looks:
            yield looks
