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


WRITES = {
    ".lock": lambda folder: folder.hold(),
    "report.md": lambda folder: folder.write_bytes("report.md", b"new"),
    "results.json": lambda folder: folder.write_json("results.json", {}),
    "metrics.jsonl": lambda folder: folder.append_metrics({"step": 1}),
    "solver.json": lambda folder: folder.write_settings("solver.json", {"strength": 1.0}),
    "checkpoint.pt": lambda folder: folder.save_checkpoint({"step": 1}, "checkpoint.pt"),
    "checkpoint.pt.next": lambda folder: folder.save_checkpoint({"step": 1}, "checkpoint.pt"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link_that_a_folder_came_with(name, there, tmp_path):
    folder, outside = RunFolder(tmp_path / "run"), tmp_path / "precious"
    folder.path.mkdir()
    if there:
        outside.write_bytes(b"old")
    (folder.path / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a symbolic link"):
        WRITES[name](folder)
    assert outside.read_bytes() == b"old" if there else not outside.exists()


def test_what_was_there_before_a_new_file_is_never_replaced_through_a_link(tmp_path):
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "a.json").symlink_to(tmp_path / "precious")
    (tmp_path / "a-2.json").symlink_to(tmp_path / "nowhere")
    assert RunFolder(tmp_path).write_new(["a.json", "a-2.json", "a-3.json"], b"x") == tmp_path / "a-3.json"
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert not (tmp_path / "nowhere").exists()
