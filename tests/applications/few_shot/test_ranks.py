"""Training over two real processes: the same run as one, and going on after one of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from applications.few_shot.__main__ import main
from applications.frame.run_folder import RunFolder
from tests.applications.few_shot.test_train import CHECKPOINT, QUICK, ROOT
from tests.applications.runs import comparable

EXACT = [*QUICK, "--tasks", "3", "--precision", "float64", "--learn-strength", "layer"]


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "applications.few_shot", "train", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metas(folder: Path) -> torch.Tensor:
    state = RunFolder(folder).load_checkpoint(torch.device("cpu"), CHECKPOINT)["training"]
    tensors = [*state["meta"].values(), *state["log_strength"].values()]
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture(scope="module")
def alone(glyph_root, tmp_path_factory):
    """One process, eight steps of three tasks, and its arguments but for the folder."""
    arguments = [*EXACT, "--steps", "8", "--data-root", str(glyph_root)]
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*arguments, "--out", str(folder)]) == 0
    return folder, arguments


def same(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a.pop("part") == b.pop("part")
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-6), name


@pytest.mark.slow
def test_two_ranks_are_one(alone, tmp_path):
    """Two tasks on one rank, one on the other: the parameters to 1e-6 (they agree to rounding), the same metrics."""
    folder, arguments = alone
    process = torchrun(*arguments, "--out", str(tmp_path / "two"))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "2 ranks" in printed
    error = (metas(tmp_path / "two") - metas(folder)).norm() / metas(folder).norm()
    assert error < 1e-9
    same(comparable(folder), comparable(tmp_path / "two"))
    assert (tmp_path / "two" / "evaluation.json").exists()
    assert printed.count("Accuracy on") == 1  # the first rank alone writes and prints


@pytest.mark.slow
def test_a_killed_rank_is_restarted_from_the_last_checkpoint(alone, tmp_path):
    folder, arguments = alone
    out = tmp_path / "killed"
    process = torchrun(*arguments, "--steps", "200", "--out", str(out), restarts=2)
    deadline = time.monotonic() + 180
    while len(RunFolder(out).metrics()) < 4:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "applications.few_shot" in child.cmdline() and "torch.distributed.run" not in child.cmdline()
    ]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    before = len(RunFolder(out).metrics())
    while len(RunFolder(out).metrics()) < before + 10:  # it goes on: other processes, the same run
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline + 180
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    steps = [row["step"] for row in RunFolder(out).metrics() if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))  # none lost, none twice
    whole = [row for row in comparable(folder) if "loss" in row]
    resumed = [row for row in comparable(out) if "loss" in row][: len(whole)]
    for a, b in zip(whole, resumed, strict=True):  # the schedule is of another length; the tasks are the same
        assert a["step"] == b["step"]
    assert resumed[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
    assert RunFolder(out).load_checkpoint(torch.device("cpu"), CHECKPOINT)["step"] <= steps[-1]


@pytest.mark.slow
def test_more_ranks_than_tasks(glyph_root, tmp_path):
    process = torchrun(*QUICK, "--tasks", "1", "--data-root", str(glyph_root), "--out", str(tmp_path / "run"))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--tasks is 1 for 2 ranks" in printed
