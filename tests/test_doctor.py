"""``python -m bilevel.doctor`` tells what is there, what is missing for what, and finds a wrong gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bilevel as bl
from bilevel import doctor
from bilevel.problems import Ridge


def test_it_ends_well_and_soon():
    done = subprocess.run([sys.executable, "-m", "bilevel.doctor"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bilevel {bl.__version__}" in done.stdout
    assert f"torch {doctor.version('torch')}" in done.stdout
    assert "OMP_NUM_THREADS" in done.stdout
    assert done.stdout.count("right") >= 2 * len(doctor.PROBLEMS)
    assert not done.stderr


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    exact = Ridge.hypergradient
    monkeypatch.setattr(Ridge, "hypergradient", lambda self, x: exact(self, x) * (1 + 1e-2))
    assert doctor.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(lines) == sum(map(len, doctor.devices().values()))
    assert all("ridge" in line for line in lines)


def test_a_check_that_fails_is_told(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "solve", fail)
    found = list(doctor.gradients())
    assert not any(right for _, right in found)
    assert "no kernel image" in found[0][0]


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    wanted = ["torch>=2.11", 'optuna>=5.0; extra == "tuning"', 'bilevel[tuning]; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "optuna" else "1.0")
    assert doctor.requirements() == {"": ["torch"], "tuning": ["optuna"]}
    assert any('missing optuna: pip install "bilevel[tuning]"' in line for line in doctor.versions())


@pytest.mark.parametrize("dtype", doctor.BOUNDS)
def test_errors_are_those_of_the_hypergradients(dtype):
    for name in doctor.PROBLEMS:
        assert 0 <= doctor.error_of(name, "cpu", dtype) <= doctor.BOUNDS[dtype]
