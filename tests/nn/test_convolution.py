from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from bilevel.nn import Conv2d, choose_kernels, conv2d, kernels
from bilevel.nn.kernels import KERNELS
from tests.conformance import relative_error

GEOMETRIES = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 1), (0, 2))]


def operands(*batch, channels=2, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*batch, 3, channels, 7, 6, dtype=dtype), torch.randn(*batch, 4, channels, 3, 3, dtype=dtype)


@pytest.fixture
def nothing_measured(monkeypatch):
    monkeypatch.setattr(kernels, "_fastest", {})


@pytest.fixture
def kernel(request, monkeypatch, nothing_measured):
    monkeypatch.setattr(kernels, "DEFAULT", request.param)
    return request.param


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_first_derivatives_are_torchs(geometry, channels):
    found, expected = [], []
    for convolve, out in ((conv2d, found), (F.conv2d, expected)):
        x, w = (t.requires_grad_() for t in operands(channels=channels))
        y = convolve(x, w, torch.arange(4.0, dtype=x.dtype), *geometry)
        out += [y, *torch.autograd.grad(y.sin().sum(), [x, w])]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_second_and_third_derivatives_are_those_of_the_differences(geometry):
    x, w = (t[:2, :, :5, :5].requires_grad_() for t in operands())
    assert gradgradcheck(lambda x, w: conv2d(x, w, None, *geometry), (x, w))

    def twice(x, w):
        return torch.autograd.grad(conv2d(x, w, None, *geometry).pow(3).sum(), (x, w), create_graph=True)

    assert gradgradcheck(twice, (x, w))


def test_forward_mode():
    x, w = (t[:2].requires_grad_() for t in operands())
    assert gradcheck(lambda x, w: conv2d(x, w, None, 2, 1), (x, w), check_forward_ad=True)
    v = torch.randn_like(w)
    gradient = torch.func.grad(lambda w: conv2d(x, w).pow(3).sum())
    forward = torch.func.jvp(gradient, (w.detach(),), (v,))[1]
    reverse = torch.func.vjp(gradient, w.detach())[1](v)[0]
    assert relative_error(forward, reverse) < 1e-13


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_networks_side_by_side_are_one_by_one(kernel, geometry):
    """With T in front, under vmap, under two vmaps: values, gradients and Hessian products of each are its own."""
    x, w = operands(2, 3)
    v = torch.randn_like(w)

    def product(x, w, v):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = conv2d(x, w, None, *geometry)
        (g,) = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)
        return [y, g, *torch.autograd.grad(g, [x, w], v)]

    def products(x, w, v):
        def loss(x, w):
            return conv2d(x, w, None, *geometry).pow(3).sum()

        return torch.func.vjp(torch.func.grad(loss, 1), x, w)[1](v)

    alone = [torch.stack(parts) for parts in zip(*map(product, x[0], w[0], v[0]), strict=True)]
    for together, expected in zip(product(x[0], w[0], v[0]), alone, strict=True):
        assert relative_error(together, expected) < 1e-12
    for together, expected in zip(torch.vmap(products)(x[0], w[0], v[0]), alone[2:], strict=True):
        assert relative_error(together, expected) < 1e-12
    nested = torch.vmap(torch.vmap(products))(x, w, v)
    for together, expected in zip(nested, torch.vmap(products)(x[1], w[1], v[1]), strict=True):
        assert relative_error(together[1], expected) < 1e-12
    shared = torch.vmap(lambda w: conv2d(x[0, 0], w, None, *geometry))(w[0])
    assert relative_error(shared[2], F.conv2d(x[0, 0], w[0, 2], None, *geometry)) < 1e-13


def test_the_kernel_is_chosen_by_measurement(nothing_measured):
    x, w = operands(4, dtype=torch.float32)
    seconds = choose_kernels(x, w, ((1, 1), (1, 1)), repeats=2)
    assert list(seconds) == ["output", "input", "weight"]
    for name, each in seconds.items():
        assert set(each) == set(KERNELS)
        assert min(each, key=each.get) in [chosen for key, chosen in kernels._fastest.items() if key[0] == name]
    assert len(kernels._fastest) == 3


def test_a_device_that_measures_does_it_once_for_each_shape(nothing_measured, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED", {"cpu"})
    measured = []
    measure = kernels._measure
    monkeypatch.setattr(
        kernels, "_measure", lambda *args, **kwargs: measured.append(args[0]) or measure(*args, **kwargs)
    )
    x, w = (t.requires_grad_() for t in operands(4))
    for _ in range(2):
        y = conv2d(x, w)
        grads = torch.autograd.grad(y.sin().sum(), [x, w])
    assert sorted(measured) == ["input", "output", "weight"]
    conv2d(x[:2], w[:2])
    assert measured.count("output") == 2
    expected = torch.autograd.grad(torch.vmap(F.conv2d)(x, w).sin().sum(), [x, w])
    for grad, other in zip(grads, expected, strict=True):
        assert relative_error(grad, other) < 1e-12


def test_a_kernel_that_runs_out_of_memory_is_not_taken(nothing_measured, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("patches are nine times the images")

    x, w = operands(4)
    for name in KERNELS:
        monkeypatch.setattr(KERNELS[name], "output", fails, raising=False)
        seconds = kernels._measure("output", x, w, ((1, 1), (1, 1)), repeats=1)
        assert seconds[name] == float("inf")
        assert all(chosen != name for chosen in kernels._fastest.values())
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "_fastest", {})


def test_deterministic_algorithms_choose_by_no_clock(nothing_measured, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED", {"cpu"})
    x, w = operands(4)
    torch.use_deterministic_algorithms(True)
    try:
        conv2d(x, w)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not kernels._fastest
    conv2d(x, w)
    assert len(kernels._fastest) == 1
    conv2d(x.transpose(-1, -2).contiguous().transpose(-1, -2), w)  # another layout is measured by itself
    assert len(kernels._fastest) == 2


def test_the_module_is_torchs():
    torch.manual_seed(0)
    ours, theirs = Conv2d(2, 4, 3, stride=2, padding=1), torch.nn.Conv2d(2, 4, 3, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_autocast_computes_in_low_precision():
    x, w = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, w)
    assert y.dtype is torch.bfloat16
    assert 1e-4 < relative_error(y.float(), F.conv2d(x, w)) < 1e-2


@pytest.mark.parametrize(("x", "w"), [((3, 2, 7, 7), (4, 3, 3, 3)), ((2, 7, 7), (4, 2, 3, 3))])
def test_shapes_that_do_not_fit(x, w):
    with pytest.raises(ValueError, match="is needed to go with the others"):
        conv2d(torch.zeros(x), torch.zeros(w))


def test_arguments_of_the_choice_of_kernels(nothing_measured):
    x, w = operands(2, channels=3)
    seconds = choose_kernels(x, w, (1, 0), repeats=1)
    assert set(seconds) == {"output", "input", "weight"}
    with pytest.raises(ValueError, match="Without T there is nothing to choose"):
        choose_kernels(x[0], w[0], (1, 0))
    with pytest.raises(ValueError, match="repeats is 0"):
        choose_kernels(x, w, (1, 0), repeats=0)
    with pytest.raises(ValueError, match="padding is 'same'"):
        Conv2d(1, 1, 3, padding="same")


def test_whole_numbers_of_numpy_are_strides():
    x, weight = torch.randn(3, 2, 6, 6), torch.randn(4, 2, 3, 3)
    found = conv2d(x, weight, stride=np.int64(2), padding=(np.int32(1), 1))
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight, stride=2, padding=1))
