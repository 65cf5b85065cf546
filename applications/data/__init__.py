"""Data sets that several applications read, checked as they come in."""

from applications.data.examples import EMBEDDED, Examples, load, split
from applications.data.files import data_root
from applications.data.noise import mislabel

__all__ = ["EMBEDDED", "Examples", "data_root", "load", "mislabel", "split"]
