from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
import scipy.sparse

from applications.frame.data import EMBEDDED, load, split
from applications.frame.errors import UserError


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in EMBEDDED.items() for name in names])
def test_embedded_sets(task, name):
    examples = load(name, task=task)
    assert examples.features.shape[0] == len(examples) > 100
    assert np.isfinite(examples.features).all()
    assert examples.num_classes == (len(set(examples.targets)) if task == "classification" else 0)
    features, targets = examples.tensors()
    assert features.dtype == targets.dtype or task == "classification"


def test_digits_are_images():
    digits = load("digits")
    assert digits.image == (1, 8, 8)
    assert digits.features.min() == 0
    assert digits.features.max() == 1


def test_real_mnist(mnist_root):
    mnist = load("mnist", mnist_root)
    assert len(mnist) >= 35_000
    assert mnist.image == (1, 28, 28)
    assert mnist.num_classes == 10
    assert mnist.targets[:5].tolist() == [5, 0, 4, 1, 9]  # as everywhere


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def test_mnist_in_torchvisions_format(tmp_path):
    random, raw = np.random.default_rng(0), tmp_path / "MNIST" / "raw"
    for part, size in (("train", 30), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(0, 256, (size, 28, 28), np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(size) % 10).astype(np.uint8))
    mnist = load("mnist", tmp_path)
    assert mnist.features.shape == (40, 784)
    assert mnist.targets[30:].tolist() == list(range(10))
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03damaged")
    with pytest.raises(UserError, match="damaged"):
        load("mnist", tmp_path)


def test_cifar10_in_torchvisions_format(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, entry):
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return name, hashlib.md5(content).hexdigest()

    def batch(size, base):
        pixels = np.zeros((size, 3, 32, 32), np.uint8)
        pixels[:, 1] = base + np.arange(size)[:, None, None]  # green
        return {"data": pixels.reshape(size, -1), "labels": [i % 10 for i in range(size)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(30, 0))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(10, 100))])
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    cifar = load("cifar10", tmp_path)
    assert cifar.image == (3, 32, 32)
    assert cifar.targets[30:].tolist() == list(range(10))
    images = cifar.features.reshape(-1, 3, 32, 32) * 255
    assert np.allclose(images[31, 1], 101)
    assert (images[:, [0, 2]] == 0).all()
    (folder / "test_batch").write_bytes(b"damaged")  # never unpickled: its checksum is wrong
    with pytest.raises(UserError, match=r"CIFAR-10 is not in .*corrupted"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"1 features are NaN or infinite \(the first in row 7\)"),
        ("range", "labels go from -5 to 1, out of range"),
        ("empty", "class 1 has no example, of 3"),
        ("halves", "labels must be whole numbers"),
        ("shapes", r"targets \(59,\)"),
        ("sparse", "needs dense features"),
        ("damaged", "can't be used"),
        ("missing", "There is no file"),
    ],
)
def test_bad_files(bad_files, name, message):
    with pytest.raises(UserError, match=message):
        load(str(bad_files[name]))


@pytest.mark.parametrize("dtype", ["U8", "S8", "complex128", "datetime64[s]"])
@pytest.mark.parametrize("which", ["features", "targets"])
def test_what_could_be_made_numbers_is_none(which, dtype, tmp_path):
    arrays = {"features": np.ones((60, 4)), "targets": np.arange(60) % 3}
    np.savez(tmp_path / "a.npz", **{**arrays, which: arrays[which].astype(dtype)})
    with pytest.raises(UserError, match="must be numbers, not"):
        load(str(tmp_path / "a.npz"))


def test_a_damaged_part_of_an_archive(tmp_path):
    """Each flipped byte is another error of zipfile, zlib or numpy, or none where it names nothing that is read."""
    path, random = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez_compressed(path, features=random.normal(size=(60, 4)), targets=np.arange(60) % 3)
    whole = path.read_bytes()
    for place in random.integers(len(whole), size=100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with suppress(UserError):
            load(str(path))


def test_wrong_names_and_roots(tmp_path):
    with pytest.raises(UserError, match="no data set 'digit' for classification"):
        load("digit")
    with pytest.raises(UserError, match=r"no data set 'digits' for regression\. There are diabetes"):
        load("digits", task="regression")
    with pytest.raises(UserError, match="MNIST is not in"):
        load("mnist", tmp_path)
    with pytest.raises(UserError, match="20 newsgroups is not in"):
        load("20newsgroups", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        load("mnist", tmp_path / "file")
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="no features and no targets; it has x"):
        load(str(tmp_path / "x.npz"))


def test_sparse_files_where_they_are_taken(bad_files, tmp_path):
    examples = load(str(bad_files["sparse"]), sparse=True)
    assert scipy.sparse.issparse(examples.features)
    assert examples.features.shape == (60, 3)
    (tmp_path / "signs.svm").write_text("".join(f"{(-1) ** i} 1:{i + 1}\n" for i in range(10)))
    assert load(str(tmp_path / "signs.svm"), sparse=True).targets.tolist() == [1, 0] * 5


def test_split_is_disjoint_and_stratified():
    digits = load("digits")
    parts = split(digits, (0.5, 300, 200), seed=1)
    assert [len(part) for part in parts] == [898, 300, 200]
    rows = np.concatenate([part.features for part in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert np.bincount(parts[1].targets).min() >= 28
    again = split(digits, (0.5, 300, 200), seed=1)
    assert (again[2].features == parts[2].features).all()
    assert sum(map(len, split(digits, (0.5, 0.25, 0.25), seed=0))) == len(digits)
    whole = split(digits, (1.0,), seed=0)
    assert sorted(whole[0].features.sum(1)) == pytest.approx(sorted(digits.features.sum(1)))


def test_impossible_splits():
    iris = load("iris")
    with pytest.raises(UserError, match="150 examples, and parts of 100, 60"):
        split(iris, (100, 60), seed=0)
    with pytest.raises(UserError, match="iris cannot be split into parts of 2, 10"):
        split(iris, (2, 10), seed=0)
