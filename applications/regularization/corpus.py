"""A corpus that every installation has: the documentation of the libraries it is made with."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import scipy.sparse

from applications.frame.data import Examples

SUBJECTS = (
    "matplotlib.axes",
    "matplotlib.backends",
    "numpy.lib",
    "numpy.ma",
    "numpy.polynomial",
    "scipy.interpolate",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.spatial",
    "scipy.stats",
    "sklearn.decomposition",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sklearn.preprocessing",
    "torch.cuda",
    "torch.distributions",
    "torch.fx",
    "torch.nn",
)
"""The classes: packages that are about one thing each and have a hundred documented functions or so."""
MOST_WORDS, FEWEST_WORDS = 15, 10
"""Most and fewest words of a text: it is cut after the first, and left out below the second."""
MOST_TEXTS = 120
"""Texts of a class: the first, in the order of its files."""


def docstrings() -> Examples:
    """Which package is a function of? From the first words of its docstring, as tf-idf (sparse, rows of norm 1).

    A text is the docstring of a public function or class, without examples, names of packages and what is no word;
    texts that begin alike are kept once. Words that fewer than three texts have are left out. Source files are parsed,
    never imported. The corpus is that of the installed versions: other versions give slightly other numbers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, labels = [], []
    for label, subject in enumerate(SUBJECTS):
        found = list(islice(_different(texts_of(subject)), MOST_TEXTS))
        texts += found
        labels += [label] * len(found)
    features = TfidfVectorizer(min_df=3, sublinear_tf=True).fit_transform(texts)
    return Examples("docstrings", scipy.sparse.csr_array(features), np.asarray(labels, dtype=np.int64), len(SUBJECTS))


def _different(texts: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def texts_of(subject: str) -> Iterator[str]:
    package, part = subject.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / part
    for path in sorted(folder.rglob("*.py")):
        if any(name in ("tests", "testing", "_testing") for name in path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                words = _words(ast.get_docstring(node) or "")
                if len(words) >= FEWEST_WORDS:
                    yield " ".join(words[:MOST_WORDS])


def _words(docstring: str) -> list[str]:
    lines = [line for line in docstring.splitlines() if not line.lstrip().startswith((">>>", "...", "..", "---"))]
    return [word for word in re.findall(r"[a-z]{3,}", " ".join(lines).lower()) if word not in LEAKS]


LEAKS = frozenset(word for subject in SUBJECTS for word in re.findall(r"[a-z]+", subject)) | {
    "np", "plt", "mpl", "scikit", "learn", "pytorch", "matlab",
}  # fmt: skip
"""Words that name the class."""
