"""A run does not die of where it prints to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from applications.frame.output import forgiving
with forgiving():
    for line in range(20_000):
        print(line, "." * 50)
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("to", ["| head -c 10", "> /dev/full", ">&-", "> /dev/full 2> /dev/full", ">&- 2>&-"])
def test_it_goes_on_without_its_output(to, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} {tmp_path / 'end'} {to}"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "end").read_text() == "done"
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    if "2>" not in to and to != ">&-":
        assert "standard output cannot be written" in done.stderr
