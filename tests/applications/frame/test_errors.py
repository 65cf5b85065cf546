"""How a command ends: exit codes, and no traceback for what is not its fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = "import sys; from applications.frame.errors import UserError, exit_code\n{}\nsys.exit(exit_code(command))"
PRINTS = "def command(): print('x' * 100)"
REFUSES = "def command(): raise UserError('no')"


@pytest.mark.parametrize(
    ("program", "to", "code"),
    [
        (PRINTS, "> /dev/full", 2),
        (PRINTS, ">&-", 0),
        (PRINTS, "> /dev/full 2> /dev/full", 2),
        (REFUSES, "2> /dev/full", 2),
        (REFUSES, ">&- 2>&-", 2),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])  # a buffer is written at the end, or as Python ends
def test_a_stream_that_cannot_be_written_is_no_traceback(program, to, code, unbuffered):
    command = f'{sys.executable} -c "{PROGRAM.format(program)}" {to}'
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_that_went_is_no_traceback():
    program = PROGRAM.format("import time\ndef command(): time.sleep(0.5); print('x')")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


def test_ctrl_c_while_a_command_is_imported_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "applications.few_shot", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in process.stderr if line.endswith("applications\n"))  # of it nothing else has begun
    assert line
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == -signal.SIGINT
    assert "Traceback" not in rest
