"""Prediction: a trained few-shot network that adapts to one's own classes from a few labelled images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.few_shot import backbone
from applications.few_shot.data.images import as_bytes
from applications.few_shot.methods import Learner, Params, adapt
from applications.few_shot.models import inductive
from applications.few_shot.train import describe
from applications.few_shot.trained import Trained
from applications.frame.device import select_device
from applications.frame.errors import UserError

Images = Any
"""A sequence of PIL images, or of arrays; or one array or tensor ``[n, ...]``; see `FewShot.images`."""


class FewShot:
    """A network that learns new classes from a few images each.

    ``FewShot.load("omniglot-20way-1shot").adapt(images, labels)(new_images)`` gives the labels of the new images.

    Attributes:
        trained: the meta-parameters, with the configuration that made them and their origin.
        device: where it computes.
    """

    def __init__(self, trained: Trained, device: torch.device | str = "cpu"):
        self.trained, self.device = trained, torch.device(device)
        self._learners: dict[int, Learner] = {}

    @classmethod
    def load(
        cls, source: str | Path, device: str = "auto", model: str | None = None, backbone: str | None = None
    ) -> FewShot:
        """Load a shipped network by its name, a file that ``export`` wrote, or the last checkpoint of a run's folder.

        Args:
            source: name or path.
            device: ``"auto"`` (the GPU where there is one), ``"cpu"`` or ``"cuda"``.
            model, backbone: the import paths of code of your own, as in its training: a file alone runs none.

        Raises:
            UserError: there is no such network, the file is damaged, or there is no GPU.
        """
        if not isinstance(source, str | Path):
            raise UserError(f"source is {source!r}: the name of a network or the path of a file or folder is needed.")
        trained = replace(Trained.load(source), trusted=(model, backbone))
        trained.refuse_code()
        for name, value in (("model", model), ("backbone", backbone)):
            own = getattr(trained.config, name)
            if value not in (None, own):
                raise UserError(f"{name} is {value!r}, and the network was trained with {own!r}: leave {name} out.")
        return cls(trained, select_device(device))

    def adapt(self, images: Images, labels: Sequence[Hashable] | np.ndarray | Tensor) -> Classifier:
        """Adapt to the classes of some labelled images, as in an evaluation: with its number of steps.

        Args:
            images: n images, at least one of each class; the classes need not have equally many.
            labels: n labels, of any kind: strings, numbers, a tensor or an array.

        Returns:
            The classifier of these classes.

        Raises:
            UserError: other numbers of images and labels, fewer than two classes; images that cannot be used; or more
                or fewer classes than in training, where the network has a head of its own.
        """
        support = self.images(images)
        given = _listed(labels)
        if len(given) != len(support):
            raise UserError(f"There are {len(support)} images and {len(given)} labels: each image needs its label.")
        classes = list(dict.fromkeys(given))
        if len(classes) < 2:
            raise UserError(f"The labels name {len(classes)} class: there must be two or more to tell apart.")
        learner = self._learner(len(classes))
        number = {label: index for index, label in enumerate(classes)}
        y = torch.tensor([number[label] for label in given], device=self.device)
        params = adapt(learner, support.unsqueeze(0), y.unsqueeze(0)).value
        return Classifier(self, learner, params, support, classes, like=labels)

    def __repr__(self) -> str:
        config, (channels, size) = self.trained.config, self.trained.config.image_shape
        about = f"{describe(config)}, {config.model}, images [{channels}, {size}, {size}]"
        return f"FewShot({about}, trained for {self.trained.origin['steps']} meta-steps)"

    def _learner(self, ways: int) -> Learner:
        """That of an evaluation with so many classes, which is built once."""
        if ways not in self._learners:
            self._learners[ways] = self.trained.learner(ways, self.device).for_evaluation()
        return self._learners[ways]

    def images(self, images: Images) -> Tensor:
        """Images as the network takes them: ``[n, channels, size, size]``, in [0, 1]; or the features of its backbone.

        Args:
            images: one of, or a sequence with one for each image:

                - PIL images, or paths of files, of any size and mode: prepared as the files of the training set were.
                  For Omniglot and the glyphs that is dark ink on light paper.
                - arrays or tensors ``[n, height, width]``, ``[n, channels, height, width]`` or ``[n, height, width,
                  channels]``, uint8 in [0, 255] or floating point in [0, 1]: as the network was trained on them, where
                  ink is 1 and paper 0. Of those of another size the middle square is taken and resized.

        Raises:
            UserError: nothing, or something else.
        """
        config = self.trained.config
        channels, size = config.image_shape
        rows = as_bytes(images, config.data, channels, size).to(self.device, config.dtype) / 255
        return rows if config.backbone is None else backbone.features(config, rows).to(config.dtype)


def _listed(labels: Any) -> list[Hashable]:
    if isinstance(labels, Tensor | np.ndarray):
        if np.ma.is_masked(labels):
            raise UserError("The labels are a masked array, and some of them are masked: each image needs its label.")
        if labels.ndim != 1:
            raise UserError(
                f"The labels are an array of shape {tuple(labels.shape)}: one label for each image is needed, of shape "
                "[n]."
            )
        labels = labels.tolist()
    if isinstance(labels, str | AbstractSet | Mapping) or not isinstance(labels, Iterable):
        raise UserError(f"The labels are {labels!r}: a sequence is needed, with one label for each image, in order.")
    given = [label.item() if isinstance(label, Tensor) and label.dim() == 0 else label for label in labels]
    for label in given:
        if isinstance(label, Tensor) or not isinstance(label, Hashable):
            raise UserError(f"A label is {label!r}: give strings, numbers or other values that can be keys of a dict.")
        if label != label:
            raise UserError("A label is NaN, which equals nothing, not itself: leave out the images without a label.")
    return given


@dataclass(frozen=True)
class Classifier:
    """A network that is adapted to some classes. Call it with images, as `FewShot.images` takes them.

    Attributes:
        model: what it was adapted from.
        classes: the labels, in the order in which they were first met; that of the columns of `probabilities`.
    """

    model: FewShot
    learner: Learner = field(repr=False)
    params: Params = field(repr=False)
    support: Tensor = field(repr=False)
    classes: list[Hashable]
    like: Any = field(repr=False)

    def __call__(self, images: Images, *, transductive: bool = False) -> Any:
        """Predict the labels of n images: a tensor or an array like the labels that were given, else a list.

        Args:
            images: see `FewShot.images`.
            transductive: normalise all images by their common statistics, as published accuracies do: better by a
                point or two where the images are many and of all classes. Otherwise the label of an image depends on
                it and the labelled images alone.
        """
        best = self.probabilities(images, transductive=transductive).argmax(-1).tolist()
        found = [self.classes[index] for index in best]
        if isinstance(self.like, Tensor):
            return torch.tensor(found, dtype=self.like.dtype, device=self.like.device)
        return np.array(found, self.like.dtype) if isinstance(self.like, np.ndarray) else found

    def probabilities(self, images: Images, *, transductive: bool = False) -> Tensor:
        """Probabilities ``[n, classes]``: the softmax of the network's outputs, which is not calibrated."""
        x = self.model.images(images)
        with torch.no_grad():
            if transductive:
                return self._logits(x).softmax(-1)
            num_support = len(self.support)
            with inductive(num_support):
                return self._logits(torch.cat([self.support, x]))[num_support:].softmax(-1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.learner.predict(self.params, x.unsqueeze(0))[0]
