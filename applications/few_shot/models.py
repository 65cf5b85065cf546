"""Networks: Conv4 with two norms, a fully connected one, or any module by its import path.

The norms are written with `torch.var_mean`: PyTorch's fused batch norm gives wrong Hessian products under
`torch.func` transforms outside `vmap`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from applications.errors import UserError


class BatchStatNorm(nn.Module):
    """Batch norm by the statistics of the batch itself, always: transductive where a query set is one batch.

    Inside `inductive(net, n)` the first n images, the support set, are normalised by their own statistics, and each
    later image by those of the support set and itself: no query sees another.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.num_support: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x[: self.num_support], (0, 2, 3), correction=0, keepdim=True)
        if self.num_support is not None:
            variance, mean = _with_itself(x, variance, mean, self.num_support)
        scale = torch.rsqrt(variance + 1e-5) * self.weight[:, None, None]
        return (x - mean) * scale + self.bias[:, None, None]


def _with_itself(x: Tensor, variance: Tensor, mean: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Statistics for each image: of the n support images, and for a query of those and itself together."""
    own_variance, own_mean = torch.var_mean(x[n:], (2, 3), correction=0, keepdim=True)
    joint = (n * mean + own_mean) / (n + 1)
    spread = n * (variance + (mean - joint).square()) + own_variance + (own_mean - joint).square()
    support = (n, *mean.shape[1:])
    return torch.cat([variance.expand(support), spread / (n + 1)]), torch.cat([mean.expand(support), joint])


@contextlib.contextmanager
def inductive(net: nn.Module, num_support: int) -> Iterator[None]:
    """Within it, ``net`` takes support and query images as one batch, and no query sees another."""
    norms = [module for module in net.modules() if isinstance(module, BatchStatNorm)]
    for module in norms:
        module.num_support = num_support
    try:
        yield
    finally:
        for module in norms:
            module.num_support = None


class ImageNorm(nn.Module):
    """Normalise every image by its own statistics over groups of channels: inductive, no image sees another."""

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        variance, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
        normal = ((grouped - mean) * torch.rsqrt(variance + 1e-5)).flatten(1, 2)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


NORMS = {"batch": BatchStatNorm, "image": ImageNorm}


class Conv4(nn.Module):
    """Four times [3x3 convolution, norm, ReLU, halve], then a linear head (Vinyals et al. 2016, Finn et al. 2017).

    Args:
        channels, image_size, ways: of the images, and classes of a task.
        width: filters of each convolution.
        norm: ``"batch"`` or ``"image"``.
        halve: ``"pool"`` (2x2 max-pool) or ``"stride"`` (the convolution's stride: a quarter of the work).

    The head starts at zero: no class is preferred before adaptation, whatever its number in the task.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 28,
        ways: int = 5,
        *,
        width: int = 64,
        norm: str = "batch",
        halve: str = "pool",
    ):
        super().__init__()
        stride = 2 if halve == "stride" else 1
        layers: list[nn.Module] = []
        for block in range(4):
            convolution = nn.Conv2d(channels if block == 0 else width, width, 3, stride=stride, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers += [convolution, NORMS[norm](width), nn.ReLU()]
            if halve == "pool":
                layers.append(nn.MaxPool2d(2))
            image_size = (image_size + 1) // 2 if halve == "stride" else image_size // 2
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = zero_linear(width * image_size**2, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class FullyConnected(nn.Module):
    """Layers of 256, 128, 64 and 64 units, each normalised over its features (after Finn et al. 2017)."""

    def __init__(self, channels: int = 1, image_size: int = 28, ways: int = 5):
        super().__init__()
        sizes = (channels * image_size**2, 256, 128, 64, 64)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = zero_linear(sizes[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            x = F.relu((x - mean) * torch.rsqrt(variance + 1e-5))
        return self.head(x)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build(name: str, channels: int, image_size: int, ways: int, **conv4: int | str) -> nn.Module:
    """A network for images ``[n, channels, size, size]`` with ``ways`` outputs.

    Args:
        name: ``"conv4"``, ``"fc"``, or ``"package.module:factory"``, called with (channels, image_size, ways).
        conv4: width, norm and halve, for Conv4 only.

    Raises:
        UserError: the import path leads nowhere, or the network cannot be adapted.
    """
    if name == "conv4":
        return Conv4(channels, image_size, ways, **conv4)  # type: ignore[arg-type]
    if name == "fc":
        return FullyConnected(channels, image_size, ways)
    net = _imported(name)(channels, image_size, ways)
    for module in net.modules():
        if getattr(module, "track_running_stats", False):
            raise UserError(
                f"--model {name} has a {type(module).__name__} with running statistics: they cannot be adapted task "
                "by task. Build it with track_running_stats=False, or with "
                "applications.few_shot.models:BatchStatNorm."
            )
    return net


def _imported(name: str):  # type: ignore[no-untyped-def]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"--model {name} is neither 'conv4' nor 'fc' nor an import path 'package.module:factory'.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--model {name} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
