"""What goes in wrong is refused by name, at once or at the first step."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch.func import functional_call

from bilevel import SolveError
from bilevel.stochastic import F2SA, FSLA, MASOBA, SABA, SOBA, SPABA, SRBA, TTSA, Draws
from tests.stochastic.cases import CASES
from tests.stochastic.test_conformance import small_settings


def vector(*numbers: float, grad: bool = True) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=grad)


def inner_loss(y, x, batch):
    return (y - x).square().sum() + y.square().sum()


def outer_loss(y, x, batch):
    return (y - 1).square().sum()


def soba(y=None, x=None, g=inner_loss, f=outer_loss, **settings):
    y, x = vector(0.0, 0.0) if y is None else y, vector(1.0, 2.0) if x is None else x
    return SOBA(y, x, g, f, **{"inner_lr": 0.1, "outer_lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": []}, ValueError, "inner_params is empty"),
        ({"y": [1.0]}, TypeError, "inner_params contains a float"),
        ({"x": torch.tensor([1])}, TypeError, "outer_params contains a tensor of torch.int64"),
        ({"y": vector(0.0, grad=False)}, ValueError, "inner_params.*no leaf that requires grad"),
        ({"x": vector(1.0) * 2}, ValueError, "outer_params.*no leaf that requires grad"),
        ({"y": vector(float("nan"))}, ValueError, "inner_params contains NaN"),
        ({"y": torch.zeros(0, requires_grad=True)}, ValueError, "inner_params holds no numbers"),
        ({"g": None}, TypeError, "inner_loss is a NoneType"),
        ({"f": 3.0}, TypeError, "outer_loss is a float"),
        ({"inner_lr": -0.1}, ValueError, "inner_lr is -0.1"),
        ({"inner_lr": float("nan")}, ValueError, "inner_lr is nan"),
        ({"inner_lr": lambda step: float("nan")}, ValueError, "At step 0, inner_lr is nan"),
        ({"outer_lr": float("inf")}, ValueError, "outer_lr is inf"),
        ({"outer_lr": "0.1"}, ValueError, "outer_lr is '0.1'"),
        ({"linear_lr": -1}, ValueError, "linear_lr is -1"),
        ({"inner_lr": lambda step: -1.0}, ValueError, "inner_lr is -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        soba(**arguments)


def test_shared_and_repeated_tensors_are_refused():
    shared = vector(0.0)
    with pytest.raises(ValueError, match="outer_params shares a tensor with inner_params"):
        soba([shared], {"a": shared})
    with pytest.raises(ValueError, match="inner_params contains the same tensor twice"):
        soba([shared, shared])


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (SRBA, {"period": 0}, "period is 0"),
        (FSLA, {"mixing": 1.5}, "mixing is 1.5"),
        (MASOBA, {"mixing": 0.0}, "mixing is 0.0"),
        (SPABA, {"probability": 0.0}, "probability is 0.0"),
        (SPABA, {"probability": 1.5}, "probability is 1.5"),
        (SPABA, {"probability": 0.5, "seed": -1}, "seed is -1"),
        (SPABA, {"probability": 0.5, "clip": 0.0}, "clip is 0.0"),
        (F2SA, {"penalty": 0.0}, "penalty is 0.0"),
        (F2SA, {"penalty_growth": -1.0}, "penalty_growth is -1.0"),
        (F2SA, {"num_inner_steps": 2.5}, "num_inner_steps is 2.5"),
        (TTSA, {"seed": -1}, "seed is -1"),
        (SABA, {"inner_batches": 0, "outer_batches": 1}, "inner_batches is 0"),
        (SABA, {"inner_batches": 1, "outer_batches": [3, 0]}, "outer_batches is 0"),
        (SABA, {"inner_batches": [], "outer_batches": 1}, "inner_batches is empty"),
    ],
)
def test_bad_settings_are_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(vector(0.0), vector(0.0), inner_loss, outer_loss, inner_lr=0.1, outer_lr=0.1, **settings)


def test_saba_wants_indices_in_range():
    method = SABA(
        vector(0.0), vector(0.0), inner_loss, outer_loss, inner_lr=0.1, outer_lr=0.1, inner_batches=2, outer_batches=1
    )
    with pytest.raises(ValueError, match="inner_index is None"):
        method.step()
    with pytest.raises(ValueError, match="inner_index is 2"):
        method.step(inner_index=2)
    with pytest.raises(ValueError, match=r"inner_index is 0\.9"):
        method.step(inner_index=0.9)
    method.step(inner_index=1)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y, x, b: (y - x).square(), r"inner_loss returned torch.float64 of shape \(2,\)"),
        (lambda y, x, b: 3.0, "inner_loss returned float"),
        (lambda y, x, b: (y.detach() - x).square().sum(), "inner_loss does not depend on the params"),
        (lambda y, x, b: torch.tensor(1.0), "inner_loss does not depend on the params"),
        (lambda y, x, b: y.square().sum(), "inner_loss does not depend on the hparams"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_bad_losses_are_named_at_the_first_step(name, loss, message):
    y, x = vector(0.0, 0.0), vector(1.0, 2.0)
    method = CASES[name].method(y, x, loss, outer_loss, **small_settings(name))
    with pytest.raises(ValueError, match=message):
        method.step()
    assert y.tolist() == [0.0, 0.0]
    assert method.num_steps == 0


@pytest.mark.parametrize("name", CASES)
def test_a_captured_tensor_that_requires_grad_is_never_ignored(name):
    hidden = vector(1.0, 1.0)
    leaks = {
        "inner_loss": (lambda y, x, b: inner_loss(y, x, b) + (hidden * y).sum(), outer_loss),
        "outer_loss": (inner_loss, lambda y, x, b: outer_loss(y, x, b) + (hidden.exp() * y).sum()),
    }
    for what, losses in leaks.items():
        method = CASES[name].method(vector(0.0, 0.0), vector(1.0, 2.0), *losses, **small_settings(name))
        with pytest.raises(ValueError, match=rf"{what} depends on a tensor of shape \(2,\).*neither"):
            method.step()


def test_the_modules_own_params_in_place_of_the_given_ones_are_refused():
    net = torch.nn.Linear(2, 1).double()
    params, x, data = dict(net.named_parameters()), vector(0.0), torch.ones(3, 2, dtype=torch.float64)

    def wrong(params, x, batch):
        return net(data).square().mean() + x.exp().sum() * sum(p.square().sum() for p in params.values())

    def right(params, x, batch):
        return functional_call(net, params, (data,)).square().mean()

    with pytest.raises(ValueError, match="inner_loss uses a tensor of inner_params directly"):
        SOBA(params, x, wrong, right, inner_lr=0.1, outer_lr=0.1).step()


def test_the_record_tells_losses_norms_and_cost():
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    record = soba(y, x).step()
    assert float(record.inner_loss) == pytest.approx(0.25 + 2.25 + 0.5)
    assert float(record.outer_loss) == pytest.approx(0.5)
    assert float(record.inner_norm) == pytest.approx(2.0)  # 2 (y - x) + 2 y = (0, -2)
    assert float(record.linear_norm) == pytest.approx(2**0.5)  # u = 0: grad_y f = (-1, -1)
    assert float(record.outer_norm) == 0.0
    assert (record.gradients, record.products) == (2, 1)
    assert record.inner_loss.grad_fn is None


def test_params_changed_between_steps_are_read_again():
    """A projection of the hparams, or a scheduler of one's own."""
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    method = soba(y, x)
    method.step()
    with torch.no_grad():
        x.clamp_(max=1.5)
    expected = (y - 0.1 * (4 * y - 2 * x)).detach()
    method.step()
    torch.testing.assert_close(y.detach(), expected)


def test_uneven_batches_weigh_examples_alike_by_the_average_size():
    """As the docstring of `Stochastic` says: the mean of the steps on all batches is the step on all the data."""
    data = torch.tensor([1.0, -2.0, 3.0, 4.0, 0.5, 7.0, 1.5], dtype=torch.float64)
    batches = data.split(3)  # 3, 3, 1

    def step(size, *batch):
        y, x = vector(0.5), vector(0.25)
        method = SOBA(
            y,
            x,
            lambda y, x, b: (b * (y - x - b).square()).sum() / size(b),
            lambda y, x, b: (b * (y - b).square() + x.square()).sum() / size(b),
            inner_lr=0.1,
            outer_lr=0.1,
        )
        method.step(*batch)
        return torch.cat([y.detach(), x.detach(), *method.state_dict()["vectors"].values()])

    whole = step(len, data, data)
    averaged = torch.stack([step(lambda b: len(data) / len(batches), b, b) for b in batches]).mean(0)
    torch.testing.assert_close(averaged, whole)
    plain = torch.stack([step(len, b, b) for b in batches]).mean(0)
    assert (plain - whole).norm() > 1e-2


def test_draws_are_used_in_turn_and_over_again():
    seen = []

    def recorded(y, x, batch):
        seen.append(batch)
        return inner_loss(y, x, batch)

    method = FSLA(vector(0.0), vector(1.0), recorded, outer_loss, inner_lr=0.1, outer_lr=0.1)
    assert (method.inner_draws, method.outer_draws) == (3, 2)
    method.step(Draws("ab"), None)
    assert seen == ["a", "b", "a"]
    with pytest.raises(ValueError, match="Draws holds no batches"):
        Draws([])


def test_the_signature_is_that_of_the_base_and_what_a_method_adds():
    """One place for the levels and their losses: what documentation, editors and type checkers show."""
    shared = ["inner_params", "outer_params", "inner_loss", "outer_loss"]
    own = {
        "SOBA": ["linear_lr"],
        "SABA": ["linear_lr", "inner_batches", "outer_batches"],
        "SRBA": ["linear_lr", "period"],
        "FSLA": ["mixing", "linear_lr"],
        "MA-SOBA": ["linear_lr", "mixing"],
        "SPABA": ["linear_lr", "probability", "seed", "clip"],
        "AmIGO": ["num_inner_steps", "num_linear_steps", "linear_lr"],
        "stocBiO": ["num_terms", "neumann_lr", "num_inner_steps"],
        "MRBO": ["num_terms", "neumann_lr", "mixing"],
        "VRBO": ["num_terms", "neumann_lr", "period", "num_inner_steps"],
        "BSA": ["num_terms", "neumann_lr", "num_inner_steps", "seed"],
        "TTSA": ["num_terms", "neumann_lr", "seed"],
        "SUSTAIN": ["num_terms", "neumann_lr", "mixing", "seed"],
        "F2SA": ["penalty", "penalty_growth", "num_inner_steps"],
        "BOME": ["control", "num_inner_steps"],
    }
    assert own.keys() == CASES.keys()
    for name, expected in own.items():
        parameters = inspect.signature(CASES[name].method).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert positional == shared
        assert keywords == ["inner_lr", "outer_lr", "longest_move", *expected]


def test_methods_are_compared_by_identity_and_hashable():
    first, second = soba(), soba()
    assert first != second
    assert len({first, second}) == 2


@pytest.mark.parametrize("name", ["inner_params", "outer_params", "inner_loss", "outer_loss"])
def test_what_a_method_is_made_of_cannot_be_replaced(name):
    method = soba()
    with pytest.raises(AttributeError, match="is taken when the method is made"):
        setattr(method, name, getattr(method, name))
    method.inner_lr = 0.01
    assert method.inner_lr == 0.01


def made(name):
    case = CASES[name]
    return case.method(vector(0.0, 0.0), vector(1.0, 2.0), inner_loss, outer_loss, **case.settings)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("SOBA", "longest_move", -1.0),
        ("SOBA", "outer_lr", "0.1"),
        ("F2SA", "num_inner_steps", 1.5),
        ("F2SA", "penalty", math.inf),
        ("MA-SOBA", "mixing", 2.0),
        ("stocBiO", "num_terms", 0),
        ("VRBO", "period", 0),
        ("SPABA", "probability", 1.5),
    ],
)
def test_a_setting_that_means_nothing_is_refused_when_it_is_set(name, setting, value):
    method = made(name)
    before = getattr(method, setting)
    with pytest.raises(ValueError, match=re.escape(f"{setting} is {value}" if setting != "outer_lr" else "is '0.1'")):
        setattr(method, setting, value)
    assert getattr(method, setting) == before


def test_the_batches_of_saba_cannot_be_set():
    with pytest.raises(AttributeError, match="inner_batches is taken when the method is made"):
        made("SABA").inner_batches = 7


def test_numbers_of_numpy_are_numbers():
    numbers = {"inner_lr": np.float64(0.1), "outer_lr": 0.1, "num_inner_steps": np.int64(2), "penalty": np.float32(2)}
    method = F2SA(vector(0.0), vector(1.0), inner_loss, outer_loss, **numbers)
    method.step()
    assert method.inner_draws == 3
    method = SABA(
        vector(0.0), vector(1.0), inner_loss, outer_loss, **CASES["SABA"].settings | {"inner_batches": np.int64(1)}
    )
    method.step(inner_index=np.int64(0), outer_index=0)


def test_a_loss_that_overflows_is_told():
    """Its gradient may be finite all the same."""
    method = soba(f=lambda y, x, batch: outer_loss(y, x, batch) + math.inf)
    with pytest.raises(SolveError, match="outer_loss is NaN or infinite on this batch"):
        method.step()
    assert method.num_steps == 0
