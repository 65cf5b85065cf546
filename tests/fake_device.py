"""A device that nobody has: tensors without values on it, where mixing it with the CPU is an error."""

from __future__ import annotations

import contextlib
from collections import Counter

import torch
import torch._functorch.config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "lazy"
"""Autograd asks the driver for a stream as soon as it sees a CUDA tensor, fake or not; where there is no driver, the
device is one that PyTorch knows and nobody has."""


class Answers(TorchDispatchMode):
    """Answers every look at a value, which fake tensors refuse, with yes, or a number that serves; and counts them.

    Attributes:
        looks: how many. copies: to the device and from it.
    """

    def __init__(self):
        super().__init__()
        self.looks, self.copies = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.looks += args[0].device.type == DEVICE
            if args[0].dtype is torch.bool:
                return True
            return 1.0 if args[0].is_floating_point() else self.integer
        if func is torch.ops.aten.is_set_to.default:  # real devices have it
            mine, other = (tensor.untyped_storage()._cdata for tensor in args)
            return mine == other and args[0].shape == args[1].shape and args[0].stride() == args[1].stride()
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copies[f"{args[0].device.type} to {result.device.type}"] += 1
        return result

    integer = 0
    """The code of `Result.CONVERGED`, and what says that nothing is pending."""


@contextlib.contextmanager
def fake_device():
    """Everything inside is made of fake tensors; yields the `Answers`."""
    with (
        torch._functorch.config.patch(fake_tensor_allow_meta=True),
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(),
        Answers() as answers,
    ):
        yield answers
