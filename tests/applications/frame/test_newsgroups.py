"""20 newsgroups from an archive of texts: what scikit-learn makes of them, and nothing outside of the archive."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from applications.frame.data import load, newsgroups
from applications.frame.errors import UserError

GROUPS = [f"group.{index:02d}" for index in range(20)]


def archive(root: Path, extra: tuple[tuple[str, bytes], ...] = (), groups: list[str] = GROUPS) -> Path:
    path = root / newsgroups.ARCHIVE
    with tarfile.open(path, "w:gz") as file:
        texts = [
            (f"{part}/{group}/{number}", f"{group} {part[-5:]} word{number} caf\xe9 the".encode("latin1"))
            for part in newsgroups.PARTS
            for group in groups
            for number in (1, 2)
        ]
        for name, content in (*texts, *extra):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_counts_and_groups_are_scikit_learns(tmp_path):
    archive(tmp_path)
    found = load("20newsgroups", tmp_path, sparse=True)
    texts = [[f"{g} {part[-5:]} word{n} caf\xe9 the" for g in GROUPS for n in (1, 2)] for part in newsgroups.PARTS]
    vectorizer = CountVectorizer()
    counts = np.vstack([vectorizer.fit_transform(texts[0]).toarray(), vectorizer.transform(texts[1]).toarray()])
    np.testing.assert_allclose(found.features.toarray(), normalize(counts.astype(float)), rtol=1e-15)
    assert found.targets.tolist() == [index for index in range(20) for _ in range(2)] * 2
    assert found.num_classes == 20


def test_members_that_lead_elsewhere_are_not_written(tmp_path):
    (tmp_path / "data").mkdir()
    elsewhere = ("../evil", "/tmp/evil-newsgroups", "20news-bydate-train/../evil")
    archive(tmp_path / "data", tuple((name, b"x") for name in elsewhere))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="has 21 groups"):  # '..' is none
        load("20newsgroups", tmp_path / "data", sparse=True)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil-newsgroups").exists()


def test_the_cache_of_scikit_learn_is_a_pickle_and_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "RAN",)

    for name in ("20newsgroup_vectorized_py3.pkl", "20news-bydate_py3.pkz"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is a pickle, which can run anything"):
        load("20newsgroups", tmp_path, sparse=True)
    assert not (tmp_path / "RAN").exists()


def test_a_damaged_archive_and_another_are_told(tmp_path):
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"20news-bydate.tar.gz can't be used"):
        load("20newsgroups", tmp_path, sparse=True)
    archive(tmp_path, groups=GROUPS[:3])
    with pytest.raises(UserError, match="it has 3 groups"):
        load("20newsgroups", tmp_path, sparse=True)
    archive(tmp_path, ((f"{newsgroups.PARTS[0]}/{GROUPS[0]}/9", b"x" * (newsgroups.MOST_BYTES + 1)),))
    with pytest.raises(UserError, match="is no message"):
        load("20newsgroups", tmp_path, sparse=True)
