"""Files that a crash leaves whole: the old version or the new one."""

from __future__ import annotations

import glob
import os
import platform
import stat
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that no reader, and no crash, ever sees a part of it; folders are made as needed.

    Threads and processes may write the same file at once: it is then that of the last of them, whole. The file keeps
    the permissions that it had; a symbolic link stays one, and the file that it leads to is replaced. What a process
    that was killed on this machine had begun to write is removed.

    Args:
        path: The file to make or replace.
        write: Called with the open temporary file, which lies in the folder of the file itself.

    Raises:
        OSError: If the folder can't be written; the earlier file is untouched and nothing is left behind. What
            ``write`` raises passes, with the same promise.
    """
    target = Path(os.path.realpath(path))
    made = [folder for folder in target.parents if not folder.exists()]
    beginning = f".{target.name[:20]}.{_MACHINE}-"
    partial = target.with_name(f"{beginning}{os.getpid()}-{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, beginning)
        with partial.open("xb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        for folder in made:  # the innermost first; one that another process uses meanwhile is not empty, and stays
            with suppress(OSError):
                folder.rmdir()
        raise
    for folder in (target.parent, *(folder.parent for folder in made)):
        _sync(folder)


_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
"""Numbers of processes are those of one machine, and a folder may be one of several."""


def _remove_abandoned(folder: Path, beginning: str) -> None:
    """Partial files whose process is gone."""
    for path in folder.glob(f"{glob.escape(beginning)}*.partial"):
        number = path.name.removeprefix(beginning).partition("-")[0]
        if number.isdecimal() and not _runs(int(number)):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
