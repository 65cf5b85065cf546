"""The command that tries what is promised of runs and files, in small; docs/quality.md has its figures in full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [("kills", 0.02), ("studies", 0.02), ("flips", 0.04), ("cuts", 0.02), ("options", 0.002), ("writers", 0.03)],
)
def test_nothing_fails(name, part):
    command = [sys.executable, "-m", "tests.applications.trust", name, "--part", str(part)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of " in done.stdout
