"""One writer to a folder: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from applications.frame.errors import UserError

NAME = ".lock"


def refuse_link(path: Path) -> None:
    """A folder that somebody sent can have a link to any file of its reader's, which would be written over.

    Raises:
        UserError: the path is a symbolic link.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which may lead anywhere: it is not written through. Remove it.")


class Lock:
    """A lock of a folder, held from its making to `release` or to the end of the process.

    Raises:
        UserError: another process holds it; the message says which.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        while True:
            refuse_link(self.path)
            opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._file: BinaryIO = os.fdopen(opened, "a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.seek(0)
                holder = _told(self._file.read())
                self._file.close()
                raise UserError(
                    f"{folder} is in use by {holder}: two processes that write into one folder would spoil it. Wait "
                    "for it to end, stop it, or take another folder."
                ) from error
            if self._is_at_its_path():
                break
            self._file.close()  # its holder removed it between the two calls
        self._file.truncate(0)
        about = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(about).encode())
        self._file.flush()

    def release(self) -> None:
        """Let another process in; nothing is left in the folder."""
        with suppress(OSError):
            self.path.unlink()
        self._file.close()

    def _is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


def _told(content: bytes) -> str:
    try:
        about = json.loads(content)
        return f"process {about['process']} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError, TypeError):  # it was taken this moment
        return "another process"
