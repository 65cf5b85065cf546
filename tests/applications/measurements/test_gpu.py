"""The call for a GPU, rehearsed: every part runs, and one that fails costs only itself."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch

from applications.measurements.gpu import __main__ as gpu
from applications.measurements.gpu import parts


def test_what_is_no_part_is_told(capsys, tmp_path):
    assert gpu.main(["--device", "cpu", "--parts", "nothing", "--out", str(tmp_path)]) == 2
    assert "--parts nothing: there are tests, captured" in capsys.readouterr().err


def test_no_part_at_all_replaces_nothing(capsys, tmp_path):
    for name in ("gpu --parts", "advice --problems", "benchmarks --workloads"):
        module, option = name.split()
        command = importlib.import_module(f"applications.measurements.{module}.__main__").main
        assert command([option, "--out", str(tmp_path / "out")]) == 2
        assert f"{option}: one at least, each once, is needed." in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_part_that_fails_costs_only_itself(monkeypatch, tmp_path):
    """Results are written after each, with the command and what it printed."""
    programs = {"captured": "raise SystemExit('no luck')", "linear": "print('{\"systems\": 1}')", "memory": "1 / 0"}

    def command(settings, part, device, seconds):
        return [gpu.sys.executable, "-c", programs[part]]

    monkeypatch.setattr(gpu, "_command", command)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--parts", *programs]
    assert gpu.main(arguments) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "captured": "failed",
        "linear": "done",
        "memory": "failed",
    }
    assert found["parts"]["linear"]["rows"] == [{"systems": 1}]
    assert "no luck" in found["parts"]["captured"]["printed"]
    assert "ZeroDivisionError" in found["parts"]["memory"]["printed"]
    assert torch.__version__.startswith(found["versions"]["torch"])


def test_a_part_that_takes_too_long_keeps_its_rows(monkeypatch, tmp_path):
    program = "import time; print('{\"row\": 1}', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu, "_command", lambda *_: [gpu.sys.executable, "-c", program])
    monkeypatch.setattr(gpu, "REHEARSED", 3.0)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "linear", "--minutes", "0.05"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["parts"]["linear"]
    assert found["status"] == "out of time"
    assert found["rows"] == [{"row": 1}]


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(monkeypatch, tmp_path):
    beside = f"import time; time.sleep(6); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {beside!r}]); time.sleep(60)"
    found = gpu._in_own_process([gpu.sys.executable, "-c", program], "cpu", 3.0)
    assert found["status"] == "out of time"
    time.sleep(5)
    assert not (tmp_path / "alive").exists()


def test_solvers_of_the_device_are_as_right_as_those_of_scipy():
    rows = list(parts.linear(torch.device("cpu"), 60.0))
    assert [row["systems"] for row in rows] == [1] * 4 + [16] * 4 + [256] * 4
    assert all(row["largest_error"] <= 3e-6 for row in rows)


AGAIN = ("training-tf32", "training-bf16", "peers-A", "peers-C")
"""On a CPU the training in float32 once more, and the contest of F at other sizes."""


@pytest.mark.slow
def test_the_rehearsal_and_a_second_call_that_goes_on_with_the_papers_training(tmp_path):
    names = [part for part in (*gpu.SHARES, "paper") if part not in AGAIN]
    assert gpu.main(["--device", "cpu", "--minutes", "1", "--out", str(tmp_path), "--parts", *names]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(found) == names
    assert {part: result["status"] for part, result in found.items() if result["status"] == "failed"} == {}
    for part in parts.PARTS.keys() - AGAIN:
        assert found[part]["rows"], part
    assert all(found[part]["evaluation"] for part in found if part.startswith("training-") or part == "paper")

    steps = found["peers-F"]["rows"]
    assert [row["step"] for row in steps if "step" in row] == ["captured", "eager", "task by task"]
    assert all(row["tasks_per_second"] > 0 for row in steps if "step" in row)
    assert "name" in steps[-1]  # a missing peer is told in a row of its own

    steps_made = found["paper"]["last_step"]["step"]
    assert gpu.main(["--device", "cpu", "--parts", "paper", "--minutes", "0.9", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert again["paper"]["last_step"]["step"] > steps_made > 0
    assert again["paper"]["evaluation"]["trained"]["steps"] == again["paper"]["last_step"]["step"]
    assert {name: again[name] for name in names[:-1]} == {name: found[name] for name in names[:-1]}
