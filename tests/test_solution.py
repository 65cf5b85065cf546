"""Solutions as values: read, copied, written into files; and what their gradient reaches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import json
import pickle
import weakref

import pytest
import torch
from torch import nn

import bilevel as bl

LAM = torch.tensor(0.5, requires_grad=True)


def test_a_result_is_written_as_its_name():
    result = bl.argmin(lambda y: y.square().sum(), torch.ones(2)).result
    assert str(result) == f"{result}" == "CONVERGED"
    assert f"{result:>10}" == " CONVERGED"
    assert f"{result:d}" == "0"
    assert repr(result) == "Result.CONVERGED"
    assert json.dumps(result) == "0"
    assert pickle.loads(pickle.dumps(result)) is copy.deepcopy(result) is bl.Result.CONVERGED


SOLVES = {
    "default": lambda: bl.argmin(lambda y: (y - LAM).square().sum(), torch.zeros(2)),
    "preconditioned": lambda: bl.argmin(
        lambda y: (y - LAM).square().sum(), torch.zeros(2), hypergrad=bl.Implicit(bl.CG(preconditioner=bl.Jacobi()))
    ),
    "nystrom": lambda: bl.argmin(
        lambda y: (y - LAM).square().sum(), torch.zeros(2), hypergrad=bl.Implicit(bl.Nystrom(2, 1e-6))
    ),
    "unrolled": lambda: bl.argmin(
        lambda y: (y - LAM).square().sum(), torch.zeros(2), solver=bl.Steps(bl.Adam(0.1), 3), hypergrad=bl.Unroll()
    ),
    "root": lambda: bl.root(lambda y: y - 0.5 * LAM * y - 1, torch.zeros(2)),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
@pytest.mark.parametrize("backward", [False, True])
def test_copies_and_files(solve, backward):
    fit = solve()
    if backward:
        fit.value.sum().backward(retain_graph=True)
    stored = io.BytesIO()
    torch.save(fit, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for other in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit)), loaded):
        assert torch.equal(other.value, fit.value)
        assert not other.value.requires_grad
        assert other.result is fit.result
        assert other.captured == fit.captured
        assert (other.adjoint is None) == (fit.adjoint is None)
        if fit.adjoint is not None:
            assert torch.equal(other.adjoint.value, fit.adjoint.value)
            bl.argmin(lambda y: (y - LAM).square().sum(), torch.zeros(2), warm_start=other).value.sum().backward()
    shallow = copy.copy(fit)
    assert shallow.value is fit.value
    (grad,) = torch.autograd.grad(fit.value.sum(), LAM)  # the original has its graph
    assert grad != 0


def test_a_deep_copy_is_apart():
    fit = SOLVES["default"]()
    other = copy.deepcopy({"best": fit})["best"]
    other.value.zero_()
    other.stats["num_steps"].zero_()
    assert torch.allclose(fit.value, LAM.expand(2))
    assert fit.stats["num_steps"] > 0


def names(fit):
    return [found.name for found in fit.captured]


def test_what_was_captured_is_listed_with_names():
    net, table = nn.Linear(3, 2), {"a": [torch.ones(3, requires_grad=True)]}
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(3, requires_grad=True).detach()

    def inner(p, x, given):
        fit = (net(p) - 1).square().sum() + decay.float() * p.square().sum() + (hidden * p).sum()
        return fit + (table["a"][0] * p).sum() + (given["z"] * p).sum() + LAM * p.square().sum()

    fit = bl.argmin(inner, torch.zeros(3), torch.ones(2), {"z": torch.ones(3, requires_grad=True)})
    expected = ["args[1]['z']", "net.weight", "net.bias", "decay", "table['a'][0]", "LAM"]
    assert names(fit) == expected
    assert fit.captured[3] == ("decay", torch.Size([]), torch.float64)
    assert names(bl.argmin(inner, torch.zeros(3), torch.ones(2), {"z": torch.ones(3)})) == expected[1:]


def test_names_behind_vmap_partial_methods_and_fixed_points():
    class Model:
        def __init__(self):
            self.decay = torch.tensor(0.5, requires_grad=True)

        def loss(self, p):
            return (p - 1).square().sum() + self.decay * p.square().sum()

    model, scale = Model(), torch.tensor(0.3, requires_grad=True)
    assert names(bl.argmin(torch.vmap(model.loss), torch.zeros(3, 2))) == ["self.decay"]
    assert names(bl.argmin(functools.partial(lambda p, s: (p - s).square().sum(), s=scale), torch.zeros(2))) == ["s"]
    assert names(bl.fixed_point(lambda z: torch.tanh(scale * z + 1), torch.zeros(2))) == ["scale"]
    assert len(bl.argmin(model.loss, torch.zeros(2), solver=bl.ProximalGradient(bl.prox.L1(scale))).captured) == 2


DECAYS = {name: torch.tensor(-1.0, requires_grad=True) for name in ("first", "last")}


def test_names_of_what_only_a_generator_reads():
    def penalised(params):
        decay = sum(DECAYS[name].exp() * leaf.square().sum() for name, leaf in params.items())
        return decay + sum((leaf - 1).square().sum() for leaf in params.values())

    fit = bl.argmin(penalised, {"first": torch.zeros(2), "last": torch.zeros(3)})
    assert [reached.name for reached in fit.captured] == ["DECAYS['first']", "DECAYS['last']"]


def test_methods_that_reach_init_and_learned_step_sizes():
    init, lr = torch.zeros(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)

    def inner(p):
        return (p - LAM).square().sum()

    steps = bl.Steps(bl.SGD(lr), 3)
    assert set(names(bl.argmin(inner, init, solver=steps, hypergrad=bl.Unroll()))) == {"LAM", "init", None}
    assert set(names(bl.argmin(inner, init, solver=steps, hypergrad=bl.ForwardMode()))) == {"LAM", None}
    assert names(bl.argmin(inner, {"w": init}["w"], solver=steps)) == ["LAM"]
    assert set(names(bl.argmin(inner, init, solver=steps, hypergrad=bl.FirstOrder()))) == {"LAM", "init"}
    assert names(bl.argmin(inner, init, hypergrad=None)) == []
    with torch.no_grad():
        assert names(bl.argmin(inner, init)) == []


def test_a_solution_without_its_value_keeps_nothing_alive():
    def solve():
        x = torch.ones(1000, requires_grad=True)
        return bl.argmin(lambda p: (p - x).square().sum(), torch.zeros(1000)), weakref.ref(x)

    gc.collect()
    fit, seen = solve()
    fit = dataclasses.replace(fit, value=None)
    assert seen() is None
    assert fit.captured == ((None, torch.Size([1000]), torch.float32),)


def test_a_solution_stays_as_it_was_made():
    fit = SOLVES["default"]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.value = torch.zeros(2)
    before = dict(fit.stats)
    other = fit.with_stats(num_steps=torch.tensor(7))
    assert int(other.stats["num_steps"]) == 7
    assert fit.stats == before
    assert other.value is fit.value
    assert {fit: "kept"}[fit] == "kept"  # by what it is: tensors do not compare


class TestSummary:
    def test_three_lines_tell_of_both_solves(self):
        fit = SOLVES["default"]()
        assert fit.summary().splitlines()[2] == (
            "adjoint solve: none (there was no backward pass yet, or its method solves no linear system)"
        )
        fit.value.sum().backward()
        value, inner, adjoint = fit.summary().splitlines()
        assert value == "solution: 2 numbers; its gradient reaches LAM ()"
        assert inner.startswith("inner solve: CONVERGED (the tolerance was met); steps: ")
        assert inner.endswith(", loss: 0")
        assert adjoint.startswith(
            "adjoint solve: CONVERGED (the tolerance was met); steps: 1, relative residual norm: "
        )

    def test_of_a_batch_the_failed_ones_are_counted_and_the_numbers_have_a_range(self):
        start = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
        fit = bl.argmin(
            lambda y: ((y - LAM) ** 4).sum(-1), start, solver=bl.LBFGS(max_steps=2), hypergrad=None, throw="ignore"
        )
        value, inner, _ = fit.summary().splitlines()
        assert value == "solution: 2 problems, 2 numbers"
        assert inner.startswith("inner solve: MAX_STEPS in 1 of 2 problems (the step limit")
        assert "steps: 0 to 2, residual norm: 0 to " in inner
        assert fit.without_values().summary().startswith("solution: 2 problems, the value is not kept")

    def test_a_notebook_shows_the_same(self):
        fit = SOLVES["root"]()
        fit.value.sum().backward()
        page = fit._repr_html_()
        assert page.count("<tr>") == 3
        assert "its gradient reaches LAM ()" in page
        assert "<" not in page.replace("<t", "").replace("</t", "")  # what it says is escaped
