"""The data sets: counts, disjoint splits, file formats, and an error that helps for every bad input."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from applications.few_shot.data import ImageClasses, Splits, cifar_fs, data_root, glyphs, load, with_rotations
from applications.few_shot.data import mini_imagenet as mini
from applications.few_shot.data import omniglot as omni
from applications.frame.errors import UserError
from bilevel import files

SHARED = Path(os.environ.get("BILEVEL_DATA") or Path(__file__).parents[3].parent / "shared" / "data")
REAL = SHARED / "omniglot" / "omniglot28.npz"
needs_omniglot = pytest.mark.skipif(not REAL.exists(), reason=f"no Omniglot in {SHARED}")


def parts(splits: Splits) -> list[ImageClasses]:
    return [splits.train, splits.validation, splits.test]


def characters(classes: ImageClasses) -> set[str]:
    return {name.split("@")[0] for name in classes.names}


def assert_disjoint(groups: list[set[str]]) -> None:
    assert sum(map(len, groups)) == len(set().union(*groups))


def nearest_neighbour_accuracy(classes: ImageClasses, tasks: int) -> float:
    """5-way 1-shot on raw pixels, 5 queries a class."""
    generator = torch.Generator().manual_seed(0)
    pixels = classes.images.float().flatten(2)
    right = 0
    for _ in range(tasks):
        ways = torch.randperm(len(classes), generator=generator)[:5]
        shots = torch.randperm(classes.num_instances, generator=generator)[:6]
        task = pixels[ways][:, shots]
        guess = torch.cdist(task[:, 1:].flatten(0, 1), task[:, 0]).argmin(1)
        right += int((guess == torch.arange(5).repeat_interleave(5)).sum())
    return right / (25 * tasks)


# --- the common types ---


def test_rotations_are_classes_of_their_own() -> None:
    images = torch.randint(256, (3, 2, 1, 4, 4), dtype=torch.uint8)
    turned = with_rotations(ImageClasses(images, ("a", "b", "c")))
    assert turned.names[:4] == ("a@0", "b@0", "c@0", "a@90")
    assert (len(turned), turned.num_instances) == (12, 2)
    assert torch.equal(turned.images[:3], images)
    # Counter-clockwise: the right column becomes the top row.
    assert torch.equal(turned.images[4, :, :, 0], images[1, :, :, :, -1])
    assert torch.equal(turned.images[6:9], images.flip(-1, -2))
    back = with_rotations(ImageClasses(turned.images[3:6], ("a", "b", "c"))).images[9:]
    assert torch.equal(back, images)


def test_classes_are_checked() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ImageClasses(torch.zeros(1, 1, 1, 2, 2), ("a",))
    with pytest.raises(ValueError, match="2 names for 1 classes"):
        ImageClasses(torch.zeros(1, 1, 1, 2, 2, dtype=torch.uint8), ("a", "b"))
    with pytest.raises(ValueError, match="square"):
        with_rotations(ImageClasses(torch.zeros(1, 1, 1, 2, 3, dtype=torch.uint8), ("a",)))


def test_root_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "mine"))
    assert data_root() == tmp_path / "mine"
    assert data_root(tmp_path) == tmp_path
    monkeypatch.delenv("BILEVEL_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_root() == tmp_path / "bilevel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "bilevel"


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "characters", "glyphs, omniglot, cifar-fs, mini-imagenet"),
        ("omniglot", "drawers", "'characters' or 'alphabets'"),
        ("glyphs", "alphabets", "Only Omniglot has several"),
    ],
)
def test_unknown_names_and_splits(tmp_path: Path, name: str, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name, tmp_path, split=split)


@pytest.mark.parametrize("name", ["glyphs", "omniglot", "cifar-fs", "mini-imagenet"])
def test_root_that_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load(name, tmp_path / "file")


@pytest.mark.parametrize("name", ["omniglot", "cifar-fs", "mini-imagenet"])
def test_missing_without_download(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"(?s)\. .*\. Try"):
        load(name, tmp_path / "nowhere", download=False)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["omniglot", "cifar-fs"])
def test_torchvision_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="pip install --upgrade torch torchvision"):
        load(name, tmp_path)


def test_interrupted_writing_keeps_the_old_file(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "data.npz").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "data.npz", fail)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# --- glyphs ---


@pytest.fixture(scope="module")
def glyph_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glyphs")
    load("glyphs", root)
    return root


def test_glyphs_counts_and_pixels(glyph_root: Path) -> None:
    splits = load("glyphs", glyph_root)
    assert sum(map(len, parts(splits))) >= 600
    assert len(splits.validation) >= 50
    assert len(splits.test) >= 100
    for part in parts(splits):
        assert part.images.shape == (len(part), 20, 1, 28, 28)
        ink = part.images.float().mean((2, 3, 4)) / 255
        assert ink.min() > 0.01  # no blanks
        assert ink.max() < 0.5  # ink is high, paper is 0
        edge = torch.cat([part.images[..., [0, -1]].flatten(2), part.images[..., [0, -1], :].flatten(2)], 2)
        assert (edge > 127).any(2).float().mean() < 0.02  # hardly a drawing is cut off


def test_glyphs_of_different_splits_share_no_script(glyph_root: Path) -> None:
    splits = load("glyphs", glyph_root)
    assert_disjoint([{name.split(" ")[0] for name in part.names} for part in parts(splits)])
    assert_disjoint([set(part.names) for part in parts(splits)])


def test_glyphs_have_no_twins(glyph_root: Path) -> None:
    images = torch.cat([part.images for part in parts(load("glyphs", glyph_root))])
    drawings = {drawing.numpy().tobytes() for drawing in images.flatten(0, 1)}
    assert len(drawings) == images.shape[0] * 20
    names = [name for part in parts(load("glyphs", glyph_root)) for name in part.names]
    twins = {"LATIN CAPITAL LETTER H", "GREEK CAPITAL LETTER ETA", "CYRILLIC CAPITAL LETTER EN"}
    assert len(twins.intersection(names)) == 1
    means = torch.nn.functional.normalize(images.float().mean(1).flatten(1))
    assert ((means @ means.T).fill_diagonal_(0) < 0.98).all()  # the classes' mean drawings differ


def test_glyphs_are_hard_for_a_pixel_neighbour(glyph_root: Path) -> None:
    assert 0.5 < nearest_neighbour_accuracy(load("glyphs", glyph_root).test, tasks=1000) < 0.7


def test_glyphs_are_the_same_in_every_build(glyph_root: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (no global generator has a say)
    images, names = glyphs.build()
    with np.load(glyph_root / "glyphs" / "glyphs28-v1.npz") as cached:
        assert np.array_equal(cached["images"], images)
        assert np.array_equal(cached["names"], names)


def small_build() -> tuple[np.ndarray, np.ndarray]:
    """Stands in for the build of some seconds: one class of each split."""
    return np.full((3, 20, 28, 28), 7, np.uint8), np.array(["GREEK A", "HEBREW A", "NKO A"])


def test_glyphs_cache_is_used(glyph_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "build", lambda: pytest.fail("built although cached"))
    assert len(load("glyphs", glyph_root).test) >= 100


@pytest.mark.parametrize("damage", ["truncated", "random bytes", "wrong shape", "names cut"])
def test_glyphs_damaged_cache_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(glyphs, "build", small_build)
    load("glyphs", tmp_path)
    cache = tmp_path / "glyphs" / "glyphs28-v1.npz"
    good = cache.read_bytes()
    images, names = small_build()
    if damage == "truncated":
        cache.write_bytes(good[:-200])
    elif damage == "random bytes":
        cache.write_bytes(random.Random(0).randbytes(500))
    elif damage == "wrong shape":
        np.savez(cache, images=images[:, :5], names=names)
    else:
        np.savez(cache, images=images, names=names[:2])
    splits = load("glyphs", tmp_path)
    assert [part.names for part in parts(splits)] == [("GREEK A",), ("HEBREW A",), ("NKO A",)]
    assert (splits.test.images == 7).all()
    with np.load(cache) as repaired:
        assert np.array_equal(repaired["images"], images)


def test_glyphs_without_a_place_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "build", small_build)
    (tmp_path / "glyphs").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="can't be cached"):
        assert len(load("glyphs", tmp_path).train) == 1


# --- Omniglot ---


@needs_omniglot
def test_omniglot_by_character() -> None:
    splits = load("omniglot", SHARED)
    assert [len(part) for part in parts(splits)] == [4400, 400, 1692]
    assert [len(characters(part)) for part in parts(splits)] == [1100, 100, 423]
    assert_disjoint([characters(part) for part in parts(splits)])
    assert splits.test.images.shape == (1692, 20, 1, 28, 28)
    assert set(splits.test.images.unique().tolist()) == {0, 255}
    assert 0.07 < splits.train.images.float().mean() / 255 < 0.09  # 8 % is ink: it is high, not the paper
    again = load("omniglot", SHARED)
    assert again.test.names == splits.test.names


@needs_omniglot
def test_omniglot_by_alphabet() -> None:
    splits = load("omniglot", SHARED, split="alphabets")
    alphabets = [{name.split("/")[0] for name in part.names} for part in parts(splits)]
    assert [len(group) for group in alphabets] == [25, 5, 20]
    assert_disjoint(alphabets)
    assert len(splits.test) == 4 * 659
    assert len(splits.train) + len(splits.validation) == 4 * 964


@needs_omniglot
def test_omniglot_test_characters_are_not_trained_on() -> None:
    """Implicit MAML's scripts shuffle the characters with one seed to train and another to test."""
    trained, tested = list(range(1623)), list(range(1623))
    random.Random(123).shuffle(trained)
    random.Random(12345).shuffle(tested)
    assert len(set(trained[:1200]) & set(tested[1200:])) == 310
    splits = load("omniglot", SHARED)
    assert len(characters(splits.test)) == len(tested[1200:])
    assert len((characters(splits.train) | characters(splits.validation)) & characters(splits.test)) == 0


@pytest.fixture
def drawings_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Omniglot as torchvision unpacks it, made small: 3 alphabets of 2 characters with 20 drawings."""
    from torchvision.datasets import Omniglot

    monkeypatch.setattr(Omniglot, "download", lambda self: None)
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)
    noise = np.random.default_rng(0)
    number = 0
    for folder, alphabets in {
        "images_background": ["Latin", "Braille"],
        "images_evaluation": ["Keble"],
    }.items():
        for alphabet in alphabets:
            for character in (1, 2):
                number += 1
                target = tmp_path / "omniglot-py" / folder / alphabet / f"character{character:02d}"
                target.mkdir(parents=True)
                for drawer in range(1, 21):
                    paper = Image.fromarray(noise.random((105, 105)) > 0.1)
                    paper.save(target / f"{number:04d}_{drawer:02d}.png")
    return tmp_path


def test_omniglot_download_makes_the_same_format(drawings_root: Path) -> None:
    with pytest.raises(UserError, match=r"'images' is uint8 \(6, 20, 98\)"):  # not the whole of Omniglot
        load("omniglot", drawings_root)
    with np.load(drawings_root / "omniglot" / "omniglot28.npz") as archive:
        made = dict(archive)
    assert made["alphabet_names"].tolist() == ["Braille", "Keble", "Latin"]
    assert made["alphabet"].tolist() == [0, 0, 1, 1, 2, 2]
    assert made["character"].tolist() == [1, 2] * 3
    assert made["background"].tolist() == [True, True, False, False, True, True]
    assert made["omniglot_id"].tolist() == [3, 4, 5, 6, 1, 2]
    keble = drawings_root / "omniglot-py" / "images_evaluation" / "Keble" / "character02"
    # Pillow resizes pictures of 1 bit by taking the nearest pixel, the one under the middle of the new pixel.
    middle = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
    for drawer in (0, 19):
        paper = np.asarray(Image.open(keble / f"0006_{drawer + 1:02d}.png"))
        assert made["images"][3, drawer].tobytes() == np.packbits(~paper[np.ix_(middle, middle)]).tobytes()


@needs_omniglot
def test_omniglot_format_is_that_of_the_real_file(drawings_root: Path) -> None:
    folders = {True: "images_background", False: "images_evaluation"}
    made = omni.convert({key: drawings_root / "omniglot-py" / name for key, name in folders.items()})
    with np.load(REAL) as archive:
        assert set(made) == set(archive)
        for key in archive:
            assert made[key].dtype.kind == archive[key].dtype.kind
            assert key == "alphabet_names" or made[key].dtype == archive[key].dtype
            assert made[key].shape[1:] == archive[key].shape[1:]


@needs_omniglot
def test_omniglot_real_drawings_convert_to_the_real_file(tmp_path: Path) -> None:
    """Two real alphabets, enlarged to 105 x 105 and written as drawings, come back byte for byte."""
    with np.load(REAL) as archive:
        real = dict(archive)
    one_of_each_set = [real["alphabet"][np.argmax(real["background"] == value)] for value in (True, False)]
    rows = np.flatnonzero(np.isin(real["alphabet"], one_of_each_set))
    nearest = ((np.arange(105) + 0.5) * 28 / 105).astype(int)
    for row in rows:
        parent = tmp_path / str(real["background"][row]) / real["alphabet_names"][real["alphabet"][row]]
        folder = parent / f"character{real['character'][row]:02d}"
        folder.mkdir(parents=True)
        for drawer, packed in enumerate(real["images"][row]):
            ink = np.unpackbits(packed).reshape(28, 28).astype(bool)[np.ix_(nearest, nearest)]
            Image.fromarray(~ink).save(folder / f"{real['omniglot_id'][row]:04d}_{drawer + 1:02d}.png")
    made = omni.convert({True: tmp_path / "True", False: tmp_path / "False"})
    for key in ("images", "character", "background", "omniglot_id"):
        assert made[key].tobytes() == real[key][rows].tobytes()


def test_omniglot_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Omniglot

    def unreachable(self: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Omniglot, "download", unreachable)
    with pytest.raises(UserError, match=r"(?s)no route to host.*images_background\.zip.*omniglot28\.npz"):
        load("omniglot", tmp_path)


def whole_omniglot() -> dict[str, np.ndarray]:
    """Arrays of the right form, without ink."""
    return {
        "images": np.zeros((1623, 20, 98), np.uint8),
        "alphabet": np.zeros(1623, np.int16),
        "alphabet_names": np.array([f"alphabet {i}" for i in range(50)]),
        "character": np.zeros(1623, np.int16),
        "background": np.arange(1623) < 964,
        "omniglot_id": np.zeros(1623, np.int16),
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", np.zeros((1623, 20, 97), np.uint8), "'images' is uint8"),
        ("images", np.zeros((1623, 20, 98), np.int8), "'images' is int8"),
        ("alphabet_names", np.arange(50), "'alphabet_names' is int64"),
        ("alphabet_names", np.array([None] * 50), "pickle"),
        ("background", np.ones(1623, bool), "964"),
        ("alphabet", np.full(1623, 50, np.int16), "50 alphabets"),
        ("character", None, "character"),
    ],
)
def test_omniglot_wrong_arrays(tmp_path: Path, key: str, value: np.ndarray | None, message: str) -> None:
    arrays = whole_omniglot()
    del arrays[key]
    if value is not None:
        arrays[key] = value
    (tmp_path / "omniglot").mkdir()
    np.savez_compressed(tmp_path / "omniglot" / "omniglot28.npz", allow_pickle=True, **arrays)
    with pytest.raises(UserError, match=message):
        load("omniglot", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "random bytes", "empty", "flipped bytes"])
def test_omniglot_damaged_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "omniglot" / "omniglot28.npz"
    path.parent.mkdir()
    np.savez_compressed(path, **whole_omniglot())  # type: ignore[arg-type]
    good = path.read_bytes()
    assert len(load("omniglot", tmp_path).train) == 4400
    flipped = bytearray(good)
    flipped[300] ^= 0xFF
    bad = {
        "truncated": good[: len(good) // 2],
        "random bytes": random.Random(0).randbytes(1000),
        "empty": b"",
        "flipped bytes": bytes(flipped),
    }
    path.write_bytes(bad[damage])
    with pytest.raises(UserError, match="can't be used"):
        load("omniglot", tmp_path)


# --- CIFAR-FS ---


def write_cifar100(root: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, lost: int = 0) -> None:
    """CIFAR-100's files with 2 training images and 1 test image a class, filled with its label (+ 100)."""
    from torchvision.datasets import CIFAR100

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)

    def write(name: str, entry: dict[str, object]) -> list[str]:
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch(labels: list[int], base: int) -> dict[str, object]:
        fill = np.array([label + base * (1 + labels[:i].count(label)) for i, label in enumerate(labels)], np.uint8)
        return {"data": np.repeat(fill[:, None], 3072, axis=1), "fine_labels": labels}

    train = (list(range(100)) * 2)[: 200 - lost]
    monkeypatch.setattr(CIFAR100, "train_list", [write("train", batch(train, 0))])
    monkeypatch.setattr(CIFAR100, "test_list", [write("test", batch(list(range(99, -1, -1)), 100))])
    _, checksum = write("meta", {"fine_label_names": names})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": checksum})


CIFAR_NAMES = sorted(cifar_fs.TRAIN + cifar_fs.VALIDATION + cifar_fs.TEST)


def test_cifar_fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, CIFAR_NAMES, monkeypatch)
    splits = load("cifar-fs", tmp_path, download=False)
    assert [len(set(part.names)) for part in parts(splits)] == [64, 16, 20]
    assert_disjoint([set(part.names) for part in parts(splits)])
    for part in parts(splits):
        assert part.images.shape == (len(part), 3, 3, 32, 32)
        labels = torch.tensor([CIFAR_NAMES.index(name) for name in part.names], dtype=torch.uint8)
        expected = labels[:, None] + torch.tensor([0, 0, 100], dtype=torch.uint8)  # train before test
        assert (part.images == expected[:, :, None, None, None]).all()


def test_cifar_fs_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path / "names", [f"class {i}" for i in range(100)], monkeypatch)
    with pytest.raises(UserError, match="doesn't hold its 100 classes"):
        load("cifar-fs", tmp_path / "names", download=False)
    write_cifar100(tmp_path / "lost", CIFAR_NAMES, monkeypatch, lost=1)
    with pytest.raises(UserError, match="equally many"):
        load("cifar-fs", tmp_path / "lost", download=False)
    (tmp_path / "lost" / "cifar-100-python" / "train").write_bytes(b"cut")
    with pytest.raises(UserError, match="not found or corrupted"):
        load("cifar-fs", tmp_path / "lost", download=False)


# --- mini-ImageNet ---


@pytest.fixture(scope="module")
def mini_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all classes with 20 images of one colour each: class, image, 7."""
    folder = tmp_path_factory.mktemp("mini") / "mini-imagenet"
    for label, name in enumerate(mini.CLASSES):
        (folder / name).mkdir(parents=True)
        for image in range(20):
            path = folder / name / f"{image:02d}{('.png', '.JPEG')[label % 2]}"
            Image.new("RGB", (8, 6), (label, 5 * image, 7)).save(path, quality=100)
    return folder


@pytest.fixture
def mini_root(mini_images: Path, tmp_path: Path) -> Path:
    shutil.copytree(mini_images, tmp_path / "mini-imagenet", copy_function=os.link)
    return tmp_path


def test_mini_imagenet(mini_root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load("mini-imagenet", mini_root)
    assert [len(set(part.names)) for part in parts(splits)] == [64, 16, 20]
    assert_disjoint([set(part.names) for part in parts(splits)])
    for part in parts(splits):
        assert part.images.shape == (len(part), 20, 3, 84, 84)
        labels = torch.tensor([mini.CLASSES.index(name) for name in part.names])
        colour = part.images[..., 40, 40].int()
        assert (colour[..., 0] - labels[:, None]).abs().max() <= 3  # JPEG's loss
        assert (colour[..., 1] - 5 * torch.arange(20)).abs().max() <= 3


def test_mini_imagenet_cache(mini_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = mini_root / "mini-imagenet84-v1.npy"
    monkeypatch.setattr(mini, "_pixels", lambda file: np.full((3, 84, 84), 9, np.uint8))
    load("mini-imagenet", mini_root)
    cache_time = cache.stat().st_mtime_ns
    with monkeypatch.context() as cached:
        cached.setattr(mini, "_pixels", lambda file: pytest.fail("read although cached"))
        assert (load("mini-imagenet", mini_root).test.images == 9).all()
    cache.write_bytes(cache.read_bytes()[:1000])
    time.sleep(0.01)
    assert (load("mini-imagenet", mini_root).test.images == 9).all()
    assert cache.stat().st_mtime_ns > cache_time
    assert np.load(cache).shape == (100, 20, 3, 84, 84)


def test_mini_imagenet_in_split_folders(mini_root: Path) -> None:
    folder = mini_root / "mini-imagenet"
    for part, names in {"train": mini.TRAIN, "val": mini.VALIDATION, "test": mini.TEST}.items():
        (folder / part).mkdir()
        for name in names:
            (folder / name).rename(folder / part / name)
    assert len(load("mini-imagenet", mini_root).test) == 20


def test_mini_imagenet_unequal_counts(mini_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "_pixels", lambda file: np.zeros((3, 84, 84), np.uint8))
    first = mini_root / "mini-imagenet" / mini.TRAIN[0]
    Image.new("RGB", (8, 8)).save(first / "99.png")
    with pytest.warns(UserWarning, match="20 to 21 images; 20 of each"):
        assert load("mini-imagenet", mini_root).train.num_instances == 20
    for extra in ("99.png", "00.png"):
        (first / extra).unlink()
    with pytest.raises(UserError, match=f"{mini.TRAIN[0]} .* has 19 images"):
        load("mini-imagenet", mini_root)


def test_mini_imagenet_bad_folders(mini_root: Path) -> None:
    folder = mini_root / "mini-imagenet"
    broken = folder / mini.TEST[3] / "00.png"
    broken.unlink(missing_ok=True)
    (folder / mini.TEST[3] / "00.jpg").write_bytes(b"not an image")
    for extra in list((folder / mini.TEST[3]).iterdir())[20:]:
        extra.unlink()
    with pytest.raises(UserError, match=r"00\.jpg can't be read as an image"):
        load("mini-imagenet", mini_root)
    shutil.rmtree(folder / mini.TEST[0])
    shutil.rmtree(folder / mini.TRAIN[5])
    with pytest.raises(UserError, match=f"2 of the 100 classes .*{mini.TRAIN[5]}, {mini.TEST[0]}"):
        load("mini-imagenet", mini_root)
