"""A state is taken as a whole or refused; a step is made as a whole or not at all."""

from __future__ import annotations

import copy

import pytest
import torch

from bilevel.stochastic import F2SA, SABA, SOBA
from tests.stochastic.cases import CASES
from tests.stochastic.test_base import inner_loss, outer_loss, soba, vector
from tests.stochastic.test_conformance import small_settings


def two_layers(order="ab", dtype=torch.float64):
    params = {"a": torch.zeros(3, dtype=dtype), "b": torch.ones(3, dtype=dtype)}
    return {name: params[name].clone().requires_grad_() for name in order}


def build(name, params=None, x=None, **more):
    params = two_layers() if params is None else params
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True) if x is None else x

    def inner(p, h, batch):
        factor = 1.0 if batch is None else batch
        return factor * (((p["a"] - h) ** 2).sum() + ((p["b"] + 1 - h) ** 2).sum())

    def outer(p, h, batch):
        return ((p["a"] - 1) ** 2).sum() + (p["b"] ** 2).sum() + (h**2).sum()

    return CASES[name].method(params, x, inner, outer, **{**small_settings(name), **more})


def snapshot(method):
    return copy.deepcopy(method.state_dict())


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other


def refused(method, state, message):
    before = snapshot(method)
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(state)
    assert same(method.state_dict(), before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("other", CASES)
def test_a_state_is_of_its_own_method(name, other):
    first, second = build(name), build(other)
    for _ in range(2):
        first.step()
        second.step()
    if name == other:
        second.load_state_dict(first.state_dict())
        assert same(second.state_dict(), first.state_dict())
    else:
        refused(second, first.state_dict(), f"state has method {type(first).__name__}, this method has")


@pytest.mark.parametrize("name", CASES)
def test_another_order_shape_or_dtype_is_refused(name):
    method = build(name)
    for _ in range(3):
        method.step()
    state = method.state_dict()
    refused(build(name, two_layers("ba")), state, r"state has names .*this method has .*'b'.*'a'")
    refused(build(name, two_layers(dtype=torch.float32)), state, "inner_params of torch.float64")
    single = torch.zeros(3, requires_grad=True)
    refused(build(name, x=single), state, "outer_params of torch.float64")
    refused(
        build(name),
        {**state, "inner_params": state["inner_params"][:1]},
        "state has inner_params that are no list of 2",
    )
    reshaped = [value.reshape(3, 1) for value in state["inner_params"]]
    refused(build(name), {**state, "inner_params": reshaped}, r"inner_params of shapes \(3, 1\)")
    untyped = [value.tolist() for value in state["inner_params"]]
    refused(build(name), {**state, "inner_params": untyped}, "state has a list as")
    refused(build(name), {**state, "num_steps": -1}, "num_steps -1")


@pytest.mark.parametrize("name", [name for name in CASES if build(name)._kept])
def test_vectors_that_do_not_fit_are_refused(name):
    method = build(name)
    for _ in range(3):
        method.step()
    state = method.state_dict()
    assert list(state["vectors"]) == list(method._kept)
    for change, message in (
        (lambda value: value[:-1], "state has vectors of shapes"),
        (lambda value: value.float(), "state has vectors of torch.float32"),
    ):
        changed = {**state, "vectors": {key: change(value) for key, value in state["vectors"].items()}}
        refused(build(name), changed, message)
    refused(build(name), {**state, "vectors": {}}, r"state has vectors \[\]")
    fresh = build(name)
    fresh.load_state_dict(build(name).state_dict())  # of a method that has made no step
    assert fresh.num_steps == 0


@pytest.mark.parametrize(("mine", "theirs"), [(2, 3), ([1, 1], [1, 2]), (2, [3, 3, 3])])
def test_other_batch_counts_are_refused(mine, theirs):
    first, second = (build("SABA", inner_batches=sizes, outer_batches=1) for sizes in (mine, theirs))
    first.step(inner_index=0)
    refused(second, first.state_dict(), "state has inner_batches")
    same_sizes = build("SABA", inner_batches=mine, outer_batches=1)
    same_sizes.load_state_dict(first.state_dict())
    assert same(same_sizes.state_dict(), first.state_dict())


def test_a_damaged_memory_is_refused():
    method = build("SABA", inner_batches=2, outer_batches=1)
    method.step(inner_index=1)
    state = method.state_dict()
    cut = {**state["memory"], "inner_rows": state["memory"]["inner_rows"][:1]}
    refused(build("SABA", inner_batches=2, outer_batches=1), {**state, "memory": cut}, "state has memory of shapes")
    refused(build("SABA", inner_batches=2, outer_batches=1), {**state, "memory": {}}, r"state has memory \[\]")


@pytest.mark.parametrize("state", [{}, {"num_steps": 3}, {"state": {}, "param_groups": []}, None, 3])
def test_what_is_no_state_is_refused(state):
    refused(soba(), state, "state lacks .*: it is no state_dict of a stochastic method")


def test_parts_of_a_tree_are_named():
    """A list in a dict: the names are those of the places."""
    y = {"net": [vector(0.0), vector(1.0)], "bias": vector(2.0)}

    def inner(y, x, batch):
        return sum((p - x).square().sum() for p in (*y["net"], y["bias"]))

    method = SOBA(y, vector(0.0), inner, lambda y, x, b: y["bias"].sum(), inner_lr=0.1, outer_lr=0.1)
    state = method.state_dict()
    assert state["names"] == {"inner_params": ["['net'][0]", "['net'][1]", "['bias']"], "outer_params": [""]}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_step_that_fails_leaves_no_half(name, level):
    """An error in the n-th evaluation of a loss, for every n of the step; then the same step as without it."""
    calls = {"left": None}

    def failing(loss, own):
        def wrapped(y, x, batch):
            noise = torch.rand((), dtype=torch.float64)  # as of a dropout
            if own and calls["left"] is not None:
                calls["left"] -= 1
                if calls["left"] < 0:
                    raise Interrupted
            return loss(y, x, batch) * (1 + noise)

        return wrapped

    def fresh():
        y, x = vector(0.5, 0.5), vector(1.0, 2.0)
        losses = failing(inner_loss, level == "inner"), failing(outer_loss, level == "outer")
        return CASES[name].method(y, x, *losses, **small_settings(name))

    torch.manual_seed(0)
    whole, calls["left"] = fresh(), None
    for _ in range(4):
        whole.step()
    torch.manual_seed(0)
    method = fresh()
    for _ in range(4):
        failures = 0
        while True:
            before, random, costs = snapshot(method), torch.get_rng_state(), method._oracles.gradients
            calls["left"] = failures
            try:
                method.step()
            except Interrupted:
                failures += 1
                assert same(method.state_dict(), before)
                assert torch.equal(torch.get_rng_state(), random)
                assert method._oracles.gradients == costs
            else:
                break
        assert failures >= 1
    assert same(method.state_dict(), whole.state_dict())


def test_an_interrupt_while_params_are_written_leaves_no_half(monkeypatch):
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    method = SABA(y, x, inner_loss, outer_loss, inner_lr=0.1, outer_lr=0.1, inner_batches=1, outer_batches=1)
    method.step()
    before, real = snapshot(method), SABA._directions

    def interrupted(self, *arguments):
        found = real(self, *arguments)

        def remember():
            raise KeyboardInterrupt

        object.__setattr__(found, "remember", remember)
        return found

    monkeypatch.setattr(SABA, "_directions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.step()
    assert same(method.state_dict(), before)


def test_a_step_that_was_refused_is_made_with_a_smaller_size():
    y = vector(1.0)
    method = F2SA(y, vector(0.0), inner_loss, outer_loss, inner_lr=lambda t: -1.0 if t else 0.1, outer_lr=0.1)
    method.step()
    with pytest.raises(ValueError, match=r"At step 1, inner_lr is -1.0"):
        method.step()
    method.inner_lr = 0.1
    method.step()
    assert method.num_steps == 2


def test_saba_in_two_dtypes_keeps_those_of_its_params():
    y, x = torch.zeros(2, requires_grad=True), vector(1.0, 2.0)
    method = SABA(
        y,
        x,
        lambda y, x, b: (y - x.float()).square().sum(),
        lambda y, x, b: (y - 1).square().sum(),
        inner_lr=0.1,
        outer_lr=0.1,
        inner_batches=1,
        outer_batches=1,
    )
    method.step()
    state = method.state_dict()
    assert state["vectors"]["adjoint"].dtype == torch.float32
    assert state["memory"]["inner_rows"].dtype == torch.float64
    method.load_state_dict(state)
    assert method.num_steps == 1
