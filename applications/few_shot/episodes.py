"""Episodes: T few-shot tasks as one batch of tensors, sampled on the device by a generator of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from applications.few_shot.data import ImageClasses
from applications.frame.errors import UserError


@dataclass(frozen=True)
class Episodes:
    """T tasks: images ``[T, n, channels, size, size]`` in [0, 1] and labels ``[T, n]`` in [0, ways)."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.support_x, self.support_y, self.query_x, self.query_y


def distorted(images: Tensor, amount: float, two_valued: bool, generator: torch.Generator) -> Tensor:
    """Each image sheared, stretched, turned and moved by random amounts, as other hands and cameras do.

    Args:
        images: ``[..., channels, size, size]``.
        amount: standard deviation of the six numbers of the affine map, in halves of the image's side.
        two_valued: drawings of ink and paper, which stay that: what lies between is new to a network of them.
    """
    flat = images.flatten(0, -4)
    maps = amount * torch.randn(len(flat), 2, 3, generator=generator, device=images.device)
    maps[:, :, :2] += torch.eye(2, device=images.device)
    grid = affine_grid(maps.to(images.dtype), list(flat.shape), align_corners=False)
    moved = grid_sample(flat, grid, padding_mode="border", align_corners=False)
    moved = (moved > 0.5).to(images.dtype) if two_valued else moved
    return moved.view_as(images)


class Sampler:
    """Draws episodes from classes whose images stay on the device as bytes.

    The episodes of a step depend on the seed, the stream's name and the step alone, so a resumed run sees the
    episodes of an uninterrupted one.

    Args:
        distort: standard deviation of the random linear maps and shifts of each image, see `distorted`; 0: none.

    Raises:
        UserError: fewer classes than ways, fewer images than shots + queries, or nothing asked for.
    """

    def __init__(
        self,
        classes: ImageClasses,
        stream: str,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        distort: float = 0.0,
    ):
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
            if value < 1:
                raise UserError(f"--{name} is {value}: at least 1 is needed.")
        if ways > len(classes):
            raise UserError(
                f"--ways {ways}: the {stream} set has only {len(classes)} classes, and the classes of a task are "
                "distinct. Take fewer ways or another data set."
            )
        if shots + queries > classes.num_instances:
            counts = classes.counts or (classes.num_instances,) * len(classes)
            which = "a class" if classes.counts is None else f"the class {classes.names[counts.index(min(counts))]!r}"
            raise UserError(
                f"--shots {shots} and {queries} queries: {which} of the {stream} set has only "
                f"{classes.num_instances} images. Lower --shots, --queries or --eval-queries."
            )
        self.images = classes.images.to(device)
        self.blank: Tensor | None = None
        if classes.counts is not None:
            last = torch.tensor(classes.counts, device=device).unsqueeze(-1)
            self.blank = torch.arange(self.images.shape[1], device=device) >= last
        self.stream, self.seed, self.device, self.dtype = stream, seed, device, dtype
        self.ways, self.shots, self.queries, self.distort = ways, shots, queries, distort
        self.two_valued = distort > 0 and bool(((self.images == 0) | (self.images == 255)).all())

    def episodes(self, num_tasks: int, step: int, part: slice = slice(None)) -> Episodes:
        """The ``num_tasks`` tasks of a step, or a part of them: that of one rank among many."""
        if num_tasks < 1:
            raise UserError(f"{num_tasks} tasks were asked for: at least 1 is needed.")
        generator = self._generator(step)
        num_classes, num_instances = self.images.shape[:2]
        draw = torch.rand(num_tasks, num_classes, generator=generator, device=self.device)
        classes = draw.topk(self.ways, -1).indices[part]
        draw = torch.rand(num_tasks, self.ways, num_instances, generator=generator, device=self.device)[part]
        if self.blank is not None:
            draw = draw.masked_fill(self.blank[classes], -1.0)
        instances = draw.topk(self.shots + self.queries, -1).indices
        images = self.images[classes.unsqueeze(-1), instances]
        images = images.to(self.dtype) / (255 if images.dtype == torch.uint8 else 1)
        if self.distort:
            images = distorted(images, self.distort, self.two_valued, generator)
        labels = torch.arange(self.ways, device=self.device).view(1, -1, 1).expand(instances.shape)
        return Episodes(
            images[:, :, : self.shots].flatten(1, 2),
            labels[:, :, : self.shots].flatten(1, 2),
            images[:, :, self.shots :].flatten(1, 2),
            labels[:, :, self.shots :].flatten(1, 2),
        )

    def _generator(self, step: int) -> torch.Generator:
        entropy = [self.seed, step, *self.stream.encode()]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(state >> np.uint64(1)))
