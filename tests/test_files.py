"""What `write_atomically` promises: whole files under threads, crashes, links and permissions."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bilevel.files import write_atomically


def put(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    put(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_threads_write_one_file_at_once(tmp_path):
    """Each in several parts, so that two of them would mix in a shared temporary file."""
    path = tmp_path / "file"
    contents = [bytes([65 + number]) * 4096 for number in range(8)]

    def write(number: int) -> None:
        def parts(file):
            for begin in range(0, 4096, 512):
                file.write(contents[number][begin : begin + 512])
                file.flush()

        write_atomically(path, parts)
        assert path.read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [number % 8 for number in range(64)]))
    assert path.read_bytes() in contents
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    put(tmp_path / "file", b"new")
    assert mode(tmp_path / "file") == mode(plain)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o755, 0o666])
def test_permissions_stay(tmp_path, permissions):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    path.chmod(permissions)

    def write(file):
        seen.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        file.write(b"new")

    write_atomically(path, write)
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)
    assert seen == [permissions]  # from the start: a secret is never readable for a while


@pytest.mark.parametrize("relative", [True, False])
def test_a_symbolic_link_stays_one(tmp_path, relative):
    (tmp_path / "data").mkdir()
    target, link, chain = tmp_path / "data" / "file", tmp_path / "link", tmp_path / "chain"
    target.write_bytes(b"old")
    link.symlink_to(Path("data/file") if relative else target)
    chain.symlink_to("link")
    put(chain, b"new")
    assert chain.is_symlink()
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chain", "data", "file", "link"]


def test_a_link_to_a_file_that_is_yet_to_come(tmp_path):
    (tmp_path / "link").symlink_to("later/file")
    put(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later" / "file").read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise error

    for target in (path, tmp_path / "new" / "folder" / "file"):
        with pytest.raises(error):
            write_atomically(target, fail)
    assert [left.name for left in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        put(tmp_path / "folder", b"new")
    assert [left.name for left in tmp_path.rglob("*")] == ["folder"]


def test_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    put(path, b"new")
    assert path.read_bytes() == b"new"


def test_file_and_folder_reach_the_disk(tmp_path, monkeypatch):
    """The content before the name, and the name of the file and of every folder that was made."""
    calls, sync, replace = [], os.fsync, Path.replace

    def seen(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "replace", lambda self, target: calls.append("replace") or replace(self, target))
    put(tmp_path / "a" / "b" / "file", b"new")
    assert calls[0].suffix == ".partial"
    assert calls[1:] == ["replace", tmp_path / "a" / "b", tmp_path / "a", tmp_path]


def test_what_killed_processes_began_is_removed_by_the_next_and_that_of_the_living_is_not(tmp_path):
    script = (
        "import os, pathlib, sys, time\n"
        "from bilevel.files import write_atomically\n"
        "def half(file): file.write(b'half'), print('.', flush=True), time.sleep(99)\n"
        "write_atomically(pathlib.Path(sys.argv[1]), half)"
    )
    path = tmp_path / "file"
    killed, living = (
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) for _ in range(2)
    )
    try:
        assert killed.stdout.read(1) == living.stdout.read(1) == b"."
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.glob(".file.*.partial"))) == 2
        put(path, b"new")
        (left,) = tmp_path.glob("*.partial")
        assert f"-{living.pid}-" in left.name
        assert path.read_bytes() == b"new"
    finally:
        living.kill()
        living.wait()
