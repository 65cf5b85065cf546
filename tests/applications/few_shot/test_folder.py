"""One's own images: from folders of drawings of any size to a network, and to the labels of new drawings."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from applications.few_shot import FewShot, data
from applications.few_shot.__main__ import main
from applications.few_shot.data import Reading
from applications.few_shot.data.images import as_bytes
from applications.few_shot.episodes import Sampler
from applications.few_shot.train import Session, create_sampler
from applications.few_shot.trained import Trained
from applications.frame.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "few_shot_own_images.md"

READING = Reading(size=16, grey=False, held_out=(0.2, 0.3), seed=0)
COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "orange")


def drawing(index: int, generator: np.random.Generator) -> Image.Image:
    """A disc or a square, of one of eight colours, of any size and place, on a picture of any size."""
    width, height = (int(side) for side in generator.integers(24, 60, 2))
    image = Image.new("RGB", (width, height), tuple(int(level) for level in generator.integers(0, 60, 3)))
    side = min(width, height)
    radius, x, y = side * generator.uniform(0.2, 0.35), width / 2, height / 2
    box = [x - radius, y - radius, x + radius, y + radius]
    draw = ImageDraw.Draw(image)
    (draw.ellipse if index % 2 else draw.rectangle)(box, fill=COLOURS[index // 2])
    return image


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """16 classes of 8 to 10 images."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for index in range(16):
        (root / f"class{index:02d}").mkdir()
        for number in range(8 + index % 3):
            suffix = ("png", "jpg", "jpeg")[number % 3]
            drawing(index, generator).save(root / f"class{index:02d}" / f"{number}.{suffix}")
    return root


def load(folder, cache, **changes):
    return data.load(str(folder), cache, reading=Reading(**{**vars(READING), **changes}))


class TestSplits:
    def test_by_fractions_of_the_classes(self, photographs, tmp_path):
        splits = load(photographs, tmp_path)
        parts = [set(part.names) for part in (splits.train, splits.validation, splits.test)]
        assert [len(part) for part in parts] == [8, 3, 5]
        assert set.union(*parts) == {path.name for path in photographs.iterdir()}
        assert load(photographs, tmp_path).train.names == splits.train.names
        assert load(photographs, tmp_path, seed=1).train.names != splits.train.names

    def test_by_folders(self, photographs, tmp_path):
        for number, path in enumerate(sorted(photographs.iterdir())):
            part = ("train", "val", "test")[number % 3]
            (tmp_path / "own" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / part / path.name).symlink_to(path)
        splits = load(tmp_path / "own", tmp_path)
        assert splits.validation.names == ("class01", "class04", "class07", "class10", "class13")

    def test_images(self, photographs, tmp_path):
        train = load(photographs, tmp_path).train
        assert train.images.shape[1:] == (10, 3, 16, 16)
        assert train.num_instances == 8
        row = train.counts.index(8)
        assert not train.images[row, 8:].any()
        with Image.open(photographs / train.names[row] / "0.png") as image:
            assert torch.equal(train.images[row, 0], as_bytes([image], "some", 3, 16)[0])
        assert load(photographs, tmp_path, grey=True).train.images.shape[2:] == (1, 16, 16)

    def test_they_are_cached_until_a_file_changes(self, photographs, tmp_path, monkeypatch):
        folder = tmp_path / "copy"
        for path in photographs.iterdir():
            (folder / path.name).mkdir(parents=True)
            for image in path.iterdir():
                (folder / path.name / image.name).write_bytes(image.read_bytes())
        before = load(folder, tmp_path)
        opened = []
        monkeypatch.setattr("applications.few_shot.data.folder._image", lambda *args: opened.append(args))
        assert torch.equal(load(folder, tmp_path).train.images, before.train.images)
        assert not opened
        monkeypatch.undo()
        name = before.train.names[0]
        Image.new("RGB", (20, 20), "white").save(folder / name / "0.png")
        assert (load(folder, tmp_path).train.images[0, 0] == 255).all()

    def test_a_camera_that_was_turned(self):
        image = Image.new("RGB", (4, 4))
        image.putpixel((0, 0), (255, 255, 255))
        image.getexif()[0x0112] = 3  # upside down
        found = as_bytes([image], "some", 1, 4)[0, 0]
        assert found[3, 3] == 255
        assert not found[0, 0]


class TestTasks:
    def test_blank_images_are_never_drawn(self, photographs, tmp_path):
        train = load(photographs, tmp_path).train
        sampler = Sampler(train, "train", ways=5, shots=3, queries=5, seed=0, device=torch.device("cpu"))
        episodes = sampler.episodes(200, 0)
        for images in (episodes.support_x, episodes.query_x):
            assert (images.flatten(2).sum(-1) > 0).all()

    def test_with_equal_classes_the_tasks_are_those_of_other_data(self, toy_splits):
        counted = data.ImageClasses(toy_splits.train.images, toy_splits.train.names, (20,) * 20)
        one, two = (
            Sampler(c, "train", 5, 1, 5, 0, torch.device("cpu")).episodes(3, 1) for c in (toy_splits.train, counted)
        )
        assert torch.equal(one.query_x, two.query_x)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda root: None, "has no folders of classes"),
            (lambda root: [(root / f"c{i}").mkdir() for i in range(5)], "has no images \\(5 such folders of 5\\)"),
            (lambda root: [classes(root, 2)], "has 2 classes"),
            (lambda root: [classes(root / part, 5) for part in ("train", "test")], "and no validation"),
        ],
    )
    def test_folders(self, make, message, tmp_path):
        root = tmp_path / "own"
        root.mkdir()
        make(root)
        with pytest.raises(UserError, match=message):
            load(root, tmp_path)

    def test_an_image_that_is_none(self, tmp_path):
        classes(tmp_path / "own", 8)
        (tmp_path / "own" / "c3" / "broken.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"c3/broken\.png cannot be read as an image"):
            load(tmp_path / "own", tmp_path)

    def test_a_class_with_too_few_images_is_named(self, tmp_path, capsys):
        root = tmp_path / "own"
        classes(root, 20, images=8)
        for path in list((root / "c7").iterdir())[3:]:
            path.unlink()
        arguments = ["--data", str(root), "--ways", "2", "--queries", "3", "--eval-queries", "3", "--image-size", "16"]
        assert main([*arguments, "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
        assert "the class 'c7' of the" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "There are no images"),
            (np.zeros((8, 8)), "put a single one into a list"),
            (np.full((2, 8, 8), -1.0), "floating point from|float64 from -1.0 to -1.0"),
            (np.full((2, 8, 8), np.nan), "from nan"),
            (np.zeros((2, 5, 8, 9)), "with 1 or 3 channels"),
            ([object()], "An image is a object"),
            (["nowhere.png"], "nowhere.png cannot be read"),
            ("nowhere.png", "nowhere.png cannot be read"),
            (None, "The images are NoneType"),
            ([Image.new("F", (8, 8))], "pixels of 32 bits"),
            (np.zeros((8, 8, 3)), "which may be one image or several grey ones"),
            (np.zeros((8, 8, 4), np.uint8), "which may be one image or several grey ones"),
            (np.eye(8, dtype=np.uint8)[None], "no number above 1.*255 \\* array"),
            (torch.eye(8, dtype=torch.int64)[None], "no number above 1"),
            (np.ma.masked_array(np.zeros((2, 8, 8)), np.ones((2, 8, 8))), "masked array"),
            (np.zeros((2, 0, 0)), "has no pixels"),
            (torch.zeros(2, 8, 8, device="meta"), "meta device"),
        ],
    )
    def test_images(self, images, message):
        with pytest.raises(UserError, match=message):
            as_bytes(images, "omniglot", 1, 28)

    def test_paths_in_an_array(self, tmp_path):
        Image.new("RGB", (20, 20), (9, 90, 200)).save(tmp_path / "a.png")
        paths = [str(tmp_path / "a.png")] * 2
        assert torch.equal(as_bytes(np.array(paths), "some", 3, 16), as_bytes(paths, "some", 3, 16))
        with pytest.raises(UserError, match="The images are dict"):
            as_bytes({"a": paths[0]}, "some", 3, 16)

    @pytest.mark.parametrize(("mode", "multiplied"), [("LA", "La"), ("RGBA", "RGBa")])
    def test_pixels_that_are_multiplied_by_their_transparency(self, mode, multiplied):
        image = Image.new("RGBA", (20, 20), (200, 200, 200, 128)).convert(mode)
        assert torch.equal(as_bytes([image.convert(multiplied)], "some", 3, 16), as_bytes([image], "some", 3, 16))

    def test_a_single_image_in_colour_is_not_three_grey_ones(self):
        with pytest.raises(UserError, match=r"of shape \(3, 16, 16\), which may be one image"):
            as_bytes(torch.zeros(3, 16, 16), "some", 3, 16)
        assert len(as_bytes(torch.zeros(3, 16, 16), "some", 1, 16)) == 3

    def test_a_folder_too_high_is_told(self, tmp_path):
        classes(tmp_path / "above" / "photos", 3)
        with pytest.raises(UserError, match="holds folders and no images of its own"):
            load(tmp_path / "above", tmp_path)

    def test_a_link_to_nothing(self, tmp_path):
        classes(tmp_path / "photos", 6)
        (tmp_path / "photos" / "c1" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        with pytest.raises(UserError, match=r"gone\.png cannot be read"):
            load(tmp_path / "photos", tmp_path)

    def test_classes_that_came_after_the_training(self, tmp_path, capsys):
        """They change the split: the run does not go on, and an evaluation says what it was trained on."""
        root, run = tmp_path / "photos", tmp_path / "run"
        classes(root, 20, images=5)
        place = ["--data", str(root), "--data-root", str(tmp_path)]
        sizes = "--ways 2 --queries 2 --eval-queries 2 --image-size 16 --width 8 --tasks 2 --inner-steps 2"
        assert main([*place, *sizes.split(), "--steps", "2", "--eval-tasks", "2", "--out", str(run)]) == 0
        assert main(["export", str(run), str(tmp_path / "network.pt")]) == 0
        (root / "a").mkdir()
        for number in range(5):
            Image.new("RGB", (20, 20), (number, 90, 0)).save(root / "a" / f"{number}.png")
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        capsys.readouterr()
        assert main(["--resume", str(run), "--steps", "3"]) == 2
        assert "has other classes for training than when this run began" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before  # the old split is told there
        for network in ([str(run)], ["--trained", str(tmp_path / "network.pt")]):
            assert main(["evaluate", *network, *place, "--eval-tasks", "2"]) == 0
            assert "were training classes of this network" in capsys.readouterr().out

    def test_images_that_changed_since_the_run_began(self, tmp_path, capsys):
        """Names of classes alone say nothing of what is in them."""
        root, run = tmp_path / "photos", tmp_path / "run"
        classes(root, 20, images=5)
        sizes = "--ways 2 --queries 2 --eval-queries 2 --image-size 16 --width 8 --tasks 2 --inner-steps 2"
        place = ["--data", str(root), "--data-root", str(tmp_path)]
        assert main([*place, *sizes.split(), "--steps", "2", "--eval-tasks", "2", "--out", str(run)]) == 0
        for path in root.glob("*/0.png"):
            Image.new("RGB", (20, 20), (0, 200, 0)).save(path)
        capsys.readouterr()
        assert main(["--resume", str(run), "--steps", "3"]) == 2
        assert "has other images for training than when this run began" in capsys.readouterr().err

    def test_a_network_of_a_longer_run_says_how_it_was_made(self, tmp_path):
        root, run = tmp_path / "photos", tmp_path / "run"
        classes(root, 20, images=5)
        sizes = "--ways 2 --queries 2 --eval-queries 2 --image-size 16 --width 8 --tasks 2 --inner-steps 2"
        place = ["--data", str(root), "--data-root", str(tmp_path)]
        assert main([*place, *sizes.split(), "--steps", "2", "--eval-tasks", "2", "--out", str(run)]) == 0
        assert main(["--resume", str(run), "--steps", "3"]) == 0
        told = Trained.load(run).origin["command"]
        assert "--steps 2" in told
        assert told.endswith("; then python -m applications.few_shot train --resume RUN --steps 3")


def classes(root, count, images=2):
    for index in range(count):
        (root / f"c{index}").mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (20, 20), (index, number, 0)).save(root / f"c{index}" / f"{number}.png")


class TestFormats:
    def test_one_image_in_every_form(self):
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
        last = image.permute(1, 2, 0).numpy()
        forms = [
            *([image], [image.numpy()], [last], [Image.fromarray(last)], image[None], last[None]),
            *([image / 255], (image / 255).numpy()[None], [last.astype(int)]),
        ]
        for form in forms:
            assert torch.equal(as_bytes(form, "some", 3, 16), image[None])
        coarse = torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat(1, 1, 16, 4)
        for form in (coarse.bfloat16(), coarse.to_sparse(), np.ma.masked_array(coarse.numpy())):
            assert torch.equal(as_bytes(form, "some", 1, 16), as_bytes(coarse, "some", 1, 16))
        ones = np.eye(16, dtype=bool)[None]
        assert torch.equal(as_bytes(ones, "some", 1, 16), as_bytes(255 * ones.astype(np.uint8), "some", 1, 16))

    def test_more_than_eight_bits(self, tmp_path):
        levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
        Image.fromarray(levels).save(tmp_path / "deep.png")
        found = as_bytes(tmp_path / "deep.png", "some", 1, 16)
        assert (found[0, 0].flatten().numpy() == np.arange(256)).all()
        (tmp_path / "deep.pgm").write_bytes(b"P5\n16 16\n65535\n" + levels.astype(">u2").tobytes())
        assert torch.equal(as_bytes(tmp_path / "deep.pgm", "some", 1, 16), found)
        Image.fromarray(levels).save(tmp_path / "clear.png", transparency=0)
        clear = as_bytes(tmp_path / "clear.png", "some", 1, 16)
        assert clear[0, 0, 0, 0] == 255
        assert torch.equal(clear.flatten()[1:], found.flatten()[1:])

    def test_clear_parts_are_paper(self, tmp_path):
        page = Image.new("LA", (32, 32), (0, 0))
        ImageDraw.Draw(page).rectangle([8, 8, 23, 23], fill=(40, 255))
        page.save(tmp_path / "clear.png")
        grey = as_bytes(tmp_path / "clear.png", "some", 1, 32)[0, 0]
        assert (grey[8:24, 8:24] == 40).all()
        assert (grey[0] == 255).all()
        for image in (page, page.convert("RGBA")):
            ink = as_bytes(image, "omniglot", 1, 28)[0, 0]
            assert 0.2 < (ink == 255).double().mean() < 0.3

    def test_grey_pencil_on_grey_paper_is_a_drawing(self):
        black, grey = Image.new("L", (105, 105), 255), Image.new("L", (105, 105), 180)
        for page, pencil in ((black, 0), (grey, 60)):
            ImageDraw.Draw(page).line([(10, 10), (90, 80)], fill=pencil, width=8)
        assert torch.equal(as_bytes(grey, "omniglot", 1, 28), as_bytes(black, "omniglot", 1, 28))

    def test_light_on_dark_is_told(self):
        ink = np.zeros((28, 28), np.uint8)
        ink[4:24, 12:16] = 255
        drawn = [ink, torch.from_numpy(ink).float() / 255, Image.fromarray(255 - ink)]
        for name in ("omniglot", "glyphs"):
            assert as_bytes(drawn, name, 1, 28).float().mean() < 60
            for inverted in (255 - ink, 1 - drawn[1]):
                with pytest.raises(UserError, match="in an array ink is 255, or 1, and paper 0"):
                    as_bytes([ink, inverted], name, 1, 28)
            with pytest.raises(UserError, match="is dark ink on light paper"):
                as_bytes([Image.fromarray(ink)], name, 1, 28)

    def test_omniglot_drawings_are_read_as_in_training(self):
        page = Image.new("1", (105, 105), 1)
        ImageDraw.Draw(page).line([(10, 10), (90, 80)], fill=0, width=6)
        expected = 255 * (~np.asarray(page.resize((28, 28)))).astype(np.uint8)
        assert (as_bytes([page], "omniglot", 1, 28)[0, 0].numpy() == expected).all()
        assert 0 < (expected > 0).mean() < 0.3  # ink is bright, paper is 0


def test_drawings_and_arrays_of_omniglot_are_the_same_to_the_shipped_network(omniglot_root):
    """Five characters of the test, two drawings to learn from: as files hold them, dark on light, and as arrays."""
    images = data.load("omniglot", omniglot_root).test.images[:5, :, 0]
    model, labels = FewShot.load("omniglot-20way-1shot", device="cpu"), [f"letter {i}" for i in range(5) for _ in "ab"]
    expected = [f"letter {i}" for i in range(5) for _ in range(18)]
    found = []
    for form in (lambda image: Image.fromarray(255 - image.numpy()), lambda image: image):
        classifier = model.adapt([form(image) for image in images[:, :2].flatten(0, 1)], labels)
        found.append(classifier([form(image) for image in images[:, 2:].flatten(0, 1)]))
    assert found[0] == found[1]
    assert np.mean([a == b for a, b in zip(found[0], expected, strict=True)]) > 0.9


@pytest.fixture(scope="session")
def run(photographs, tmp_path_factory):
    """What the page on one's own images does: thirty seconds of training, or less."""
    place = tmp_path_factory.mktemp("own")
    size = [
        "--image-size",
        "16",
        "--width",
        "8",
        "--ways",
        "3",
        "--queries",
        "3",
        "--eval-queries",
        "5",
        "--tasks",
        "8",
    ]
    rest = ["--lr", "1e-2", "--steps", "80", "--validate-every", "0", "--eval-tasks", "50"]
    folder = place / "run"
    assert main(["--data", str(photographs), *size, *rest, "--data-root", str(place), "--out", str(folder)]) == 0
    return folder


class TestFromPhotographsToPredictions:
    def test_it_learns_classes_it_has_never_seen(self, run, photographs):
        generator = np.random.default_rng(1)
        classifier = FewShot.load(run, device="cpu")
        trained = Trained.load(run)
        session = Session.create(trained.config)
        unseen = [int(name[5:]) for name in session.splits.test.names[:3]]
        images = [drawing(index, generator) for index in unseen for _ in range(2)]
        labels = [f"class{index:02d}" for index in unseen for _ in range(2)]
        told = classifier.adapt(images, labels)
        new = [drawing(index, generator) for index in unseen for _ in range(20)]
        expected = [f"class{index:02d}" for index in unseen for _ in range(20)]
        found = told(new)
        assert isinstance(found, list)
        assert np.mean([a == b for a, b in zip(found, expected, strict=True)]) > 0.7
        assert told.classes == list(dict.fromkeys(labels))

    def test_it_is_what_an_evaluation_does(self, run):
        """Same images, same labels, transductive and not: the predictions of `evaluate`, and of it alone."""
        from applications.few_shot import evaluate

        trained = Trained.load(run)
        session = Session.create(trained.config)
        sampler = create_sampler(trained.config, session.splits.test, "test", 5, session.device)
        episodes = sampler.episodes(1, 0)
        settings = evaluate.settings(trained.learner())
        for transductive, (_, classify) in zip((True, False), settings, strict=True):
            expected = classify(episodes)[0]
            classifier = FewShot(trained).adapt(episodes.support_x[0], episodes.support_y[0])
            found = classifier(episodes.query_x[0], transductive=transductive)
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, expected)

    def test_without_transduction_an_image_is_judged_by_itself(self, run):
        generator = np.random.default_rng(2)
        images = [drawing(index, generator) for index in (0, 3, 6)]
        classifier = FewShot.load(run).adapt(images, np.array([7, 8, 9]))
        together = classifier.probabilities([*images, images[0]])
        alone = torch.cat([classifier.probabilities([image]) for image in [*images, images[0]]])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert classifier(images).dtype == np.array([7]).dtype

    def test_one_model_serves_one_set_of_classes_after_another(self, run):
        generator, model = np.random.default_rng(3), FewShot.load(run, device="cpu")
        first, second, more = ([drawing(index, generator) for index in some] for some in ((0, 3), (1, 4), (2, 5, 6)))
        expected = [FewShot.load(run).adapt(x, range(len(x))).probabilities(first) for x in (first, second, more)]
        classifiers = [model.adapt(x, range(len(x))) for x in (first, second, more)]
        for classifier, probabilities in zip(classifiers, expected, strict=True):
            assert torch.equal(classifier.probabilities(first), probabilities)

    def test_it_says_what_it_is(self, run):
        told = repr(FewShot.load(run, device="cpu"))
        assert "3-way 1-shot, conv4, images [3, 16, 16], trained for 80 meta-steps" in told

    def test_a_network_of_other_images_names_the_options(self, photographs, tmp_path, capsys):
        words = ["--data", str(photographs), "--data-root", str(tmp_path), "--start", "omniglot-20way-1shot"]
        assert (
            main([*words, "--width", "64", "--ways", "3", "--eval-queries", "5", "--out", str(tmp_path / "run")]) == 2
        )
        assert "images [1, 28, 28] (of a folder: --grey, --image-size)" in capsys.readouterr().err

    def test_an_evaluation_on_images_of_another_shape(self, run, capsys):
        for words in (["--grey"], ["--image-size", "20"], ["--data", "glyphs"]):
            assert main(["evaluate", str(run), *words]) == 2
            assert "and the network was trained on [3, 16, 16]: give it images of that shape" in capsys.readouterr().err

    def test_code_that_the_network_does_not_use_is_refused(self, run):
        with pytest.raises(UserError, match=r"model is 'no\.such:thing', and the network was trained with 'conv4'"):
            FewShot.load(run, model="no.such:thing")
        with pytest.raises(UserError, match="source is 5"):
            FewShot.load(5)

    def test_labels_that_do_not_fit(self, run):
        model, images = FewShot.load(run), np.zeros((4, 16, 16, 3), np.uint8)
        with pytest.raises(UserError, match="4 images and 3 labels"):
            model.adapt(images, [0, 1, 2])
        with pytest.raises(UserError, match="two or more to tell apart"):
            model.adapt(images, [0, 0, 0, 0])
        with pytest.raises(UserError, match=r"an array of shape \(4, 2\)"):
            model.adapt(images, np.eye(4)[:, :2])
        for labels in (None, 3, "abcd"):
            with pytest.raises(UserError, match="a sequence is needed"):
                model.adapt(images, labels)
        for unordered in ({0, 1, 2, 3}, {0: "a", 1: "b", 2: "a", 3: "b"}):  # the keys of a dict are no labels
            with pytest.raises(UserError, match=r"a sequence is needed.*in order"):
                model.adapt(images, unordered)
        for vector in (np.ones(2), torch.ones(2)):  # an array has no one answer to whether it equals itself
            with pytest.raises(UserError, match="give strings, numbers"):
                model.adapt(images, [0, 1, 2, vector])
        with pytest.raises(UserError, match="A label is NaN"):
            model.adapt(images, np.array([0, 1, 2, np.nan]))
        with pytest.raises(UserError, match="masked array"):
            model.adapt(images, np.ma.masked_array([0, 1, 2, 0], [0, 0, 0, 1]))
        assert model.adapt(images, list(torch.tensor([0, 1, 2, 0]))).classes == [0, 1, 2]
        with pytest.raises(UserError, match="A label is \\[1\\]"):
            model.adapt(images, [[0], [1], [0], [1]][::-1])
        with pytest.raises(UserError, match="There is no device 'gpu'"):
            FewShot.load(run, device="gpu")


def test_the_page_from_photographs_to_predictions(tmp_path, monkeypatch):
    """Every command and the code of the page, on 25 classes of small pictures of one colour each, in a few steps."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (25, 3))

    def photograph(index):
        return Image.fromarray(np.clip(colours[index] + generator.normal(0, 9, (20, 24, 3)), 0, 255).astype(np.uint8))

    for index in range(25):
        (tmp_path / "photographs" / f"bird{index}").mkdir(parents=True)
        for number in range(16):
            photograph(index).save(tmp_path / "photographs" / f"bird{index}" / f"{number}.png")
    lines = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    python -m")]
    quick = "--image-size 8 --width 8 --steps 12 --tasks 4 --eval-tasks 5 --validate-every 0 --data-root ."
    for line in lines:
        assert line.startswith("python -m applications.few_shot ")
        words = shlex.split(line)[3:]
        assert main([*words, *shlex.split(quick)] if words[0] == "train" else words) == 0
    assert (tmp_path / "birds.pt").is_file()
    new = [0, 1, 2, 3, 4]
    names = {
        "images": [photograph(index) for index in new],
        "labels": [f"bird{index}" for index in new],
        "new_images": [photograph(index) for index in new],
    }
    code = PAGE.read_text().split("## 3. Predict")[1].split("`images` are")[0]
    exec(compile(textwrap.dedent(code), str(PAGE), "exec"), names)
    assert names["probabilities"].shape == (5, 5)
    assert sum(a == b for a, b in zip(names["names"], names["labels"], strict=True)) >= 4
