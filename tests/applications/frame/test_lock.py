"""One writer to a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from applications.frame.errors import UserError
from applications.frame.lock import Lock
from applications.frame.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
HOLD = (
    "import pathlib, sys, time; from applications.frame.lock import Lock\n"
    "lock = Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_and_told_who_holds_it_until_that_one_is_dead(holder, tmp_path):
    with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on .*, since 20"):
        Lock(tmp_path)
    holder.kill()
    holder.wait()
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_of_two_new_runs_at_once_one_is_refused(tmp_path):
    first, second = RunFolder.new(tmp_path / "run"), RunFolder.new(tmp_path / "run")  # neither is there yet
    first.begin({"seed": 1})
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        second.begin({"seed": 2})
    first.release()
    with pytest.raises(UserError, match="holds a run already"):
        second.begin({"seed": 2})
    assert first.read_json("config.json") == {"seed": 1}


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".config.json.0-1.partial", "checkpoint.pt.next"):
        (tmp_path / name).write_bytes(b"half")
    folder = RunFolder(tmp_path)
    folder.hold()
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_at_once_take_two_names(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    write = RunFolder.write_bytes

    def with_another(self, name, content):
        if name == "a.json":  # its name is taken, and nothing is in it yet
            assert RunFolder(tmp_path).write_new(["a.json", "a-2.json"], b"other") == tmp_path / "a-2.json"
        write(self, name, content)

    monkeypatch.setattr(RunFolder, "write_bytes", with_another)
    assert folder.write_new(["a.json", "a-2.json"], b"one") == tmp_path / "a.json"
    assert [(tmp_path / name).read_bytes() for name in ("a.json", "a-2.json")] == [b"one", b"other"]
    with pytest.raises(UserError, match=r"a-2\.json exists, and is not overwritten"):
        folder.write_new(["a.json", "a-2.json"], b"third")


def test_a_new_file_that_cannot_be_written_leaves_its_name_free(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(RunFolder, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        RunFolder(tmp_path).write_new(["a.json"], b"x")
    assert list(tmp_path.iterdir()) == []
