"""What a checkpoint is: tensors and plain values as bytes that carry their hash, and when two states are the same."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FORMAT = 1

_MARK = b"\nsha256 "
_SEAL = len(_MARK) + 64 + 1


class Damaged(ValueError):
    """Why bytes are no checkpoint."""


def to_bytes(state: dict[str, Any]) -> bytes:
    """The state as `torch.save` writes it, then a line with the hash of that, which `torch.load` does not mind."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    return content + _MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


def from_bytes(content: bytes, device: torch.device) -> tuple[dict[str, Any], bool]:
    """The inverse of `to_bytes`, without executing anything, and whether there was a hash: earlier versions wrote none.

    Raises:
        Damaged: the hash is not that of the content, or the content is something else.
    """
    if not content:
        raise Damaged("it is empty")
    seal = content[-_SEAL:]
    sealed = seal.startswith(_MARK)
    if sealed and hashlib.sha256(content[:-_SEAL]).hexdigest().encode() != seal[len(_MARK) : -1]:
        raise Damaged("its content has another hash than it says")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # pickle's, zipfile's and PyTorch's own, a dozen types by where the damage is
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise Damaged(f"it is cut short, or holds more than tensors and numbers ({reason})") from error
    if not isinstance(state, dict):
        raise Damaged(f"it holds a {type(state).__name__}, where a dict of a training's state is expected")
    format = state.pop("format", 0)
    if format not in (0, FORMAT):
        raise Damaged(f"it is of format {format}, of a later version of the program")
    if sealed != (format == FORMAT):
        raise Damaged("its hash is missing")
    return state, sealed


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two states differ, exactly: types, names, lengths, shapes, dtypes and values; NaN is NaN."""
    if type(one) is not type(other):
        yield f"{place or 'the state'} is {_kind(one)}, not {_kind(other)}"
    elif isinstance(one, Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield f"{place} is {_kind(one)}, not {_kind(other)}"
        elif not torch.equal(one.nan_to_num(), other.nan_to_num().to(one.device)):
            yield f"{place} has other values"
    elif isinstance(one, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            inner = f"{place}.{name}" if place else str(name)
            if name not in one or name not in other:
                yield f"{inner} is {'missing' if name not in one else 'unknown'}"
            else:
                yield from differences(one[name], other[name], inner)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{place} has {len(one)} entries, not {len(other)}"
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{place}[{index}]")
    elif one != other and not (isinstance(one, float) and math.isnan(one) and math.isnan(other)):
        yield f"{place} is {one!r}, not {other!r}"


def not_finite(state: Any, place: str = "") -> Iterator[str]:
    """Names of the tensors that hold a NaN or an infinity: a training does not come back from there."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(torch.isfinite(state).all()):
            yield place
    elif isinstance(state, dict):
        for name, value in state.items():
            yield from not_finite(value, f"{place}.{name}" if place else str(name))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from not_finite(value, f"{place}[{index}]")


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict` that does not take averages of another shape than their parameter's: they would be broadcast.

    Raises:
        ValueError: naming the entry.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, entries in saved["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != params[index].shape:
                shape, right = list(value.shape), list(params[index].shape)
                raise ValueError(f"{name} of parameter {index} of the optimizer is {shape}, not {right}")
    optimizer.load_state_dict(saved)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
