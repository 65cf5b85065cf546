"""Step sizes: numbers and functions of the step number, zero too; the constant step of a Neumann series."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from bilevel.stochastic import MRBO, SOBA, SUSTAIN, VRBO, Decay, StocBiO, TorchSchedule
from bilevel.stochastic.schedule import LONGEST_WARM_UP, peak
from tests.stochastic.cases import CASES
from tests.stochastic.test_base import inner_loss, outer_loss, soba, vector
from tests.stochastic.test_conformance import small_settings


def test_schedules():
    assert [Decay(0.5, 0.5)(t) for t in (0, 3)] == [0.5, 0.25]
    assert Decay(0.5, 1.0, delay=10)(10) == 0.25
    assert Decay(0.0)(7) == 0.0
    for bad, message in (
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1.0, "power": 2.0}, "power is 2.0"),
        ({"lr": 1.0, "delay": 0}, "delay is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Decay(**bad)
    sizes = []
    soba(inner_lr=lambda step: sizes.append(step) or 0.1).step()
    assert set(sizes) == {0}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", ["inner", "outer"])
def test_a_step_size_of_zero_leaves_its_level_where_it_is(name, frozen):
    """BOME moves both levels by ``outer_lr``; a Neumann series needs a step size of its own."""
    settings = {**small_settings(name), f"{frozen}_lr": 0.0}
    kind = CASES[name].method
    if hasattr(kind, "num_terms"):
        settings["neumann_lr"] = 0.1
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    method = kind(y, x, inner_loss, outer_loss, **settings)
    for _ in range(4):
        method.step()
    assert (y.tolist() == [0.5, 0.5]) == (frozen == "inner" or name == "BOME") or name == "BOME"
    if frozen == "outer":
        assert x.tolist() == [1.0, 2.0]
    assert method.num_steps == 4


@pytest.mark.parametrize("name", CASES)
def test_schedules_that_end_at_zero(name):
    settings = {**small_settings(name), "inner_lr": lambda t: 0.1 * (10 - t) / 10, "outer_lr": lambda t: 0.05 * (t < 8)}
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    method = CASES[name].method(y, x, inner_loss, outer_loss, **settings)
    for _ in range(11):
        method.step()
    kept = y.detach().clone(), x.detach().clone()
    with pytest.raises(ValueError, match=r"At step 11, inner_lr is -0.01"):
        method.step()
    assert torch.equal(y, kept[0])
    assert torch.equal(x, kept[1])
    assert method.num_steps == 11


def test_rounding_at_the_end_of_a_schedule_is_no_negative_size():
    assert 0.7 - 10 * 0.07 < 0
    method = soba(inner_lr=lambda t: 0.7 - 0.07 * (10 + t), outer_lr=0.0, linear_lr=0.1)
    method.step()
    with pytest.raises(ValueError, match=r"At step 1, inner_lr is -0.07"):
        method.step()


@pytest.mark.parametrize("size", [np.float32(0.25), np.float64(0.25), 0.25])
def test_numbers_of_numpy_are_numbers(size):
    y = vector(1.0)
    SOBA(y, vector(0.0), inner_loss, outer_loss, inner_lr=size, outer_lr=lambda t: size).step()
    assert y.item() == 1.0 - 0.25 * 4


def test_step_sizes_may_be_set_between_steps_and_are_checked_again():
    y = vector(1.0)
    method = SOBA(y, vector(0.0), inner_loss, outer_loss, inner_lr=0.1, outer_lr=0.0)
    method.inner_lr = 0.25
    method.step()
    assert y.item() == 0.0
    with pytest.raises(ValueError, match=r"inner_lr is -1.0"):
        method.inner_lr = -1.0
    assert method.inner_lr == 0.25


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (lr_scheduler.StepLR, {"step_size": 3}),
        (lr_scheduler.CosineAnnealingLR, {"T_max": 10}),
        (lr_scheduler.OneCycleLR, {"max_lr": 0.4, "total_steps": 12}),
        (lr_scheduler.LambdaLR, {"lr_lambda": lambda t: 0.9**t}),
        (
            lambda optimizer: lr_scheduler.SequentialLR(
                optimizer,
                [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.5)],
                milestones=[4],
            ),
            {},
        ),
    ],
)
def test_schedulers_of_torch_give_the_sizes_that_they_give_to_an_optimizer(scheduler, settings):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    own, expected = scheduler(optimizer, **settings), []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 12:
            own.step()
    schedule = TorchSchedule(0.1, scheduler, **settings)
    assert [schedule(t) for t in (7, 2, 11, 2)] == [expected[t] for t in (7, 2, 11, 2)]
    assert [TorchSchedule(0.1, scheduler, **settings)(t) for t in range(12)] == expected


def test_a_method_with_a_scheduler_of_torch():
    y = vector(1.0)
    method = SOBA(
        y,
        vector(0.0),
        inner_loss,
        outer_loss,
        inner_lr=TorchSchedule(0.25, lr_scheduler.StepLR, step_size=1),
        outer_lr=0.0,
    )
    method.step()
    assert y.item() == 0.0
    with torch.no_grad():
        y.fill_(1.0)
    method.step()
    assert y.item() == pytest.approx(1 - 0.025 * 4)


@pytest.mark.parametrize("scheduler", [lr_scheduler.ReduceLROnPlateau, lambda optimizer: None])
def test_a_schedule_that_needs_a_metric_is_refused(scheduler):
    with pytest.raises(TypeError, match="follows the number of steps alone"):
        TorchSchedule(0.1, scheduler)


@pytest.mark.parametrize("kind", [StocBiO, MRBO, SUSTAIN, VRBO])
@pytest.mark.parametrize(
    ("inner_lr", "expected"),
    [
        (0.2, 0.2),
        (Decay(0.2), 0.2),
        (lambda t: 0.2 * min(1, t / 50), 0.2),  # a warm-up from zero, to a constant
        (lambda t: 0.2 * min((t + 1) / 50, 50 / (t + 1)), 0.2),  # and then a decay
        (TorchSchedule(0.1, lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=100), 0.2),
        ([0.1, 0.2, 0.2].__getitem__, 0.2),  # it ends
    ],
)
def test_the_neumann_step_is_where_a_warm_up_leads(kind, inner_lr, expected):
    more = {"period": 3} if kind is VRBO else {}
    method = kind(vector(0.0), vector(0.0), inner_loss, outer_loss, inner_lr=inner_lr, outer_lr=0.1, **more)
    assert method.neumann_lr == pytest.approx(expected, rel=1e-12)


def test_the_adjoint_is_right_from_the_first_step_of_a_warm_up():
    """H = 4: the series of 60 terms at lr 0.2 is the inverse to 0.2^61; at the first size of the warm-up it is none."""
    y, x = vector(0.5), vector(1.0)
    settings = {"num_inner_steps": 1, "num_terms": 60, "outer_lr": 1.0}
    method = StocBiO(y, x, inner_loss, outer_loss, inner_lr=lambda t: 0.2 * min(1, t / 50), **settings)
    method.step()
    # u = 2 (y - 1) / 4, and the cross derivative is -2: x - (-(-2) u)
    assert x.item() == pytest.approx(1.0 - 2 * 2 * (0.5 - 1) / 4, rel=1e-12)


def test_the_neumann_step_follows_an_inner_step_that_is_raised_later():
    """Not one that is lowered: a decay would shrink the adjoint."""
    method = StocBiO(vector(0.0), vector(0.0), inner_loss, outer_loss, inner_lr=1e-3, outer_lr=0.1)
    method.inner_lr = 0.2
    assert method.neumann_lr == 0.2
    method.inner_lr = 0.01
    assert method.neumann_lr == 0.2
    method.neumann_lr = 0.1
    method.inner_lr = 0.3
    assert method.neumann_lr == 0.1
    method.neumann_lr = None
    assert method.neumann_lr == 0.3
    with pytest.raises(ValueError, match="neumann_lr is -1"):
        method.neumann_lr = -1.0
    assert method.neumann_lr == 0.3


@pytest.mark.parametrize("kind", [StocBiO, MRBO, SUSTAIN, VRBO])
def test_a_series_that_does_not_converge_is_told(kind):
    """H = 4: above 0.5 the terms grow."""
    more = {"period": 3} if kind is VRBO else {}
    for size in (0.45, 0.6):
        method = kind(
            vector(0.3), vector(1.0), inner_loss, outer_loss, inner_lr=0.1, neumann_lr=size, outer_lr=0.01, **more
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(10):
                method.step()
        found = [str(one.message) for one in told]
        assert any("the terms of the Neumann series grow" in one for one in found) == (size > 0.5), found


def test_a_neumann_step_of_zero_is_refused():
    for settings in ({"inner_lr": 0.0}, {"inner_lr": 0.1, "neumann_lr": 0.0}, {"inner_lr": 0.1, "neumann_lr": -0.1}):
        with pytest.raises(ValueError, match="neumann_lr is"):
            StocBiO(vector(0.0), vector(0.0), inner_loss, outer_loss, outer_lr=0.1, **settings)


def test_a_peak_is_looked_for_no_longer_than_needed():
    asked = []
    assert peak(lambda t: asked.append(t) or min(t, 5 - t)) == 2
    assert asked == [0, 1, 2, 3, 4]
    assert peak(lambda t: 1.0 + t) == LONGEST_WARM_UP
