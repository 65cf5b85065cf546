"""What the memory of a process is measured and kept by."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from applications.frame import memory


def new_pages() -> int:
    """How many pages the system had to give for ten times four tensors of 16 MiB."""
    memory.keep_freed()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(2**22) for _ in range(4)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_kept_for_the_next_tensor(monkeypatch):
    for name in memory.RETURN_FREED:
        monkeypatch.delenv(name, raising=False)
    pages = 2**22 * 4 // resource.getpagesize()
    assert memory.in_own_process(new_pages) < 15 * pages  # some of the ten times
    with memory.environment(memory.RETURN_FREED):  # which goes first
        assert memory.in_own_process(new_pages) > 35 * pages
