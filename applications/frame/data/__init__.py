"""Data sets that several applications read, checked as they come in."""

from applications.frame.data.examples import EMBEDDED, Examples, load, split, standardised
from applications.frame.data.files import data_root
from applications.frame.data.noise import mislabel

__all__ = ["EMBEDDED", "Examples", "data_root", "load", "mislabel", "split", "standardised"]
