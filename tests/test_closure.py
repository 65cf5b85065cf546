"""Closure conversion: which tensors a function reaches, and that others can stand in for them."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from bilevel.closure import Autocast, Closure, Tracer, in_transform


def traced(fn, *params):
    tracer = Tracer()
    tracer.know(params)
    with tracer:
        fn(*params)
    return tracer.captured


def is_one_of(tensor, tensors):
    return any(tensor is other for other in tensors)


def test_it_finds_leaves_non_leaves_and_parameters_once():
    leaf = torch.ones(2, requires_grad=True)
    non_leaf = torch.ones(2, requires_grad=True) * 2
    module = torch.nn.Linear(2, 2)
    data = torch.ones(2)
    found = traced(lambda y: module(y + leaf).sum() + (non_leaf * data * leaf).sum(), torch.ones(2, requires_grad=True))
    assert len(found) == 4
    for tensor in (leaf, non_leaf, module.weight, module.bias):
        assert is_one_of(tensor, found)


def test_what_is_made_inside_is_not_captured():
    x = torch.ones(2, requires_grad=True)

    def fn(y):
        made = x * 2
        for _ in range(50):  # freed ids come back
            made = made + 1
        fresh = torch.zeros(2, requires_grad=True)
        return torch.cat([made, y, torch.stack([fresh.sum(), y.sum()])]).sum()

    assert [t is x for t in traced(fn, torch.ones(2, requires_grad=True))] == [True]


def test_it_sees_through_vmap_grad_lists_and_in_place_operations():
    x, z = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def fn(y):
        inner = torch.vmap(torch.func.grad(lambda row: (row * x).sum().square()))(y)
        total = torch.zeros(3)
        total += z
        return torch.stack([inner.sum(0), total]).sum()

    found = traced(fn, torch.ones(4, 3))
    assert len(found) == 2
    assert is_one_of(x, found)
    assert is_one_of(z, found)


def test_tensors_of_open_transforms_are_captured():
    seen = []

    def outer(h):
        seen.append(in_transform())
        seen.append(len(traced(lambda y: (y * h).sum(), torch.ones(2))))
        return h.sum()

    torch.func.grad(outer)(torch.ones(2))
    torch.vmap(outer)(torch.ones(3, 2))
    torch.func.jvp(outer, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True, 1] * 3
    assert not in_transform()


def test_dual_numbers_are_captured():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert is_one_of(dual, traced(lambda y: y * dual, torch.ones(2)))


def closure_of(fn, captured, args=()):
    spec = pytree.tree_structure(torch.ones(1))
    return Closure(fn, spec, args, captured, Autocast.current(torch.device("cpu")))


def test_others_stand_in():
    x, arg = torch.tensor([2.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    module = torch.nn.Linear(1, 1, bias=False)
    closure = closure_of(lambda y, a: module(y) * x + a, [x, arg, module.weight], (arg,))
    y = torch.tensor([3.0])
    assert closure([y], [torch.tensor([7.0]), torch.tensor([1.0]), torch.tensor([[4.0]])]).item() == 3 * 4 * 7 + 1
    grads = torch.func.grad(lambda tensors: closure([y], tensors).sum())(
        [torch.tensor([7.0]), torch.tensor([1.0]), torch.tensor([[4.0]])]
    )
    assert [g.item() for g in grads] == [12.0, 1.0, 21.0]


def test_autocast_is_entered_again():
    weight = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        closure = closure_of(lambda y: y @ weight, [])
    assert closure([torch.ones(2, 2)], []).dtype is torch.bfloat16
    outside = closure_of(lambda y: y @ weight, [])
    with torch.autocast("cpu", torch.bfloat16):
        assert outside([torch.ones(2, 2)], []).dtype is torch.float32
