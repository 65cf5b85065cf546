"""Names of files in texts: the same in every locale, with bytes for what is not UTF-8, and letters for pictures."""

from __future__ import annotations

import os


def portable(text: str) -> str:
    """A name, or a text with some, as it is in a locale of UTF-8; elsewhere Python escapes the bytes of each letter.

    Bytes that are not UTF-8 stay escaped.
    """
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # it has letters that this locale has not: it is portable already
        return text


def local(text: str) -> str:
    """The inverse of `portable`: a name by which this process finds its file."""
    return os.fsdecode(to_bytes(text))


def to_bytes(text: str) -> bytes:
    """The content of a text file: UTF-8, and of a name the bytes that it has."""
    return text.encode("utf-8", "surrogateescape")


def from_bytes(content: bytes) -> str:
    """The inverse of `to_bytes`."""
    return content.decode("utf-8", "surrogateescape")


def legible(text: str) -> str:
    """The text with a mark in place of every byte that is no letter: fonts have none for it."""
    return to_bytes(text).decode("utf-8", "replace")
