from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from bilevel.nn import batch_norm, conv2d, convolution_statistics
from tests.conformance import randn, relative_error

POOLS = [None, 2]


def operands(*batch, n=4, dtype=torch.float64):
    """Weights of both signs."""
    torch.manual_seed(0)
    x = 3 + torch.randn(*batch, n, 3, 5, 6, dtype=dtype)
    weight = torch.tensor([1.5, -0.7, 0.3], dtype=dtype).expand(*batch, 3).clone()
    return x, weight, torch.randn(*batch, 3, dtype=dtype)


def plain(x, weight, bias, pool):
    """From parts that PyTorch differentiates right in reverse mode."""
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return y if pool is None else F.max_pool2d(y, pool)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_torchs(pool, layout):
    found, expected = [], []
    for normalise, out in ((batch_norm, found), (plain, expected)):
        x, w, b = operands()
        inputs = [t.requires_grad_() for t in (x.contiguous(memory_format=layout), w, b)]
        y = normalise(*inputs, pool=pool)
        out += [y, *torch.autograd.grad(y.sin().sum(), inputs)]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("pool", POOLS)
def test_every_order_and_mode(pool):
    inputs = [t.requires_grad_() for t in operands(n=2)]

    def fn(*inputs):
        return batch_norm(*inputs, pool=pool)

    assert gradcheck(fn, inputs, check_forward_ad=True)
    assert gradgradcheck(fn, inputs, check_fwd_over_rev=True)

    def gradient(*inputs):
        return torch.autograd.grad(fn(*inputs).pow(3).sum(), inputs, create_graph=True)

    assert gradgradcheck(gradient, inputs)


@pytest.mark.parametrize("pool", POOLS)
def test_networks_side_by_side_are_one_by_one(pool):
    x, w, b = operands(3)
    w[1] = -w[1]
    together = batch_norm(x, w, b, pool=pool)
    alone = torch.stack([batch_norm(*task, pool=pool) for task in zip(x, w, b, strict=True)])
    mapped = torch.vmap(lambda *task: batch_norm(*task, pool=pool))(x, w, b)
    assert relative_error(together, alone) < 1e-13
    assert relative_error(mapped, alone) < 1e-13

    def product(x, w, b, v):
        gradient = torch.func.grad(lambda x: batch_norm(x, w, b, pool=pool).pow(3).sum())
        return torch.func.jvp(gradient, (x,), (v,))[1]

    v = torch.randn_like(x)
    alone = torch.stack([product(*task) for task in zip(x, w, b, v, strict=True)])
    assert relative_error(torch.vmap(product)(x, w, b, v), alone) < 1e-12
    nested = torch.vmap(torch.vmap(product))(*(torch.stack([t, t]) for t in (x, w, b, v)))
    assert relative_error(nested[1], alone) < 1e-12


def test_single_precision_keeps_its_digits_far_from_zero():
    x, w, b = operands(dtype=torch.float32, n=64)
    exact = plain(100 + x.double(), w.double(), b.double(), None)
    assert relative_error(batch_norm(100 + x, w, b).double(), exact) < 1e-5


def test_low_precision_takes_its_statistics_in_single_precision():
    x, w, b = operands(dtype=torch.float32)
    assert batch_norm(x.bfloat16(), w, b).dtype is torch.float32


@pytest.mark.parametrize("geometry", [((1, 1), (1, 1)), ((2, 1), (0, 2))])
def test_statistics_of_a_convolution_without_a_look_at_it(geometry):
    torch.manual_seed(0)
    x = (torch.rand(3, 4, 2, 7, 6, dtype=torch.float64) > 0.7).double()
    weight = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    found = convolution_statistics(x, weight, *geometry)
    variance, mean = torch.var_mean(conv2d(x, weight, None, *geometry), (1, 3, 4), correction=0)
    for a, b in zip(found, (mean, variance), strict=True):
        assert relative_error(a, b) < 1e-12
        grads = (torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)[0] for y in (a, b))
        seconds = [torch.autograd.grad(g.pow(2).sum(), weight, retain_graph=True)[0] for g in grads]
        assert relative_error(*seconds) < 1e-11
    single = convolution_statistics(x.float(), weight.float(), *geometry)[1].double()
    assert relative_error(single, variance) < 1e-6
    bias = torch.zeros(3, 5, dtype=torch.float64)
    y = conv2d(x, weight, None, *geometry)
    known = batch_norm(y, bias + 1.5, bias, pool=2, statistics=found)
    assert relative_error(known, batch_norm(y, bias + 1.5, bias, pool=2)) < 1e-12


@pytest.mark.parametrize("pool", [(2, 2), 2.0, 0])
def test_pools_that_are_no_windows(pool):
    with pytest.raises(ValueError, match="pool is"):
        batch_norm(torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(3), pool=pool)


def test_gradients_of_single_precision_keep_their_digits_far_from_zero():
    """At 1e4 deviations that of the weight was 6e-4 off, ten times what PyTorch's own is."""
    x, weight, bias = randn(8, 3, 5, 5) + 1e4, randn(3), randn(3)

    def slopes(norm, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x.float(), weight.float(), bias.float())]
        out = norm(*leaves)
        return torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).sin()).sum(), leaves)

    exact = slopes(batch_norm, torch.float64)
    theirs = slopes(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), torch.float32)
    for own, other, truth in zip(slopes(batch_norm, torch.float32), theirs, exact, strict=True):
        bar = 3 * relative_error(other.double(), truth) + 1e-6
        assert relative_error(own.double(), truth) <= bar
