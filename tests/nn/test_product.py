"""Thin products by oneDNN: PyTorch's numbers in every mode of differentiation, and no copy of the large operand."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.nn import linear, matmul
from bilevel.nn.product import _has_onednn, _is_thin
from tests.conformance import relative_error

pytestmark = pytest.mark.skipif(not _has_onednn(), reason="this PyTorch has no oneDNN")

LAYOUTS = [(False, False), (True, False), (False, True), (True, True)]


def operands(rows, inner, columns, transposed=(False, False)):
    torch.manual_seed(0)
    shapes = (rows, inner), (inner, columns)
    made = [
        torch.randn(shape[::-1]).mT if turn else torch.randn(shape)
        for shape, turn in zip(shapes, transposed, strict=True)
    ]
    return [tensor / inner**0.25 for tensor in made]


class Called(TorchDispatchMode):
    """What is called, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 260, 10), (10, 300, 260), (4, 256, 256)])
def test_values_and_derivatives_are_torchs(shape, transposed):
    found, expected = [], []
    for product, dtype, out in ((matmul, torch.float32, found), (torch.matmul, torch.float64, expected)):
        a, b = (t.to(dtype).requires_grad_() for t in operands(*shape, transposed))
        with Called() as called:
            y = product(a, b)
            first = torch.autograd.grad(y.sin().sum(), [a, b], create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), [a, b])
        assert ("_linear_pointwise" in called.names) == (dtype == torch.float32)
        out += [y, *first, *second]
    for mine, truth in zip(found, expected, strict=True):
        assert relative_error(mine.double(), truth) < 1e-6


def test_forward_mode_and_products_of_both():
    a, b = operands(300, 260, 10)
    v = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))

    def slope(product, b):
        return torch.func.grad(lambda b: product(a.to(b), b).sin().sum())(b)

    forward = torch.func.jvp(lambda b: slope(matmul, b), (b,), (v,))[1]
    reverse = torch.func.vjp(lambda b: slope(matmul, b), b)[1](v)[0]
    truth = torch.func.jvp(lambda b: slope(torch.matmul, b), (b.double(),), (v.double(),))[1]
    assert relative_error(forward.double(), truth) < 1e-6
    assert relative_error(reverse.double(), truth) < 1e-6


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)])
def test_under_vmap(in_dims):
    a, b = operands(300, 260, 10)
    many = [t if dim is None else torch.stack([t, 2 * t, 3 * t]) for t, dim in zip((a, b), in_dims, strict=True)]
    found = torch.func.vmap(matmul, in_dims)(*many)
    assert relative_error(found, many[0] @ many[1]) < 1e-6
    nested = torch.func.vmap(torch.func.vmap(matmul, (None, 0)), (0, None))(
        torch.stack([a, -a]), torch.stack([b, 2 * b])
    )
    assert relative_error(nested[1, 1], -2 * (a @ b)) < 1e-6


def test_what_is_thin():
    assert _is_thin(*operands(300, 260, 10))
    assert not _is_thin(*operands(300, 260, 3))  # BLAS is as fast
    assert not _is_thin(*operands(300, 260, 200))
    assert not _is_thin(*operands(300, 20, 10))
    assert not _is_thin(*(t.double() for t in operands(300, 260, 10)))
    assert not _is_thin(*(t.expand(2, *t.shape) for t in operands(300, 260, 10)))


def test_the_large_operand_is_not_copied():
    """By its strides: with a transposed one oneDNN takes twice as long or more, so the sides are exchanged."""
    a, b = operands(3000, 260, 10, (True, False))
    with Called() as called:
        y = matmul(a, b)
    assert called.names.count("_linear_pointwise") == 1
    assert y.mT.is_contiguous()
    assert relative_error(y, a @ b) < 1e-6


def test_linear_takes_it():
    x, w = operands(300, 260, 10)
    with Called() as called:
        y = linear(x, w.mT, torch.ones(10))
    assert "_linear_pointwise" in called.names
    assert relative_error(y, x @ w + 1) < 1e-6


def test_autocast_is_that_of_torch():
    a, b = torch.randn(300, 512), torch.randn(512, 10)
    assert _is_thin(a, b) or not _has_onednn()
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul(a, b).dtype is (a @ b).dtype is torch.bfloat16
        assert linear(a, b.mT.contiguous()).dtype is torch.bfloat16
