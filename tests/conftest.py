"""How the suite runs: the whole of it over the processor's cores, a single file in one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # most tensors here are too small for two threads; workers inherit it

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, or behind a script: some tests send these
        signal.signal(number, usual)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The workers of ``-n auto``, the default: none where files or single tests were named, and each costs a start."""
    whole = all(Path(argument.partition("::")[0]).is_dir() for argument in config.args)
    return min(os.cpu_count() or 1, 8) if whole else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that began last would keep one worker busy, and the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("applications")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are looked at where they are solved for the first time: in each test, whatever ran before it."""
    from bilevel.inner import first_look  # here, so that a run of some files imports what they do

    monkeypatch.setattr(first_look, "LOOKED", first_look.Known())
