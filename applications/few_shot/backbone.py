"""A frozen backbone: the features of a pretrained network in the place of images, computed once and kept.

What is learned and adapted is a small head behind them, `models.FeatureHead`. `resnet18` shows what a factory is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from applications.few_shot import data
from applications.few_shot.config import Config
from applications.few_shot.data import ImageClasses, Splits
from applications.frame.data.files import cached
from applications.frame.errors import UserError
from applications.frame.options import imported

AT_ONCE = 64
"""Images in one pass of a backbone."""


def resnet18(channels: int, image_size: int) -> nn.Module:
    """ResNet-18 with torchvision's ImageNet weights, which torchvision downloads once; 512 features of an image.

    Images of 224 pixels in colour are what it was trained on: ``--image-size 224``.
    """
    from torchvision import models, transforms

    net = models.resnet18(weights=models.ResNet18_Weights.DEFAULT)
    net.fc = nn.Identity()
    return nn.Sequential(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), net)


def splits(config: Config) -> Splits:
    """What the episodes of a configuration are made of: its images, or the features that its backbone has of them."""
    images = data.load(config.data, config.data_root, split=config.split, reading=config.reading)
    if config.backbone is None:
        return images
    cache = data.data_root(config.data_root) / "features"
    parts = {part: _kept(config, classes, cache) for part, classes in vars(images).items()}
    return Splits(**parts)


def shape(config: Config) -> tuple[int, int]:
    """Channels and side of what the network sees: of images, or the number of features and 1."""
    if config.backbone is None:
        return config.image_shape
    channels, size = config.image_shape
    return features(config, torch.zeros(1, channels, size, size)).shape[1], 1


def features(config: Config, images: Tensor) -> Tensor:
    """Features ``[n, size, 1, 1]``, float32, of images ``[n, channels, side, side]`` in [0, 1], without gradients.

    Raises:
        UserError: the import path leads nowhere; the backbone fails, or gives something else than ``[n, size]``.
    """
    net = _frozen(config.backbone or "", *config.image_shape).to(images.device)
    with torch.no_grad():
        try:
            found = torch.cat([net(part.float()) for part in images.split(AT_ONCE)])
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"--backbone {config.backbone} fails on images {list(images.shape[1:])}: {str(error).splitlines()[0]}. "
                "It takes [n, channels, size, size] in [0, 1]; see --image-size and --grey."
            ) from error
    if found.dim() != 2 or len(found) != len(images) or not bool(torch.isfinite(found).all()):
        raise UserError(
            f"--backbone {config.backbone} gives {list(found.shape)} for {len(images)} images: finite features "
            "[n, size] are needed. Flatten or average its maps, and take its classifier away."
        )
    return found.float()[..., None, None]


@lru_cache(maxsize=2)
def _frozen(name: str, channels: int, size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same every time, where a factory draws weights
        factory = imported("--backbone", name)
        try:
            net = factory(channels, size)
            if not isinstance(net, nn.Module):
                raise TypeError(f"it returned {type(net).__name__}, which is no torch.nn.Module")
        except (Exception, SystemExit) as error:  # it is the user's code
            raise UserError(
                f"--backbone {name} makes no network ({type(error).__name__}: {error}). It is called with (channels, "
                "image size)."
            ) from error
    return net.eval().requires_grad_(False)


def _kept(config: Config, classes: ImageClasses, cache: Path) -> ImageClasses:
    path = cache / f"{_key(config, classes)}.npz"
    count, instances = classes.images.shape[:2]

    def make() -> dict[str, np.ndarray]:
        rows = torch.cat([features(config, images.float() / 255) for images in classes.images])
        return {"features": rows.view(count, instances, -1).numpy()}

    found = cached(path, {"features": ("float32", (count, instances, None))}, make)["features"]
    return replace(classes, images=torch.from_numpy(found)[..., None, None])


def _key(config: Config, classes: ImageClasses) -> str:
    """Changes with the backbone's name, code and weights, and with the images."""
    found = hashlib.sha256(f"{config.backbone} {_frozen(config.backbone or '', *config.image_shape)}".encode())
    for name, tensor in sorted(_frozen(config.backbone or "", *config.image_shape).state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    found.update(classes.images.contiguous().numpy())
    return found.hexdigest()[:20]
