from __future__ import annotations

import pytest
import torch

from applications.few_shot.config import Config
from applications.few_shot.data import ImageClasses
from applications.few_shot.episodes import Sampler
from applications.few_shot.train import Session
from applications.frame.errors import UserError

CPU = torch.device("cpu")


def numbered(num_classes=12, num_instances=9):
    """Every image is filled with its class number, and its first pixel with its instance number."""
    images = torch.arange(num_classes).view(-1, 1, 1, 1, 1).repeat(1, num_instances, 1, 4, 4)
    images[:, :, 0, 0, 0] = torch.arange(num_instances)
    return ImageClasses(images.to(torch.uint8), tuple(map(str, range(num_classes))))


def test_classes_and_images_of_a_task_are_distinct():
    episodes = Sampler(numbered(), "train", 5, 2, 4, seed=0, device=CPU).episodes(50, step=3)
    assert episodes.support_x.shape == (50, 10, 1, 4, 4)
    assert episodes.query_x.shape == (50, 20, 1, 4, 4)
    x = torch.cat([episodes.support_x, episodes.query_x], 1) * 255
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    identity, instance = x[:, :, 0, 3, 3].round().long(), x[:, :, 0, 0, 0].round().long()
    for task in range(50):
        pairs = {(int(i), int(j)) for i, j in zip(identity[task], instance[task], strict=True)}
        assert len(pairs) == 30
        relation = {(int(i), int(label)) for i, label in zip(identity[task], y[task], strict=True)}
        assert len(relation) == 5
        assert {label for _, label in relation} == set(range(5))


def test_episodes_follow_from_seed_stream_and_step():
    def draw(stream="train", seed=0, step=0):
        return Sampler(numbered(), stream, 5, 1, 1, seed, CPU).episodes(4, step).support_x

    assert torch.equal(draw(), draw())
    for other in (draw(stream="test"), draw(seed=1), draw(step=1)):
        assert not torch.equal(draw(), other)


def test_every_class_and_image_is_drawn_equally_often():
    episodes = Sampler(numbered(), "train", 4, 1, 2, seed=0, device=CPU).episodes(3000, step=0)
    drawn = torch.bincount((episodes.support_x[:, :, 0, 3, 3] * 255).round().long().flatten(), minlength=12)
    assert (drawn / 12000 - 1 / 12).abs().max() < 0.01
    images = torch.bincount((episodes.query_x[:, :, 0, 0, 0] * 255).round().long().flatten(), minlength=9)
    assert (images / 24000 - 1 / 9).abs().max() < 0.01


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "message"),
    [
        (30, 1, 1, r"--ways 30: the train set has only 12 classes"),
        (0, 1, 1, r"--ways is 0"),
        (5, 0, 1, r"--shots is 0"),
        (5, 1, -1, r"--queries is -1"),
        (5, 5, 5, r"--shots 5 and 5 queries: a class of the train set has only 9 images"),
    ],
)
def test_bad_requests(ways, shots, queries, message):
    with pytest.raises(UserError, match=message):
        Sampler(numbered(), "train", ways, shots, queries, 0, CPU)


def test_no_tasks():
    with pytest.raises(UserError, match="0 tasks"):
        Sampler(numbered(), "train", 5, 1, 1, 0, CPU).episodes(0, 0)


@pytest.mark.parametrize("two_valued", [True, False])
def test_distorted_images_are_others_of_their_kind(two_valued):
    """Each by itself, of the same classes, from the seed and the step; drawings stay ink and paper."""
    images = torch.zeros(12, 9, 1, 28, 28, dtype=torch.uint8)
    images[..., 8:20, 10:14] = 255 if two_valued else torch.arange(12).view(12, 1, 1, 1, 1).to(torch.uint8) * 20
    classes = ImageClasses(images, tuple(map(str, range(12))))

    def draw(distort, step=3):
        return Sampler(classes, "train", 5, 2, 4, 0, CPU, distort=distort).episodes(8, step)

    plain, moved = draw(0.0), draw(0.1)
    assert torch.equal(plain.query_y, moved.query_y)
    assert torch.equal(moved.query_x, draw(0.1).query_x)
    assert moved.query_x.shape == plain.query_x.shape
    assert torch.equal(draw(0.0).support_x, Sampler(classes, "train", 5, 2, 4, 0, CPU).episodes(8, 3).support_x)
    ink = moved.query_x[plain.query_x.amax((-3, -2, -1)) > 0].flatten(1)
    assert len({tuple(row.tolist()) for row in ink}) > 0.9 * len(ink)
    assert ink.mean() == pytest.approx(plain.query_x[plain.query_x.amax((-3, -2, -1)) > 0].mean().item(), rel=0.1)
    assert (set(moved.query_x.unique().tolist()) <= {0.0, 1.0}) == two_valued


def test_distortion_is_for_training_alone(glyph_root):
    config = Config(ways=3, queries=2, eval_queries=2, width=8, distort=0.1, data_root=glyph_root)
    session = Session.create(config)
    assert session.sampler("train").distort == 0.1
    assert session.sampler("validation").distort == session.sampler("test").distort == 0
    with pytest.raises(UserError, match="a frozen --backbone has seen each image once"):
        Config(distort=0.1, backbone="applications.few_shot.backbone:resnet18").check()
    with pytest.raises(UserError, match="--distort is -1"):
        Config(distort=-1).check()
