"""Layers made for Hessian products: right in every mode of differentiation, and fast.

`conv2d`, `batch_norm`, `linear` and `matmul` give what PyTorch's own give, for one network or for T networks at once,
whose parameters and inputs then have a first dimension T. A network of other layers works just as well with every
solver, under `torch.vmap`, only slower, and without fused norms in training mode.
"""

from .convolution import Conv2d, conv2d
from .functional import functional_call, linear
from .kernels import KernelName, choose_kernels
from .norm import batch_norm, convolution_statistics
from .product import matmul

__all__ = [
    "Conv2d",
    "KernelName",
    "batch_norm",
    "choose_kernels",
    "conv2d",
    "convolution_statistics",
    "functional_call",
    "linear",
    "matmul",
]
