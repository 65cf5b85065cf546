"""20 newsgroups from its archive of texts, which is read and never unpacked: scikit-learn's own cache runs on reading.

Lang, "NewsWeeder: learning to filter netnews", ICML 1995; the version sorted by date, of Rennie.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np
import scipy

from applications.frame.data.files import unusable
from applications.frame.errors import UserError

ARCHIVE = "20news-bydate.tar.gz"
ADDRESS = "https://ndownloader.figshare.com/files/5975967"
NUM_CLASSES = 20
PARTS = "20news-bydate-train", "20news-bydate-test"
MOST_BYTES = 10**6
"""Bytes of one message, by far: a small archive can hold more than a memory does."""


def load(root: Path) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Counts of words ``[n, d]``, each message's of norm 1, and its group ``[n]``; training messages come first.

    The words are those of the training messages, as in ``sklearn.datasets.fetch_20newsgroups_vectorized``.

    Raises:
        UserError: there is no archive in the folder, or it is damaged or another.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    path = root / ARCHIVE
    if not path.is_file():
        raise UserError(
            f"20 newsgroups is not in {root}: its archive {ARCHIVE} is looked up there. Put it there from {ADDRESS}, "
            "or set --data-root or $BILEVEL_DATA. scikit-learn's cache of it (.pkz, .pkl) is a pickle, which can run "
            "anything as it is read, so it is not."
        )
    try:
        texts = {part: _texts(path, part) for part in PARTS}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise unusable(path, error) from error
    groups = sorted({group for found in texts.values() for group, _ in found})
    if len(groups) != NUM_CLASSES or not all(texts.values()):
        raise unusable(path, f"it has {len(groups)} groups in {' and '.join(PARTS)}, not {NUM_CLASSES}")
    vectorizer = CountVectorizer(dtype=np.int16)
    train, test = ([text for _, text in texts[part]] for part in PARTS)
    counts = scipy.sparse.vstack([vectorizer.fit_transform(train), vectorizer.transform(test)], format="csr")
    number = {group: index for index, group in enumerate(groups)}
    targets = np.array([number[group] for found in texts.values() for group, _ in found], np.int64)
    return scipy.sparse.csr_array(normalize(counts.astype(np.float64))), targets


def _texts(path: Path, part: str) -> list[tuple[str, str]]:
    """Group and text of each message, in the order of their names."""
    found = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            folder, group, name = (*member.name.split("/"), "", "")[:3]
            if not member.isfile() or folder != part or not name:
                continue
            file = archive.extractfile(member)
            if file is None or member.size > MOST_BYTES:
                raise tarfile.ReadError(f"{member.name} is no message: {member.size} bytes")
            found[group, name] = file.read().decode("latin1")
    return [(group, text) for (group, _), text in sorted(found.items())]
