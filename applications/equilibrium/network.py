"""Networks whose hidden layer is an equilibrium, with a bound that makes it exist, be unique and be found."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class Network(nn.Module):
    """``head(z*)`` with ``z* = relu(W z* + inject(x))``: endless layers that share one weight (Bai et al. 2019).

    The weight enters as ``W = V min(1, q / ||V||)``, so its operator norm is at most ``contraction = q < 1``. ReLU
    never stretches a distance: the map contracts by q whatever the training does to V. There is one equilibrium, the
    plain iteration and the adjoint series converge at the rate q or better, and no normalisation layer is needed.

    Args:
        inject: of the input, to the shape of the state. weight: V. head: of the state, to the logits.
    """

    def __init__(self, inject: nn.Module, weight: Tensor, head: nn.Module, contraction: float):
        super().__init__()
        self.inject, self.weight, self.head = inject, nn.Parameter(weight), head
        self.contraction = contraction

    def mix(self, z: Tensor, weight: Tensor) -> Tensor:
        """The linear map that a weight stands for."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """The operator norm of `mix` with V, or an upper bound of it; differentiable."""
        raise NotImplementedError

    def bounded_weight(self) -> Tensor:
        """W."""
        return self.weight * (self.contraction / self.norm().clamp_min(self.contraction))

    def layer(self, z: Tensor, weight: Tensor, injected: Tensor) -> Tensor:
        """``relu(W z + inject(x))``."""
        return torch.relu(self.mix(z, weight) + injected)


class Dense(Network):
    """States ``[n, width]`` of examples ``[n, features]``."""

    def __init__(self, num_features: int, width: int, num_classes: int, contraction: float):
        weight = torch.randn(width, width) / width**0.5
        super().__init__(nn.Linear(num_features, width), weight, nn.Linear(width, num_classes), contraction)

    def mix(self, z: Tensor, weight: Tensor) -> Tensor:
        return linear(z, weight)

    def norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.weight, 2)


class Convolutional(Network):
    """States ``[n, width, h, w]`` of images ``[n, channels, H, W]``, whose sides are 4 times as long; twice, below 16.

    The kernel is 3 x 3. The norm is that of the convolution on a torus one pixel larger, over whose frequencies it is
    diagonal in blocks of ``width x width`` (Sedghi, Gupta, Long 2019). Zero padding is that torus with its extra row
    and column held at zero, and leaving rows out never raises a norm: an upper bound.
    """

    def __init__(self, image: tuple[int, int, int], width: int, num_classes: int, contraction: float):
        channels, *size = image
        stride = 4 if min(size) >= 16 else 2
        self.size = [-(-side // stride) for side in size]
        inject = nn.Conv2d(channels, width, kernel_size=3 + stride, stride=stride, padding=1 + stride // 2)
        head = nn.Sequential(nn.Flatten(), nn.Linear(width * self.size[0] * self.size[1], num_classes))
        super().__init__(inject, torch.randn(width, width, 3, 3) / (3 * width**0.5), head, contraction)

    def mix(self, z: Tensor, weight: Tensor) -> Tensor:
        return conv2d(z, weight, padding=1)

    def norm(self) -> Tensor:
        frequencies = torch.fft.rfft2(self.weight, s=[side + 1 for side in self.size])
        return torch.linalg.matrix_norm(frequencies.permute(2, 3, 0, 1), 2).amax()
