"""Commands that measure: what they refuse, one writer, and what they leave when they are ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from applications.frame import measurement, memory
from applications.frame.command import require_at_least_one
from applications.frame.run_folder import RunFolder
from tests.applications.refusals import refusals


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1


@dataclass(frozen=True)
class Options:
    out: Path
    size: int = 1
    rate: float = 1.0
    name: str = "x"
    config: Inner = Inner()


def command(folder: Path, *arguments: str, run=lambda options: None) -> int:
    def check(options: Options) -> None:
        require_at_least_one(options, "size")

    return measurement.main("measurements.x", ["--out", str(folder), *arguments], Options, run, check)


@refusals(
    (["--size=-1"], "--size is -1: it cannot be negative"),
    (["--size=0"], "--size is 0: at least 1 is needed"),
    (["--size=1000000000000"], "--size is 1000000000000"),
    (["--rate=inf"], "--rate is inf: a finite number is needed"),
    (["--config.lr=nan"], "--config.lr is nan: a finite number is needed"),
    ([f"--name={'x' * 300}"], "--name is 'xxx"),
)
def test_bad_options_are_named_and_leave_no_folder(arguments, message, tmp_path, capsys):
    assert command(tmp_path / "a" / "b", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_it_is_the_one_writer_to_its_folder(tmp_path, capsys):
    assert command(tmp_path, run=lambda options: command(options.out)) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert command(tmp_path, run=lambda options: RunFolder(options.out).write_bytes("table.md", b"x")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_settings_that_cannot_be_run_are_named(tmp_path, capsys):
    def run(options):
        raise MemoryError("too much")

    assert command(tmp_path, "--size", "7", "--config.lr", "3", run=run) == 2
    message = capsys.readouterr().err
    assert "--size 7" in message
    assert "--config.lr 3" in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_processes_that_it_started(number, tmp_path):
    """The handler runs while this process waits for the other, which would sleep for a minute."""
    begun, old = time.monotonic(), signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SystemExit) as ended:
            command(tmp_path, run=lambda options: memory.in_own_process(time.sleep, 60))
    finally:
        signal.signal(signal.SIGALRM, old)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    assert not multiprocessing.active_children()
    assert time.monotonic() - begun < 50
    assert list(tmp_path.iterdir()) == []
