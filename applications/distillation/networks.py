"""What is trained on the synthetic images: a linear classifier, a small ConvNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel as bl

Params = dict[str, Tensor]


class Linear(nn.Module):
    """Softmax regression on the pixels; starts at zero, whatever the seed."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return bl.nn.linear(x.flatten(-3), self.head.weight, self.head.bias)


class ConvNet(nn.Module):
    """Blocks of [3x3 convolution of stride 2, SiLU], then a linear head that starts at zero.

    A block halves the image, so three serve 28 x 28 and two 8 x 8. SiLU, not ReLU: the hypergradient is a second
    derivative of the training loss, and one with kinks makes it jump from step to step. No norm, so that no image
    depends on another.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        channels, height, breadth = shape
        blocks: list[nn.Module] = []
        while height > 4 or not blocks:
            convolution = bl.nn.Conv2d(channels, width, 3, stride=2, padding=1)
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            blocks.append(convolution)
            channels, height, breadth = width, (height + 1) // 2, (breadth + 1) // 2
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width * height * breadth, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.silu(block(x))
        return bl.nn.linear(x.flatten(-3), self.head.weight, self.head.bias)


def outputs(network: nn.Module, params: Params, x: Tensor) -> Tensor:
    """Logits ``[n, classes]`` of the network with other parameters than its own."""
    return bl.nn.functional_call(network, params, (x,))


def initial(network: nn.Module, seed: int) -> Params:
    """Parameters drawn anew, by the seed alone; the network itself is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = {name: torch.zeros_like(param) for name, param in network.named_parameters()}
        for param in params.values():
            if param.dim() == 4:
                nn.init.kaiming_normal_(param)
        return params


@torch.no_grad()
def accuracy(network: nn.Module, params: Params, x: Tensor, y: Tensor, chunk: int = 1000) -> float:
    """In percent."""
    right = [outputs(network, params, part).argmax(1) for part in x.split(chunk)]
    return 100 * (torch.cat(right) == y).double().mean().item()
