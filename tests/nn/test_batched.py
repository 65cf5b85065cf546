"""What all layers share: every nesting of transforms is right, operands that disagree are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import func
from torch.nn import functional as F

from bilevel.nn import Conv2d, batch_norm, conv2d, convolution_statistics, linear, matmul, product
from tests.conformance import randn, relative_error


def along(f):
    return lambda s: func.jvp(f, (s,), (torch.ones_like(s),))[1]


TRANSFORMS = {
    "jacfwd": func.jacfwd,
    "jacrev": func.jacrev,
    "jvp": along,
    "grad": func.grad,
    "vjp": lambda f: lambda s: func.vjp(f, s)[1](torch.ones_like(s))[0],
    "vmap": lambda f: lambda s: func.vmap(f)(torch.stack([s, 2 * s, -s]))[0],
}
NESTINGS = [*itertools.product(TRANSFORMS, repeat=2), ("jvp", "jvp", "jvp"), ("jacfwd", "vmap", "jacfwd")]
NESTINGS += [("hessian", "jvp"), ("jvp", "hessian"), ("grad", "jvp", "jvp"), ("jvp", "jvp", "grad")]


def plain_norm(x, weight, bias, pool):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y = (x - mean) * (variance + 1e-5).rsqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return y if pool is None else y.unflatten(-1, (-1, pool)).unflatten(2, (-1, pool)).amax((3, 5))


X, W, B = randn(2, 2, 4, 4, seed=0), randn(2, 2, 3, 3, seed=1), torch.tensor([1.2, -0.7], dtype=torch.float64)
LAYERS = {
    "conv2d": (conv2d, F.conv2d, lambda s: (X * s.sin(), W * s, B * s)),
    "conv2d, one operand": (conv2d, F.conv2d, lambda s: (X, W * s.exp())),
    "batch_norm": (batch_norm, plain_norm, lambda s: (X * s + X.square() * s.cos(), B * s.exp(), B * s, 1e-5, None)),
    "batch_norm, pool": (batch_norm, plain_norm, lambda s: (X * s + X.sin() * s.exp(), B * s, B + s, 1e-5, 2)),
    "matmul": (matmul, torch.matmul, lambda s: (X[0, 0] * s.sin(), W[0, 0].new_ones(4, 3) * s)),
    "convolution_statistics": (
        convolution_statistics,
        lambda x, w: torch.var_mean(F.conv2d(x, w), (0, 2, 3), correction=0)[::-1],
        lambda s: (X * s.sin(), W * s),
    ),
}


def loss_of(layer, operands):
    def loss(s):
        given = operands(s)
        if layer is plain_norm:
            given = (*given[:3], given[4])
        out = layer(*given)
        return sum(part.pow(3).sum() + part.square().sum() for part in ((out,) if torch.is_tensor(out) else out))

    return loss


@pytest.mark.parametrize("name", LAYERS)
def test_every_nesting_of_transforms(name, monkeypatch):
    """In PyTorch forward mode over forward mode is silently zero for custom functions."""
    monkeypatch.setattr(product, "_is_thin", lambda a, b: a.dim() == b.dim() == 2)
    monkeypatch.setattr(product, "_times_transposed", lambda a, b: a @ b.mT)
    layer, truth, operands = LAYERS[name]
    s = torch.tensor(0.8, dtype=torch.float64)
    wrong = {}
    for nesting in NESTINGS:
        found, expected = loss_of(layer, operands), loss_of(truth, operands)
        for transform in nesting:
            apply = func.hessian if transform == "hessian" else TRANSFORMS[transform]
            found, expected = apply(found), apply(expected)
        error = relative_error(found(s), expected(s))
        if not error < 1e-9:
            wrong[nesting] = error
    assert not wrong


def test_the_pull_of_a_layer_under_nested_forward_mode():
    """The layer itself was called outside of the transforms, its derivative is called under two."""
    _, pull = func.vjp(lambda w: conv2d(X, w), W)
    _, truth = func.vjp(lambda w: F.conv2d(X, w), W)
    s = torch.tensor(0.8, dtype=torch.float64)
    found, expected = (
        along(along(lambda s, pull=pull: pull(s**3 * torch.ones(2, 2, 2, 2, dtype=s.dtype))[0].sum()))
        for pull in (pull, truth)
    )
    assert relative_error(found(s), expected(s)) < 1e-12


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


IMAGES, FILTERS = zeros(3, 2, 1, 5, 5), zeros(3, 4, 1, 3, 3)
DISAGREEMENTS = {
    "tasks of the filters": (lambda: conv2d(IMAGES, FILTERS[:2]), r"\(3, 2, 1, 5, 5\).*\(2, 4, 1, 3, 3\).*first dim"),
    "one task of images": (lambda: conv2d(IMAGES[:1], FILTERS), r"conv2d.*first dimension T"),
    "tasks of the bias": (lambda: conv2d(IMAGES, FILTERS, zeros(2, 4)), r"bias \(2, 4\)"),
    "bias of no task": (lambda: conv2d(IMAGES, FILTERS, zeros(4)), r"bias of shape \(3, 4\)"),
    "filters of the bias": (lambda: conv2d(IMAGES[0], FILTERS[0], zeros(1)), r"bias of shape \(4\)"),
    "channels": (lambda: conv2d(zeros(2, 2, 5, 5), FILTERS[0]), r"weight of shape \(any, 2, any, any\)"),
    "groups": (lambda: conv2d(zeros(2, 4, 5, 5), zeros(4, 2, 3, 3)), r"weight of shape \(any, 4, any, any\)"),
    "one network, many images": (lambda: conv2d(IMAGES, FILTERS[0]), r"weight of shape \(3, any, 1, any, any\)"),
    "dtype": (lambda: conv2d(IMAGES[0], FILTERS[0].double()), "x torch.float32, weight torch.float64"),
    "device": (lambda: conv2d(IMAGES[0], FILTERS[0].to("meta")), "x cpu, weight meta"),
    "stride": (lambda: conv2d(IMAGES[0], FILTERS[0], stride=0), "stride is 0"),
    "padding": (lambda: Conv2d(1, 4, 3, padding="same")(IMAGES[0]), "padding is 'same'"),
    "norm, tasks": (lambda: batch_norm(IMAGES, zeros(2, 1), zeros(2, 1)), r"weight of shape \(3, 1\)"),
    "norm, channels": (lambda: batch_norm(zeros(2, 3, 4, 4), zeros(1), zeros(1)), r"weight of shape \(3\)"),
    "norm, bias": (lambda: batch_norm(zeros(2, 3, 4, 4), zeros(3), zeros(1)), r"bias of shape \(3\)"),
    "norm, statistics": (
        lambda: batch_norm(zeros(2, 3, 4, 4), zeros(3), zeros(3), statistics=(zeros(3), zeros(1))),
        r"variance of shape \(3\)",
    ),
    "norm, dtype": (
        lambda: batch_norm(zeros(2, 3, 4, 4), zeros(3), zeros(3, dtype=torch.float64)),
        "bias torch.float64",
    ),
    "norm, pool": (lambda: batch_norm(zeros(2, 3, 4, 4), zeros(3), zeros(3), pool=5), "pool is 5"),
    "statistics, tasks": (lambda: convolution_statistics(IMAGES, FILTERS[:2]), "convolution_statistics was given"),
    "linear, tasks": (lambda: linear(zeros(3, 5, 4), zeros(2, 6, 4)), r"x of shape \(2, any, 4\)"),
    "linear, inputs": (lambda: linear(zeros(5, 3), zeros(6, 4)), r"x of shape \(any, 4\)"),
    "linear, bias of tasks": (lambda: linear(zeros(5, 4), zeros(6, 4), zeros(3, 6)), r"bias of shape \(6\)"),
    "linear, bias": (lambda: linear(zeros(5, 4), zeros(6, 4), zeros(1)), r"bias of shape \(6\)"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_operands_that_disagree(case):
    run, message = DISAGREEMENTS[case]
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_operands_that_are_not_real(dtype):
    """A complex norm squared without the modulus, in silence; convolutions had no backward pass."""
    images, filters, channels = (torch.ones(shape, dtype=dtype) for shape in ((2, 3, 5, 5), (4, 3, 3, 3), (3,)))
    for run in (
        lambda: conv2d(images, filters),
        lambda: batch_norm(images, channels, channels),
        lambda: convolution_statistics(images, filters),
    ):
        with pytest.raises(TypeError, match=f"x {dtype}, weight {dtype}.*real operands of floating point"):
            run()
    linear(images, torch.ones(2, 5, dtype=dtype))


def test_operands_that_agree():
    """As PyTorch takes them: low precision with norms in single precision, inputs of any shape, autocast, vmap."""
    assert linear(zeros(4), zeros(6, 4), zeros(6)).shape == (6,)
    assert linear(zeros(2, 5, 4), zeros(6, 4), zeros(6)).shape == (2, 5, 6)
    assert linear(zeros(5, 4), zeros(3, 6, 4), zeros(3, 6)).shape == (3, 5, 6)
    assert batch_norm(zeros(2, 3, 4, 4).bfloat16(), zeros(3), zeros(3)).dtype is torch.float32
    assert torch.func.vmap(conv2d, in_dims=(None, 0, 0))(IMAGES[0], FILTERS, zeros(3, 4)).shape == (3, 2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(IMAGES[0].bfloat16(), FILTERS[0], zeros(4)).dtype is torch.bfloat16
        assert linear(zeros(5, 4).bfloat16(), zeros(6, 4)).dtype is torch.bfloat16
