"""Many processes under `torchrun`: the group, and who writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from bilevel import distributed


@contextmanager
def process_group() -> Iterator[None]:
    """The group of all ranks, NCCL for tensors on GPUs and gloo for others; nothing outside torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # The store outlives a restart, with the addresses of the dead: each attempt has its own names in it.
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Both: a command may be told to stay on the CPU of a machine that has cards.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def leads() -> bool:
    """Whether this process is the one that writes, also before there is a group."""
    return int(os.environ.get("RANK", "0")) == 0


def restarted() -> bool:
    """Whether torchrun started this process again, after a rank had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_name() -> str | None:
    """What torchrun calls this launch, the same after a restart; None outside it."""
    return os.environ.get("TORCHELASTIC_RUN_ID") if "RANK" in os.environ else None


def anywhere(flag: bool) -> bool:
    """Whether it is set on any rank; every rank asks at the same place, and all get the same answer."""
    if distributed.world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(distributed.all_reduce(torch.tensor(float(flag), device=device)) > 0)
