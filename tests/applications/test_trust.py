"""The command that tries what is promised of runs and files, in small; docs/quality.md has its figures in full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "part", "least"), [("kills studies flips cuts writers", 0.026, 50), ("options", 0.002, 10)]
)
def test_nothing_fails(names, part, least):
    command = [sys.executable, "-m", "tests.applications.trust", *names.split(), "--part", str(part)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(map(int, re.findall(r": 0 of (\d+)", done.stdout))) >= least, done.stdout
