"""Networks: Conv4 with two norms, a fully connected one, or any module by its import path."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel as bl
from applications.frame.errors import UserError
from applications.frame.norm import ImageNorm, pooled
from applications.frame.options import imported

_num_support: ContextVar[int | None] = ContextVar("num_support", default=None)


@contextlib.contextmanager
def inductive(num_support: int) -> Iterator[None]:
    """Within it, networks take support and query images as one batch, and no query sees another.

    Every `BatchStatNorm` then normalises the first ``num_support`` images by their own statistics, and each later
    image by those of the support set and itself.
    """
    token = _num_support.set(num_support)
    try:
        yield
    finally:
        _num_support.reset(token)


class BatchStatNorm(nn.Module):
    """Batch norm by the statistics of the batch itself, always: transductive where a query set is one batch."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, pool: int | None = None, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalise, then max-pool where asked for; by the statistics of x, where they are known already."""
        num_support = _num_support.get()
        if num_support is None:
            return bl.nn.batch_norm(x, self.weight, self.bias, pool=pool, statistics=statistics)
        variance, mean = _with_itself(x, num_support)
        factor = torch.rsqrt(variance + 1e-5) * self.weight[..., None, :, None, None]
        # In one pass over the images, the largest tensors there are.
        return pooled(torch.addcmul(self.bias[..., None, :, None, None] - mean * factor, x, factor), pool)


def _with_itself(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Variance and mean for each image: of the n support images, and for a query of those and itself together."""
    support, queries = x.split((n, x.shape[-4] - n), -4)
    variance, mean = torch.var_mean(support, (-4, -2, -1), correction=0, keepdim=True)
    own_mean = queries.mean((-2, -1), keepdim=True)
    own_variance = (queries - own_mean).square_().mean((-2, -1), keepdim=True)  # var_mean is ten times slower here
    joint = (n * mean + own_mean) / (n + 1)
    spread = n * (variance + (mean - joint).square()) + own_variance + (own_mean - joint).square()
    shape = [*mean.shape[:-4], n, *mean.shape[-3:]]
    return torch.cat([variance.expand(shape), spread / (n + 1)], -4), torch.cat([mean.expand(shape), joint], -4)


NORMS = {"batch": BatchStatNorm, "image": ImageNorm}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Those of PyTorch, whose predictions depend on all images of a batch."""


class Block(nn.Module):
    """3x3 convolution, norm, halving, ReLU.

    The halving by max-pool comes before the ReLU, with which it commutes, at a quarter of the work.
    """

    def __init__(self, channels: int, filters: int, norm: str, halve: str):
        super().__init__()
        self.stride = 2 if halve == "stride" else 1
        self.convolution = bl.nn.Conv2d(channels, filters, 3, self.stride, padding=1)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="linear")
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]
        self.norm = NORMS[norm](filters)
        self.pool = halve == "pool"

    def forward(self, x: Tensor) -> Tensor:
        weight, pool = self.convolution.weight, 2 if self.pool else None
        if not isinstance(self.norm, BatchStatNorm):
            return self.norm(bl.nn.conv2d(x, weight, self.convolution.bias, self.stride, padding=1), pool).relu()
        # Batch norm takes a bias away again: it is a parameter that the papers count, and no work.
        y = bl.nn.conv2d(x, weight, None, self.stride, padding=1)
        statistics = None
        if weight.shape[-3:].numel() <= weight.shape[-4] and _num_support.get() is None:
            statistics = bl.nn.convolution_statistics(x, weight, self.stride, padding=1)
        return self.norm(y, pool, statistics).relu()


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
        blocks = [Block(channels if block == 0 else width, width, norm, halve) for block in range(4)]
        self.features = nn.Sequential(*blocks, nn.Flatten(-3))
        self.largest = width * (image_size if halve == "pool" else (image_size + 1) // 2) ** 2  # numbers for an image
        for _ in blocks:
            image_size = (image_size + 1) // 2 if halve == "stride" else image_size // 2
        self.head = zero_linear(width * image_size**2, ways)

    takes_tasks = True

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, ways]``; of T tasks, where x and all parameters have a first dimension T, ``[T, n, ways]``."""
        return bl.nn.linear(self.features(x), self.head.weight, self.head.bias)


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


class FeatureHead(nn.Module):
    """A linear head on features of unit length, each multiplied by a factor that is learned.

    With all factors at their start it is what people adapt to the features of a pretrained network today: a softmax
    regression. The start is where steps of 0.1 are stable, and the factors are the metric that meta-learning finds.
    """

    takes_tasks = True

    def __init__(self, size: int, ways: int = 5):
        super().__init__()
        self.features = Factors(size)
        self.head = zero_linear(size, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of features ``[n, size, 1, 1]``; with T in front, of T tasks."""
        return bl.nn.linear(self.features(x), self.head.weight, self.head.bias)


class Factors(nn.Module):
    """Features ``[n, size, 1, 1]`` as vectors of unit length times a factor each; with T in front, of T tasks."""

    START = 4.0

    def __init__(self, size: int):
        super().__init__()
        self.factor = nn.Parameter(torch.full((size,), self.START))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.flatten(-3), dim=-1) * self.factor.unsqueeze(-2)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build(name: str, channels: int, image_size: int, ways: int, **conv4: int | str) -> nn.Module:
    """A network for images ``[n, channels, size, size]`` with ``ways`` outputs.

    Args:
        name: ``"conv4"``, ``"fc"``, ``"head"``, or ``"package.module:factory"``, called with (channels, image_size,
            ways).
        conv4: width, norm and halve, for Conv4 only.

    Raises:
        UserError: the import path leads nowhere, or the network cannot be adapted.
    """
    if name == "conv4":
        return Conv4(channels, image_size, ways, **conv4)  # type: ignore[arg-type]
    if name == "fc":
        return FullyConnected(channels, image_size, ways)
    if name == "head":
        return FeatureHead(channels * image_size**2, ways)
    net = _made(name, channels, image_size, ways)
    for module in net.modules():
        if isinstance(module, BATCH_NORMS) or getattr(module, "track_running_stats", False):
            raise UserError(
                f"--model {name} has a {type(module).__name__}. Running statistics cannot be adapted task by task, and "
                "without them a prediction would depend on the other queries. Take BatchStatNorm of "
                "applications.few_shot.models in its place, which can do without them, or a norm of each image by "
                "itself, such as GroupNorm or LayerNorm."
            )
    if not getattr(net, "takes_tasks", False):
        _try_many_tasks(name, net, torch.zeros(2, 2, channels, image_size, image_size))
    return net


def _made(name: str, channels: int, image_size: int, ways: int) -> nn.Module:
    """What the user's factory makes, tried on two images.

    Raises:
        UserError: it makes no network for such images and classes.
    """
    factory = imported("--model", name, known="neither 'conv4' nor 'fc' nor")
    try:
        net = factory(channels, image_size, ways)
        if not isinstance(net, nn.Module):
            raise TypeError(f"it returned {type(net).__name__}, which is no torch.nn.Module")
        if bad := next((name for name, param in net.named_parameters() if not param.isfinite().all()), None):
            raise ValueError(f"its parameter {bad} begins with values that are not finite")
        with torch.no_grad():
            shape = list(copy.deepcopy(net)(torch.zeros(2, channels, image_size, image_size)).shape)
        if shape != [2, ways]:
            raise ValueError(f"its network gives {shape} for two images, and [2, {ways}] is needed")
    except (Exception, SystemExit) as error:  # it is the user's code
        raise UserError(
            f"--model {name} makes no network for images [n, {channels}, {image_size}, {image_size}] and {ways} "
            f"classes ({_told(error)}). It is called with (channels, image size, ways), and its network with two "
            "images."
        ) from error
    return net


def _try_many_tasks(name: str, net: nn.Module, x: Tensor) -> None:
    """Call it as the tasks of a meta-step are: once for all, each with parameters of its own.

    Raises:
        UserError: it cannot be.
    """
    params = {name: param.expand(len(x), *param.shape) for name, param in net.named_parameters()}
    with torch.no_grad():
        try:
            torch.vmap(lambda own, images: functional_call(net, own, (images,)))(params, x)
        except Exception as error:  # it is the user's code
            raise UserError(
                f"--model {name} makes a network that fails where all tasks are computed at once, by torch.vmap "
                f"({_told(error)}). Its forward must hold no random numbers (dropout), no .item(), no assertion or "
                "branch on the values of images, and change none of its buffers."
            ) from error


def _told(error: BaseException) -> str:
    """What went wrong, and where: the last place outside of PyTorch."""
    places = [
        place
        for place in traceback.extract_tb(error.__traceback__)
        if not place.filename.startswith((str(Path(torch.__file__).parent), __file__))
    ]
    where = f", at {places[-1].filename}:{places[-1].lineno}" if places else ""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}{where}"
