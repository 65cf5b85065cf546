"""A device that nobody has: tensors without values on it, where mixing it with the CPU is an error."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
import torch._functorch.config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "lazy:0"
"""Autograd asks the driver for a stream as soon as it sees a CUDA tensor, fake or not; where there is no driver, the
device is one that PyTorch knows and nobody has."""

KIND = torch.device(DEVICE).type


class Answers(TorchDispatchMode):
    """Answers every look at a value, which fake tensors refuse, and counts them: yes, or a number that serves.

    Args:
        going: whether ``any()`` is true: of problems that are to go on it keeps a solver at work, of faults it is an
            error.

    Attributes:
        looks: how many. copies: to the device and from it.
    """

    def __init__(self, going):
        super().__init__()
        self.going = going
        self.looks, self.copies = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.looks += args[0].device.type == KIND
            if args[0].dtype is torch.bool:
                return self.going or not getattr(args[0], "asks_for_any", False)
            return 1.0 if args[0].is_floating_point() else 0  # of codes: converged, and nothing is pending
        if func is torch.ops.aten.equal.default:
            self.looks += 1
            return True
        if func is torch.ops.aten.is_set_to.default:  # real devices have it
            mine, other = (tensor.untyped_storage()._cdata for tensor in args)
            return mine == other and args[0].shape == args[1].shape and args[0].stride() == args[1].stride()
        result = func(*args, **kwargs)
        if func is torch.ops.aten.any.default:
            result.asks_for_any = True
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copies[f"{args[0].device.type} to {result.device.type}"] += 1
        return result


@contextlib.contextmanager
def without_autocast():
    """The device is allowed to be asked for autocast, which it has none of."""
    asked, dtype, entered = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != KIND and asked(kind))
        patch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float32 if kind == KIND else dtype(kind))
        patch.setattr(
            torch,
            "autocast",
            lambda kind, *rest, **more: contextlib.nullcontext() if kind == KIND else entered(kind, *rest, **more),
        )
        yield


@contextlib.contextmanager
def fake_device(going=False):
    """Everything inside is made of fake tensors; yields the `Answers`."""
    with (
        without_autocast(),
        torch._functorch.config.patch(fake_tensor_allow_meta=True),
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(),
        Answers(going) as answers,
    ):
        yield answers
